"""Linear layers y = x Wᵀ (+ b), whose weights may be quantised, fused from several checkpoint modules, and cut over ranks.

A layer's rows are made of *sources*: checkpoint modules, each with the rows it fills and, of its own rows, the ones this rank takes.
The weight scheme turns sources into slots of its own tensors, so no layer knows how weights are stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import nn

from vllm.distributed.parallel_state import (
    TensorParallelGroup,
    get_tensor_model_parallel_world_size,
    get_tensor_parallel_group,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.ops.rms_norm import Unnormed
from vllm.model_executor.layers.ops.skinny_gemm_plan import Product
from vllm.model_executor.layers.quantization import WeightScheme
from vllm.model_executor.layers.quantization.base import take_rows
from vllm.model_executor.layers.quantization.plan import ConfigPlan, WeightPlan
from vllm.model_executor.parameter import Slot, Source, empty_parameter


def plain_plan() -> WeightPlan:
    """Unquantised weights in torch's default dtype: what a layer built outside of a model gets."""
    return ConfigPlan(None, torch.get_default_dtype())


class Linear(nn.Module):
    """The common part: one matrix [rows, columns] of this rank.

    Args:
        sources: checkpoint modules that fill the rows.
        rows, columns: of this rank's matrix.
        full_columns, take: input features of the checkpoint's matrices, and which of them this rank holds.
        bias: whether the checkpoint has `bias` beside each source's weight.
        plan: chooses the scheme; all sources must share one (ValueError otherwise).
    """

    adds = False
    """Whether the result is for a residual to be added to."""

    def __init__(
        self,
        sources: Sequence[Source],
        rows: int,
        columns: int,
        *,
        full_columns: int,
        take: slice = slice(None),
        bias: bool = False,
        plan: WeightPlan | None = None,
    ) -> None:
        super().__init__()
        plan = plan or plain_plan()
        self.sources, self.full_columns, self.take = tuple(sources), full_columns, take
        self.in_features, self.out_features = columns, rows
        self.scheme: WeightScheme = plan.scheme([source.name for source in sources], full_columns)
        self.scheme.create(self, "", (), rows, columns, plan.dtype)
        self.bias = empty_parameter(rows, dtype=plan.dtype) if bias else None

    def checkpoint_slots(self) -> Iterator[Slot]:
        for source in self.sources:
            yield from self.scheme.slots(self, "", source, self.full_columns, self.take)
            if self.bias is not None:
                yield Slot(
                    f"{source.name}.bias",
                    (source.rows,),
                    self.bias,
                    (source.put,),
                    lambda b, take=source.take: take_rows(b, take),
                )

    def fill_dummy(self, generator: torch.Generator) -> None:
        self.scheme.fill_dummy(self, "", self.full_columns**-0.5, generator)
        if self.bias is not None:
            self.bias.zero_()

    def process_weights_after_loading(self) -> None:
        self.scheme.process(self)

    def forward(self, x: torch.Tensor | Unnormed, rows: slice = slice(None)) -> torch.Tensor:
        """x [..., columns] -> [..., rows]; `rows` picks a run of outputs, and only those are computed."""
        y = self.scheme.apply(self, x, rows)
        return y if self.bias is None else y + self.bias[rows]

    @property
    def product(self) -> Product:
        """What decides whether norms and adds can be part of this projection."""
        weight = self.scheme.kernel_weight(self)
        return Product(weight and weight.kind, self.out_features, self.in_features, self.bias is not None, self.adds)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.scheme}"


class ReplicatedLinear(Linear):
    """The whole matrix on every rank. `prefix` is the checkpoint module."""

    def __init__(
        self, input_size: int, output_size: int, *, prefix: str, bias: bool = False, plan: WeightPlan | None = None
    ) -> None:
        whole = slice(0, output_size)
        source = Source(prefix, output_size, put=whole, take=whole)
        super().__init__([source], output_size, input_size, full_columns=input_size, bias=bias, plan=plan)


class MergedColumnParallelLinear(Linear):
    """Named parts side by side, [part0 | part1 | ...], each cut over ranks on its own.

    Args:
        parts: output features of each part, all ranks together.
        prefix: of the checkpoint modules' names: "model.layers.0.mlp".
        sources: checkpoint modules, where they are not simply `prefix.part`, one a part.

    Attributes:
        rows: rows of each part in this rank's output.
    """

    def __init__(
        self,
        input_size: int,
        parts: dict[str, int],
        *,
        prefix: str,
        sources: Sequence[Source] | None = None,
        bias: bool = False,
        plan: WeightPlan | None = None,
    ) -> None:
        group = get_tensor_parallel_group()
        self_rows = part_rows(parts, group)
        if sources is None:
            sources = sources_of_parts(parts, {part: (part,) for part in parts}, prefix, group)
        total = max(rows.stop for rows in self_rows.values())
        super().__init__(sources, total, input_size, full_columns=input_size, bias=bias, plan=plan)
        self.rows = self_rows


class ColumnParallelLinear(MergedColumnParallelLinear):
    """Output features cut over ranks. `prefix` is the checkpoint module."""

    def __init__(
        self, input_size: int, output_size: int, *, prefix: str, bias: bool = False, plan: WeightPlan | None = None
    ) -> None:
        parent, _, name = prefix.rpartition(".")
        super().__init__(input_size, {name: output_size}, prefix=parent, bias=bias, plan=plan)


class RowParallelLinear(Linear):
    """Input features cut over ranks; the ranks' partial results are summed. `prefix` is the checkpoint module."""

    adds = True

    def __init__(
        self, input_size: int, output_size: int, *, prefix: str, bias: bool = False, plan: WeightPlan | None = None
    ) -> None:
        group = get_tensor_parallel_group()
        share = group.share(input_size, prefix)
        whole = slice(0, output_size)
        super().__init__(
            [Source(prefix, output_size, put=whole, take=whole)],
            output_size,
            share,
            full_columns=input_size,
            take=slice(group.rank * share, (group.rank + 1) * share),
            bias=bias,
            plan=plan,
        )

    def forward(self, x: torch.Tensor, add_to: torch.Tensor | None = None) -> torch.Tensor | None:
        """This rank's x [..., columns] -> the whole [..., rows], the same on every rank.

        With `add_to` [..., rows] the result is added to it in place, rounded to its dtype before, and None returned.
        """
        if add_to is not None and self.bias is None and get_tensor_model_parallel_world_size() == 1:
            return self.scheme.add(self, x, add_to)
        y = tensor_model_parallel_all_reduce(self.scheme.apply(self, x))
        y = y if self.bias is None else y + self.bias
        return y if add_to is None else plus(add_to, y)


class QKVParallelLinear(Linear):
    """Attention's three projections in one matrix: [q | k | v], heads cut over ranks.

    A rank has at least one key/value head: with more ranks than those heads, neighbours hold the same one.

    Args:
        head_size: of keys and values.
        query_size: features of one query head, where it carries more than a query (an output gate beside it).
        num_heads, num_kv_heads: of the checkpoint, all ranks together.
        prefix: "model.layers.3.self_attn", above q_proj, k_proj and v_proj.

    Attributes:
        num_heads, num_kv_heads: of this rank.
        rows: of "q", "k" and "v" in this rank's output.
    """

    def __init__(
        self,
        hidden_size: int,
        head_size: int,
        num_heads: int,
        num_kv_heads: int,
        *,
        prefix: str,
        query_size: int | None = None,
        bias: bool = False,
        plan: WeightPlan | None = None,
    ) -> None:
        group = get_tensor_parallel_group()
        query_size = query_size or head_size
        heads = group.share(num_heads, f"{prefix}: query heads")
        kv_heads = max(1, num_kv_heads // group.size)
        if max(num_kv_heads, group.size) % min(num_kv_heads, group.size):
            raise ValueError(f"{prefix}: {num_kv_heads} key/value heads cannot be shared evenly by {group.size} ranks")
        q_rows, kv_rows = heads * query_size, kv_heads * head_size
        first_kv = group.rank * num_kv_heads // group.size * head_size
        kv_take = slice(first_kv, first_kv + kv_rows)
        rows = {
            "q": slice(0, q_rows),
            "k": slice(q_rows, q_rows + kv_rows),
            "v": slice(q_rows + kv_rows, q_rows + 2 * kv_rows),
        }
        q_take = slice(group.rank * q_rows, (group.rank + 1) * q_rows)
        sources = [
            Source(f"{prefix}.q_proj", num_heads * query_size, rows["q"], q_take),
            Source(f"{prefix}.k_proj", num_kv_heads * head_size, rows["k"], kv_take),
            Source(f"{prefix}.v_proj", num_kv_heads * head_size, rows["v"], kv_take),
        ]
        total = q_rows + 2 * kv_rows
        super().__init__(sources, total, hidden_size, full_columns=hidden_size, bias=bias, plan=plan)
        self.num_heads, self.num_kv_heads, self.rows = heads, kv_heads, rows


def plus(total: torch.Tensor, y: torch.Tensor) -> None:
    """total += y, as the end of a layer that was asked to add its result."""
    total += y


def part_rows(parts: dict[str, int], group: TensorParallelGroup) -> dict[str, slice]:
    """Where each part lies in a rank's rows."""
    rows, begin = {}, 0
    for name, size in parts.items():
        end = begin + group.share(size, name)
        rows[name], begin = slice(begin, end), end
    return rows


def sources_of_parts(
    parts: dict[str, int], modules: dict[str, tuple[str, ...]], prefix: str, group: TensorParallelGroup
) -> list[Source]:
    """Sources of checkpoint modules that hold one or several neighbouring parts, one after the other.

    Args:
        parts: full output features of each part, in the parameter's order.
        modules: checkpoint module -> the parts in it.
    """
    rows = part_rows(parts, group)
    sources = []
    for module, names in modules.items():
        takes, begin = [], 0
        for name in names:
            share = parts[name] // group.size
            takes.append((begin + group.rank * share, begin + (group.rank + 1) * share))
            begin += parts[name]
        put = slice(rows[names[0]].start, rows[names[-1]].stop)
        contiguous = all(before[1] == after[0] for before, after in pairwise(takes))
        take = (
            slice(takes[0][0], takes[-1][1])
            if contiguous
            else torch.cat([torch.arange(*t, device="cpu") for t in takes])
        )
        sources.append(Source(f"{prefix}.{module}" if prefix else module, begin, put, take))
    return sources
