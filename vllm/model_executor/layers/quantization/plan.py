"""Which scheme each module gets: decided by the tensors that a checkpoint has or, where none is read, by its config.

Lists of ignored modules in published checkpoints are unreliable (they may hold fused or outdated names), the tensors are not.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch

from vllm.model_executor.layers.quantization import FORMATS, TensorInfo, Unquantized, WeightScheme


class WeightPlan(ABC):
    """What layers ask while they are built.

    Args:
        dtype: of weights and activations.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    @abstractmethod
    def module_scheme(self, module: str, columns: int) -> WeightScheme:
        """Scheme of one checkpoint module with `columns` input features, by its canonical name."""

    @abstractmethod
    def small_dtype(self, tensor: str) -> torch.dtype:
        """Dtype of a small tensor that checkpoints keep in float32 or not: A_log, dt_bias, the gated norm's weight."""

    def scheme(self, modules: Iterable[str], columns: int) -> WeightScheme:
        """The one scheme that all `modules` share. Raises ValueError where they differ."""
        schemes = {module: self.module_scheme(module, columns) for module in modules}
        if len(set(schemes.values())) > 1:
            listed = ", ".join(f"{module} ({scheme})" for module, scheme in schemes.items())
            raise ValueError(f"modules of one fused layer are stored in different formats: {listed}")
        return next(iter(schemes.values()))

    def can_fuse(self, modules: Iterable[str], columns: int) -> bool:
        return len({self.module_scheme(module, columns) for module in modules}) == 1


class CheckpointPlan(WeightPlan):
    """By presence of tensors.

    Args:
        tensors: canonical tensor name -> header, the whole checkpoint.
    """

    def __init__(self, tensors: dict[str, TensorInfo], dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self._tensors = tensors
        self._modules: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
        for name, info in tensors.items():
            module, _, suffix = name.rpartition(".")
            self._modules[module][suffix] = info

    def module_scheme(self, module: str, columns: int) -> WeightScheme:
        present = self._modules.get(module, {})
        try:
            scheme = next((s for f in FORMATS if (s := f.from_tensors(present, columns))), None)
        except ValueError as error:
            raise ValueError(f"{module}: {error}") from None
        if scheme is None:
            listed = ", ".join(f"{suffix} {info.dtype} {list(info.shape)}" for suffix, info in sorted(present.items()))
            raise ValueError(f"{module}: its tensors are in no format that can be read: {listed}")
        return scheme

    def small_dtype(self, tensor: str) -> torch.dtype:
        info = self._tensors.get(tensor)
        return torch.float32 if info is not None and info.dtype == "F32" else self.dtype


class ConfigPlan(WeightPlan):
    """By `quantization_config` (None: plain everywhere), for weights that are made up rather than read.

    Raises:
        ValueError: the config describes a format that none of `FORMATS` reads.
    """

    def __init__(
        self,
        quantization: dict[str, Any] | None,
        dtype: torch.dtype,
        canonical: Callable[[str], str] = lambda name: name,
    ) -> None:
        super().__init__(dtype)
        groups = [] if quantization is None else list((quantization.get("config_groups") or {}).values())
        if quantization is not None and not groups:
            raise ValueError(
                f"quantization_config of method {quantization.get('quant_method')!r} is in no known format"
            )
        self._groups: list[tuple[list[str], WeightScheme]] = []
        for group in groups:
            scheme = next((s for f in FORMATS if (s := f.from_config(quantization, group))), None)
            if scheme is None:
                raise ValueError(f"quantization_config describes a format that cannot be read: {group.get('weights')}")
            self._groups.append((group.get("targets") or ["Linear"], scheme))
        self._ignore = [] if quantization is None else list(quantization.get("ignore") or [])
        self._canonical = canonical

    def module_scheme(self, module: str, columns: int) -> WeightScheme:
        if any(self._matches(pattern, module) for pattern in self._ignore):
            return Unquantized()
        for targets, scheme in self._groups:
            if any(target == "Linear" or self._matches(target, module) for target in targets):
                return scheme
        return Unquantized()

    def _matches(self, pattern: str, module: str) -> bool:
        if pattern.startswith("re:"):
            files_name = module.replace("model.", "model.language_model.", 1)
            return any(re.match(pattern[3:], name) for name in (module, files_name))
        return self._canonical(pattern) == module

    def small_dtype(self, tensor: str) -> torch.dtype:
        return torch.float32
