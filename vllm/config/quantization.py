"""What a checkpoint's quantization_config asks for, reduced to what this version can run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

SUPPORTED = "compressed-tensors pack-quantized: int4, symmetric, one bf16 scale a group of inputs"


@dataclass(frozen=True)
class QuantScheme:
    """Which modules of a checkpoint are quantised, and how.

    The list in config.json is a hint good enough to plan memory; which module really is quantised, the tensors in the
    checkpoint decide.
    """

    method: str  # "compressed-tensors"
    num_bits: int
    group_size: int
    targets: tuple[str, ...]  # "Linear" (every linear layer), module names, or "re:" and a regular expression
    ignore: tuple[str, ...]

    @property
    def bytes_per_weight(self) -> float:
        return self.num_bits / 8 + 2 / self.group_size

    def covers(self, module: str) -> bool:
        """Whether the linear layer of this full name is quantised."""
        if any(_matches(module, pattern) for pattern in self.ignore):
            return False
        return any(target == "Linear" or _matches(module, target) for target in self.targets)


def parse_quantization(config: dict[str, Any] | None, source: str = "config.json") -> QuantScheme | None:
    """None for plain weights.

    Raises:
        ValueError: a scheme that this version does not run, named in one line.
    """
    if not config:
        return None
    method, form = config.get("quant_method"), config.get("format")
    if method != "compressed-tensors":
        raise ValueError(f"{source}: quantisation {method!r} is not supported; supported is {SUPPORTED}")
    groups = config.get("config_groups") or {}
    schemes = {str(_weights(group)): group for group in groups.values()}
    if len(schemes) != 1:
        raise ValueError(f"{source}: quantization_config has {len(schemes)} weight schemes; one is supported")
    targets = tuple(target for group in groups.values() for target in group.get("targets", ()))
    (group,) = schemes.values()
    weights = _weights(group)
    form = group.get("format") or form
    found = {
        "format": form,
        "type": weights.get("type"),
        "num_bits": weights.get("num_bits"),
        "symmetric": weights.get("symmetric"),
        "strategy": weights.get("strategy"),
        "actorder": weights.get("actorder") not in (None, False, "static", "weight"),
        "input_activations": group.get("input_activations") is not None,
    }
    wanted = {
        "format": "pack-quantized",
        "type": "int",
        "num_bits": 4,
        "symmetric": True,
        "strategy": "group",
        "actorder": False,
        "input_activations": False,
    }
    for key, value in wanted.items():
        if found[key] != value:
            raise ValueError(f"{source}: quantization_config has {key} {found[key]!r}; supported is {SUPPORTED}")
    size = weights.get("group_size")
    if not isinstance(size, int) or size < 8 or size % 8:
        raise ValueError(f"{source}: quantization_config has group_size {size!r}; expected a multiple of 8")
    return QuantScheme(method, 4, size, targets, tuple(config.get("ignore") or ()))


def _weights(group: dict[str, Any]) -> dict[str, Any]:
    return group.get("weights") or {}


def _matches(module: str, pattern: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return module == pattern
