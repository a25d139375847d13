"""How checkpoints name the rows of the GDN input projection, and which of them may share a matrix."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vllm.config.hf_config import TextConfig
from vllm.distributed.parallel_state import TensorParallelGroup
from vllm.model_executor.layers.linear import sources_of_parts
from vllm.model_executor.layers.quantization.plan import WeightPlan
from vllm.model_executor.parameter import Source

PartSizes = dict[str, int]
InProjSources = Callable[[PartSizes, TextConfig, str, TensorParallelGroup], list[Source]]
"""How a family's checkpoints name the input projection's rows: (full sizes of parts, config, prefix, group) -> sources."""

Modules = dict[str, tuple[str, ...]]
"""Linear layers of an input projection: attribute -> the parts in it, in the order q, k, v, z, b, a."""


def separate_sources(parts: PartSizes, config: TextConfig, prefix: str, group: TensorParallelGroup) -> list[Source]:
    """Qwen3.5: in_proj_qkv [q | k | v], in_proj_z, in_proj_b, in_proj_a. Modules whose parts are not among `parts` are left out."""
    modules = {
        "in_proj_qkv": ("q", "k", "v"),
        "in_proj_z": ("z",),
        "in_proj_b": ("b",),
        "in_proj_a": ("a",),
    }
    wanted = {module: names for module, names in modules.items() if names[0] in parts}
    return sources_of_parts(parts, wanted, prefix, group)


def interleaved_sources(parts: PartSizes, config: TextConfig, prefix: str, group: TensorParallelGroup) -> list[Source]:
    """Qwen3-Next: in_proj_qkvz and in_proj_ba, whose rows go key head by key head, (q, k, v's, z's) and (b's, a's)."""
    sources, begin = [], 0
    for module, names in {"in_proj_qkvz": ("q", "k", "v", "z"), "in_proj_ba": ("b", "a")}.items():
        if names[0] not in parts:
            continue
        heads = config.linear_num_key_heads
        widths = [parts[name] // heads for name in names]  # rows of each part in one key head
        by_head = torch.arange(heads * sum(widths), device="cpu").view(heads, sum(widths))
        mine = by_head.tensor_split(group.size)[group.rank]
        take = torch.cat([part.flatten() for part in mine.split(widths, dim=1)])
        sources.append(Source(f"{prefix}.{module}", by_head.numel(), slice(begin, begin + take.numel()), take))
        begin += take.numel()
    return sources


ONE: Modules = {"in_proj": ("q", "k", "v", "z", "b", "a")}
TWO: Modules = {"in_proj_qkvz": ("q", "k", "v", "z"), "in_proj_ba": ("b", "a")}
THREE: Modules = {"in_proj_qkv": ("q", "k", "v"), "in_proj_z": ("z",), "in_proj_ba": ("b", "a")}

LAYOUTS: dict[InProjSources, tuple[Modules, ...]] = {
    separate_sources: (ONE, TWO, THREE),
    interleaved_sources: (ONE, TWO),
}
"""The ways to put a family's rows into matrices, fewest first. The last is how adapters for its checkpoints name them."""


def choose_layout(
    in_proj_sources: InProjSources,
    parts: PartSizes,
    config: TextConfig,
    prefix: str,
    group: TensorParallelGroup,
    plan: WeightPlan,
    separate: bool,
) -> tuple[Modules, str]:
    """The fewest matrices whose parts are each stored in one format, or the most for adapters; and why not one."""
    layouts = LAYOUTS[in_proj_sources]
    if separate:
        return layouts[-1], "adapters attach to its modules"

    def uniform(names: tuple[str, ...]) -> bool:
        sources = in_proj_sources({name: parts[name] for name in names}, config, prefix, group)
        return plan.can_fuse([source.name for source in sources], config.hidden_size)

    fitting = (modules for modules in layouts if all(map(uniform, modules.values())))
    # where none fits, building the last one names the modules that differ
    modules = next(fitting, layouts[-1])
    return modules, "" if modules is ONE else "the checkpoint stores its parts in different formats"
