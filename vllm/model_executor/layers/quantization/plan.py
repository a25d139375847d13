"""Which scheme each module gets: decided by the tensors that a checkpoint has or, where none is read, by its config.

Lists of ignored modules in published checkpoints are unreliable (they may hold fused or outdated names), the tensors are not.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable

import torch

from vllm.config.quantization import QuantConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization import FORMATS, TensorInfo, Unquantized, WeightScheme

logger = init_logger(__name__)


class WeightPlan(ABC):
    """What layers ask while they are built.

    Args:
        dtype: of weights and activations.
        quant: the checkpoint's quantization_config; None: plain weights.
    """

    def __init__(self, dtype: torch.dtype, quant: QuantConfig | None = None) -> None:
        self.dtype, self.quant = dtype, quant
        self._decided: dict[str, WeightScheme] = {}

    def module_scheme(self, module: str, columns: int) -> WeightScheme:
        """Scheme of one checkpoint module with `columns` input features, by its canonical name."""
        if module not in self._decided:
            self._decided[module] = self._decide(module, columns)
        return self._decided[module]

    @abstractmethod
    def _decide(self, module: str, columns: int) -> WeightScheme:
        """Raises ValueError, with the module and the file, where its format cannot be read."""

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

    @property
    def modules(self) -> set[str]:
        """The modules that layers asked for so far."""
        return set(self._decided)

    def summary(self) -> list[str]:
        """A line a scheme, with the modules that have it."""
        by_scheme: dict[str, list[str]] = defaultdict(list)
        for module, scheme in self._decided.items():
            by_scheme[str(scheme)].append(module)
        return [f"{scheme}: {_grouped(modules)}" for scheme, modules in by_scheme.items()]

    def log(self) -> None:
        """Say what was decided, unless everything is plain."""
        if any(scheme != Unquantized() for scheme in self._decided.values()):
            for line in self.summary():
                logger.info("Weights, %s", line)


class CheckpointPlan(WeightPlan):
    """By presence of tensors.

    Args:
        tensors: canonical tensor name -> header, the whole checkpoint.
    """

    def __init__(self, tensors: dict[str, TensorInfo], dtype: torch.dtype, quant: QuantConfig | None = None) -> None:
        super().__init__(dtype, quant)
        self._tensors = tensors
        self._modules: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
        for name, info in tensors.items():
            module, _, suffix = name.rpartition(".")
            self._modules[module][suffix] = info

    def _decide(self, module: str, columns: int) -> WeightScheme:
        present = self._modules.get(module, {})
        stated = []
        if self.quant is not None:
            own = self.quant.format_of(module)
            stated = [*([own] if own else []), *(form for form in self.quant.formats if form != own)]
        try:
            scheme = next((s for f in FORMATS if (s := f.from_tensors(present, columns, stated))), None)
            if scheme is None:
                listed = (f"{suffix} {info.dtype} {list(info.shape)}" for suffix, info in sorted(present.items()))
                raise ValueError(f"its tensors are in no format that can be read: {', '.join(listed)}")
        except ValueError as error:
            files = sorted({info.file for info in present.values()} - {""})
            raise ValueError(f"{module}{f' (in {files[0]})' if files else ''}: {error}") from None
        return scheme

    def small_dtype(self, tensor: str) -> torch.dtype:
        info = self._tensors.get(tensor)
        return torch.float32 if info is not None and info.dtype == "F32" else self.dtype


class ConfigPlan(WeightPlan):
    """By the config, for weights that are made up rather than read."""

    def __init__(self, quant: QuantConfig | None, dtype: torch.dtype) -> None:
        super().__init__(dtype, quant)

    def _decide(self, module: str, columns: int) -> WeightScheme:
        form = None if self.quant is None else self.quant.format_of(module)
        if form is not None and form.rows == 1 and form.group > 0 and columns % form.group:
            raise ValueError(
                f"{module}: {columns} inputs cannot be divided into groups of {form.group}, which {self.quant.source} "
                "asks for; expected a divisor"
            )
        return next(scheme for f in FORMATS if (scheme := f.from_format(form)))

    def small_dtype(self, tensor: str) -> torch.dtype:
        return torch.float32


def _grouped(modules: list[str]) -> str:
    """Names with "*" for numbers, those that differ in the last part alone together: "layers.*.self_attn.{k,q,v}_proj"."""
    by_parent: dict[str, set[str]] = defaultdict(set)
    layers: dict[str, set[str]] = defaultdict(set)
    for module in modules:
        parent, _, last = re.sub(r"\.\d+(?=\.|$)", ".*", module).rpartition(".")
        by_parent[parent].add(last)
        layers[parent] |= set(re.findall(r"\.layers\.(\d+)\.", module))
    found = []
    for parent, lasts in by_parent.items():
        name = ",".join(sorted(lasts)) if len(lasts) == 1 else "{" + ",".join(sorted(lasts)) + "}"
        where = parent.removeprefix("model.").removeprefix("layers.*.")
        number = len(layers[parent])
        count = f" ({number} layer{'s' if number > 1 else ''})" if number else ""
        found.append(f"{where}.{name}{count}" if where else name)
    return "; ".join(found)
