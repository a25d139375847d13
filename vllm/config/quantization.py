"""What a checkpoint's quantization_config says, as a checked value. Plain Python: `vllm plan` reads it without torch.

Three families of configs are read: compressed-tensors' (groups of modules, each with a format), the official FP8 checkpoints' and
AutoAWQ's. Where weights are loaded, the tensors decide which module is stored how; the config settles what tensors cannot tell (the
size of a block), and everything where there are none: memory plans and dummy weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

PACKED, FLOAT8, NVFP4, OFFICIAL_FP8, AWQ = "pack-quantized", "float-quantized", "nvfp4-pack-quantized", "fp8", "awq"

METHODS = ("compressed-tensors", "fp8", "awq")

SUPPORTED = (
    "compressed-tensors pack-quantized (4 or 8 bits), float-quantized (FP8, a scale a channel or block) and nvfp4-pack-quantized, "
    "fp8 with blocks, awq with 4 bits"
)

FUSED_NAMES = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), ("qkv_proj",)),
    **dict.fromkeys(("gate_proj", "up_proj"), ("gate_up_proj",)),
    **dict.fromkeys(("in_proj_qkv", "in_proj_z"), ("in_proj_qkvz", "in_proj")),
    **dict.fromkeys(("in_proj_b", "in_proj_a"), ("in_proj_ba", "in_proj")),
    **dict.fromkeys(("in_proj_qkvz", "in_proj_ba"), ("in_proj",)),
}
"""Last part of a module's name -> names of fused modules that hold it, which lists in configs use too."""

PREFIXES = ("model.language_model.", "language_model.model.", "language_model.")
"""What files may have in the place of the canonical "model."."""

NEVER = ("lm_head", "mlp.gate", "mlp.shared_expert_gate")
"""Modules that official FP8 and AutoAWQ checkpoints leave plain, listed or not."""


@dataclass(frozen=True)
class WeightFormat:
    """How the weights [N, K] of some modules are stored: q in few bits, and a scale for every `rows` x `group` of them."""

    name: str
    num_bits: int
    group: int = -1  # -1: all of a row
    rows: int = 1
    symmetric: bool = True
    quantize_inputs: bool = False  # made for inputs in 8 bits, with a scale a token

    def matrix_bytes(self, rows: int, columns: int) -> int:
        """Memory of a matrix [rows, columns] once it is loaded, with scales in the precision of published checkpoints."""
        groups = 1 if self.group == -1 else -(-columns // self.group)
        scales = -(-rows // self.rows) * groups
        each = (
            1 if self.name == NVFP4 else 2 if self.symmetric else 3
        )  # an e4m3 scale, or 16 bits, and a zero point of 8
        return rows * columns * self.num_bits // 8 + scales * each + (8 * rows if self.name == NVFP4 else 0)


@dataclass(frozen=True)
class QuantConfig:
    """Which modules of a checkpoint are quantised, and how.

    Attributes:
        groups: targets ("Linear" is every linear layer, a module's name, "re:" and a regular expression) and their format. The first
            group that matches a module counts.
        ignore: modules that stay plain, in the same notation, or as `match` says.
        match: "exact" names, "part" (whole words of a name: a module and what is in it), or "substring" (anywhere).
        kv_cache_fp8: the checkpoint asks for attention keys and values in fp8.
        source: the file, for messages.
    """

    method: str
    groups: tuple[tuple[tuple[str, ...], WeightFormat], ...]
    ignore: tuple[str, ...] = ()
    match: str = "exact"
    kv_cache_fp8: bool = False
    source: str = "config.json"

    @property
    def formats(self) -> tuple[WeightFormat, ...]:
        return tuple(form for _, form in self.groups)

    def format_of(self, module: str) -> WeightFormat | None:
        """How the linear layer of this name is stored, by the config alone; None: in plain floats."""
        names = module_names(module)
        if self.match != "exact" and any(_matches(entry, names, "part") for entry in NEVER):
            return None
        if any(_matches(entry, names, self.match) for entry in self.ignore):
            return None
        for targets, form in self.groups:
            if any(target == "Linear" or _matches(target, names, "exact") for target in targets):
                return form
        return None

    def unmatched(self, modules: Iterable[str]) -> list[str]:
        """Entries of `ignore` that match none of the `modules`."""
        modules = list(modules)
        every = {name for module in modules for name in module_names(module)}
        left = [entry for entry in self.ignore if entry not in every]
        # experts are alike, and there are thousands
        few = {name for name in every if ".experts." not in name or ".experts.0" in name}
        return [entry for entry in left if not _matches(entry, few, self.match)]


def module_names(module: str) -> tuple[str, ...]:
    """A module's canonical name, and the others that lists in configs may call it by."""
    parent, _, last = module.rpartition(".")
    names = [module, *(f"{parent}.{fused}" for fused in FUSED_NAMES.get(last, ()))]
    bare = [name.removeprefix("model.") for name in names]
    return (*names, *(prefix + name for prefix in PREFIXES for name in bare))


def parse_quantization(config: dict[str, Any] | None, source: str = "config.json") -> QuantConfig | None:
    """None for plain weights.

    Raises:
        ValueError: a format that cannot be run, named in one line with the file.
    """
    if not config:
        return None
    reader = {"compressed-tensors": _compressed_tensors, "fp8": _official_fp8, "awq": _awq}.get(
        config.get("quant_method")
    )
    try:
        if reader is None:
            raise ValueError(f"quant_method {config.get('quant_method')!r} is not supported; supported is {SUPPORTED}")
        found = reader(config, source)
        for entry in (*found.ignore, *(target for targets, _ in found.groups for target in targets)):
            _check_entry(entry)
        return found
    except ValueError as error:
        raise ValueError(f"{source}: quantization_config: {error}") from None


def _compressed_tensors(config: dict[str, Any], source: str) -> QuantConfig:
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise ValueError("has no config_groups")
    if (config.get("transform_config") or {}).get("config_groups"):
        raise ValueError("transform_config asks for rotated inputs, which are not supported")
    if (config.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise ValueError(f"sparsity_config has format {config['sparsity_config']['format']!r}; expected dense")
    found = []
    for name, group in groups.items():
        if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
            raise ValueError(f"{name} describes no weights; supported is {SUPPORTED}")
        try:
            form = _group_format(group, config.get("format"))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        found.append((tuple(group.get("targets") or ("Linear",)), form))
    # names and patterns before the word that means everything, whatever their order
    found.sort(key=lambda entry: "Linear" in entry[0])
    ignore = tuple(config.get("ignore") or ())
    return QuantConfig("compressed-tensors", tuple(found), ignore, "exact", _kv_cache_fp8(config), source)


def _group_format(group: dict[str, Any], form: str | None) -> WeightFormat:
    weights = group["weights"]
    kind, bits, strategy = weights.get("type", "int"), weights.get("num_bits"), weights.get("strategy")
    form = group.get("format") or form
    if form in (None, "mixed-precision"):
        form = {("int", 4): PACKED, ("int", 8): PACKED, ("float", 8): FLOAT8, ("float", 4): NVFP4}.get((kind, bits))
    wanted = {  # format -> type, bits, strategies
        PACKED: ("int", (4, 8), ("group", "channel")),
        FLOAT8: ("float", (8,), ("channel", "block")),
        "naive-quantized": ("float", (8,), ("channel", "block")),
        NVFP4: ("float", (4,), ("tensor_group",)),
    }
    if form not in wanted:
        raise ValueError(f"has format {form!r}; supported is {SUPPORTED}")
    types, widths, strategies = wanted[form]
    _expect("type", kind, (types,), form)
    _expect("num_bits", bits, widths, form)
    _expect("strategy", strategy, strategies, form)
    if weights.get("dynamic"):
        raise ValueError(f"weights have dynamic {weights['dynamic']!r}; expected stored scales")
    if weights.get("actorder") not in (None, False, "static", "weight"):
        raise ValueError(f"has actorder {weights['actorder']!r}; expected columns in their own order")
    quantize_inputs = _dynamic_inputs(group.get("input_activations"), form)
    if form == PACKED:
        group_size = _size("group_size", weights.get("group_size")) if strategy == "group" else -1
        return WeightFormat(PACKED, bits, group_size, symmetric=weights.get("symmetric", True))
    _expect("symmetric", weights.get("symmetric", True), (True,), form)
    if form == NVFP4:
        _expect("group_size", weights.get("group_size"), (16,), form)
        return WeightFormat(NVFP4, 4, 16)
    rows, columns = (1, -1) if strategy == "channel" else _block("block_structure", weights.get("block_structure"))
    return WeightFormat(FLOAT8, 8, columns, rows, quantize_inputs=quantize_inputs)


def _dynamic_inputs(inputs: dict[str, Any] | None, form: str) -> bool:
    """Whether the format quantises its inputs as it runs. NVFP4's 4-bit inputs are not run: weights alone are the more exact."""
    if inputs is None or form == NVFP4:
        return False
    if form == PACKED:
        raise ValueError(f"has input_activations of {inputs.get('num_bits')} bits; {PACKED} is run with inputs in 16")
    if inputs.get("type") != "float" or inputs.get("num_bits") != 8:
        kind = f"{inputs.get('type')} {inputs.get('num_bits')}"
        raise ValueError(f"has input_activations of type {kind}; expected float 8")
    if inputs.get("dynamic") is not True or inputs.get("strategy") not in ("token", "group"):
        found = f"strategy {inputs.get('strategy')!r} and dynamic {inputs.get('dynamic')!r}"
        raise ValueError(f"has input_activations with {found}; expected a dynamic scale a token")
    return True


def _kv_cache_fp8(config: dict[str, Any]) -> bool:
    scheme = config.get("kv_cache_scheme")
    if scheme is None:
        return False
    found = {key: scheme.get(key) for key in ("type", "num_bits", "strategy", "dynamic")}
    if found["type"] != "float" or found["num_bits"] != 8 or found["strategy"] != "tensor" or found["dynamic"]:
        raise ValueError(f"kv_cache_scheme is {found}; expected float, 8 bits, one stored scale a tensor")
    return True


def _official_fp8(config: dict[str, Any], source: str) -> QuantConfig:
    _expect("activation_scheme", config.get("activation_scheme"), ("dynamic",), "fp8")
    _expect("fmt", config.get("fmt", "e4m3"), ("e4m3",), "fp8")
    rows, columns = _block("weight_block_size", config.get("weight_block_size"))
    form = WeightFormat(OFFICIAL_FP8, 8, columns, rows, quantize_inputs=True)
    ignore = config.get("modules_to_not_convert") or config.get("ignored_layers") or ()
    return QuantConfig("fp8", ((("Linear",), form),), tuple(ignore), "part", source=source)


def _awq(config: dict[str, Any], source: str) -> QuantConfig:
    bits = config.get("bits", config.get("w_bit"))
    size = config.get("group_size", config.get("q_group_size"))
    _expect("bits", bits, (4,), "awq")
    _expect("version", str(config.get("version", "gemm")).lower(), ("gemm",), "awq")
    _expect("zero_point", config.get("zero_point", True), (True,), "awq")
    form = WeightFormat(AWQ, 4, -1 if size == -1 else _size("group_size", size), symmetric=False)
    ignore = tuple(config.get("modules_to_not_convert") or ())
    return QuantConfig("awq", ((("Linear",), form),), ignore, "substring", source=source)


def _expect(key: str, value: Any, allowed: tuple[Any, ...], form: str) -> None:
    if value not in allowed:
        raise ValueError(f"has {key} {value!r}; {form} is supported with {' or '.join(map(repr, allowed))}")


def _size(key: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 8 or value % 8:
        raise ValueError(f"has {key} {value!r}; expected a multiple of 8")
    return value


def _block(key: str, value: Any) -> tuple[int, int]:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise ValueError(f"has {key} {value!r}; expected [rows, columns] of a block, such as [128, 128]")
    return _size(key, value[0]), _size(key, value[1])


def _check_entry(entry: Any) -> None:
    if not isinstance(entry, str):
        raise ValueError(f"names the module {entry!r}; expected a string")
    try:
        re.compile(entry.removeprefix("re:") if entry.startswith("re:") else "")
    except re.error as error:
        raise ValueError(f"has {entry!r}, which is no regular expression: {error}") from None


def _matches(entry: str, names: Iterable[str], match: str) -> bool:
    if entry.startswith("re:"):
        pattern = re.compile(entry[3:])
        return any(pattern.match(name) for name in names)
    if match == "substring":
        return any(entry in name for name in names)
    if match == "part":
        return any(f".{entry}." in f".{name}." for name in names)
    return entry in names
