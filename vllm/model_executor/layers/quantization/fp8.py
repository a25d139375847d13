"""Weights in eight-bit floats (e4m3), with a scale a row or a block.

Two publishers write them, with the same arithmetic W = q * scale:

    official            weight e4m3 [N, K], weight_scale_inv [ceil(N/128), ceil(K/128)]
    compressed-tensors  weight e4m3 [N, K], weight_scale [N, 1] or, in blocks, as above

Both are made for inputs quantised as they come, per token (and per 128 inputs beside blocks). Where no kernel does that, weights alone
are quantised: inputs keep 16 or 32 bits, which is nearer to the model that was quantised than the format itself.

Fused layers put blocks of several modules, and rank shares of them, one after the other, and these need not begin at multiples of a
block. Where that is not known to be so, scales are loaded a row, and one a block is kept if the rows turn out to fall into whole blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from vllm.config.quantization import FLOAT8, OFFICIAL_FP8, WeightFormat
from vllm.model_executor.layers.quantization.base import (
    KernelWeight,
    TensorInfo,
    WeightScheme,
    matrix_shape,
    take_columns,
    take_rows,
)
from vllm.model_executor.layers.quantization.compressed_tensors_wna16 import scale_dtype_of
from vllm.model_executor.layers.quantization.dense import dequantise, expand_rows
from vllm.model_executor.parameter import Slot, Source, empty_parameter

SCALES = {"weight_scale_inv": OFFICIAL_FP8, "weight_scale": FLOAT8}
"""Name of the scale's tensor -> whose format it is."""

_DUMMY_STD = 0.598
"""Deviation of e4m3 numbers with seven exponents: sqrt(1/8 * sum of 4^(e-7) for e = 1..7 * mean of (1 + m/8)^2 for m = 0..7)."""


@dataclass(frozen=True)
class Fp8(WeightScheme):
    scale_name: str
    rows: int  # of a block; 1: a scale a row
    group: int  # columns of a block; -1: all
    quantize_inputs: bool
    scale_dtype: torch.dtype

    def __str__(self) -> str:
        blocks = "one scale a row" if self.group == -1 else f"blocks of {self.rows} x {self.group}"
        return f"fp8, {blocks}"

    @classmethod
    def from_tensors(
        cls, tensors: dict[str, TensorInfo], columns: int, stated: Sequence[WeightFormat] = ()
    ) -> Fp8 | None:
        if "weight" not in tensors or tensors["weight"].dtype != "F8_E4M3":
            return None
        name = next((name for name in SCALES if name in tensors), None)
        if name is None:
            raise ValueError(f"an FP8 weight without a scale; expected {' or '.join(SCALES)} beside it")
        if static := sorted(set(tensors) & {"input_scale", "activation_scale"}):
            raise ValueError(f"{static[0]} is a stored scale of inputs; expected inputs to be quantised as they come")
        if unknown := sorted(set(tensors) - {"weight", name, "bias"}):
            raise ValueError(f"FP8 weights with {', '.join(unknown)} cannot be read")
        (height, width), scale = matrix_shape(tensors, "weight"), matrix_shape(tensors, name)
        if width != columns:
            raise ValueError(f"weight is {[height, width]}; expected {columns} columns")
        stated = [form for form in stated if form.name == SCALES[name]] or _by_shape(name, height, columns, scale)
        for form in stated:
            if scale == (-(-height // form.rows), 1 if form.group == -1 else -(-columns // form.group)):
                dtype = scale_dtype_of(tensors[name], name)
                return cls(name, form.rows, form.group, form.quantize_inputs, dtype)
        wanted = [f"{-(-height // f.rows)} x {1 if f.group == -1 else -(-columns // f.group)}" for f in stated]
        raise ValueError(f"{name} is {list(scale)} beside weight {[height, columns]}; expected {' or '.join(wanted)}")

    @classmethod
    def from_format(cls, stated: WeightFormat | None) -> Fp8 | None:
        for name, form in SCALES.items():
            if stated is not None and stated.name == form:
                return cls(name, stated.rows, stated.group, stated.quantize_inputs, torch.bfloat16)
        return None

    def create(
        self, layer: nn.Module, prefix: str, stack: tuple[int, ...], rows: int, columns: int, dtype: torch.dtype
    ) -> None:
        groups = 1 if self.group == -1 else -(-columns // self.group)
        scales = -(-rows // self.rows) if self._in_whole_blocks(layer) else rows
        weight = empty_parameter(*stack, rows, columns, dtype=torch.float8_e4m3fn)
        scale = empty_parameter(*stack, scales, groups, dtype=self.scale_dtype)
        layer.register_parameter(f"{prefix}weight_fp8", weight)
        layer.register_parameter(f"{prefix}weight_scale", scale)
        layer.compute_dtype = dtype

    def slots(
        self, layer: nn.Module, prefix: str, source: Source, columns: int, take: slice, stack: tuple[int, ...] = ()
    ) -> Iterator[Slot]:
        if self.group != -1 and take.indices(columns)[0] % self.group:
            raise ValueError(f"{source.name}: a rank's share of {columns} inputs begins inside a block of {self.group}")
        groups = 1 if self.group == -1 else -(-columns // self.group)
        weight, scale = getattr(layer, f"{prefix}weight_fp8"), getattr(layer, f"{prefix}weight_scale")
        yield Slot(
            f"{source.name}.weight",
            (source.rows, columns),
            weight,
            (*stack, source.put),
            lambda w: take_rows(w[:, take].view(torch.uint8), source.take).view(torch.float8_e4m3fn),
            dtypes=("F8_E4M3",),
        )
        own = take_columns(groups, columns, take)
        if (step := self._scale_rows(layer, prefix)) > 1:
            put, mine = (slice(x.start // step, -(-x.stop // step)) for x in (source.put, source.take))
            transform = lambda s: s[mine, own]
        else:
            put = source.put
            transform = lambda s: take_rows(expand_rows(s[:, own], self.rows, source.rows), source.take)
        shape = (-(-source.rows // self.rows), groups)
        yield Slot(f"{source.name}.{self.scale_name}", shape, scale, (*stack, put), transform)

    def process(self, layer: nn.Module, prefix: str = "") -> None:
        scale = getattr(layer, f"{prefix}weight_scale")
        blocks = scale[..., :: self.rows, :]
        rowwise = self._scale_rows(layer, prefix) < self.rows
        if rowwise and torch.equal(expand_rows(blocks, self.rows, scale.shape[-2]), scale):
            setattr(layer, f"{prefix}weight_scale", nn.Parameter(blocks.contiguous(), requires_grad=False))

    def all(self, layer: nn.Module, prefix: str = "", rows: slice = slice(None)) -> torch.Tensor:
        weight, scale = getattr(layer, f"{prefix}weight_fp8"), self._row_scale(layer, prefix)
        return self._dense(layer, weight[..., rows, :], scale[..., rows, :])

    def select(self, layer: nn.Module, prefix: str, index: torch.Tensor | slice) -> torch.Tensor:
        weight = getattr(layer, f"{prefix}weight_fp8").view(torch.uint8)[index].view(torch.float8_e4m3fn)
        scale = getattr(layer, f"{prefix}weight_scale")[index]
        return self._dense(layer, weight, expand_rows(scale, self._scale_rows(layer, prefix), weight.shape[-2]))

    def kernel_weight(self, layer: nn.Module, prefix: str = "", rows: slice = slice(None)) -> KernelWeight:
        weight, scale = getattr(layer, f"{prefix}weight_fp8"), getattr(layer, f"{prefix}weight_scale")
        scale_rows = self._scale_rows(layer, prefix)
        first, last, _ = rows.indices(weight.shape[-2])
        if first % scale_rows:  # a run that begins inside a block
            scale, scale_rows = self._row_scale(layer, prefix), 1
        scale = scale[..., first // scale_rows : -(-last // scale_rows), :]
        group = weight.shape[-1] if self.group == -1 else self.group
        return KernelWeight(
            "fp8", weight[..., rows, :], scale, None, group, scale_rows, quantize_inputs=self.quantize_inputs
        )

    def fill_dummy(self, layer: nn.Module, prefix: str, std: float, generator: torch.Generator) -> None:
        weight = getattr(layer, f"{prefix}weight_fp8")
        # random bytes without the exponent's highest bit: numbers below 2 in size, no NaN among them
        weight.view(torch.uint8).random_(0, 256, generator=generator).bitwise_and_(0xBF)
        getattr(layer, f"{prefix}weight_scale").fill_(std / _DUMMY_STD)

    def _in_whole_blocks(self, layer: nn.Module) -> bool:
        """Whether all that fills a linear layer's rows does so block by block, so that scales go there as they are."""
        sources: Sequence[Source] = getattr(layer, "sources", ())
        end = max((source.put.stop for source in sources), default=0)
        return end > 0 and all(
            isinstance(source.take, slice)
            and not source.put.start % self.rows
            and not source.take.start % self.rows
            and (source.put.stop == end or not source.put.stop % self.rows)
            for source in sources
        )

    def _scale_rows(self, layer: nn.Module, prefix: str) -> int:
        """Rows that share one of the scales kept: a block's, or one where blocks do not meet the matrix's rows."""
        weight, scale = getattr(layer, f"{prefix}weight_fp8"), getattr(layer, f"{prefix}weight_scale")
        return 1 if weight.shape[-2] == scale.shape[-2] else self.rows

    def _row_scale(self, layer: nn.Module, prefix: str) -> torch.Tensor:
        rows = getattr(layer, f"{prefix}weight_fp8").shape[-2]
        return expand_rows(getattr(layer, f"{prefix}weight_scale"), self._scale_rows(layer, prefix), rows)

    def _dense(self, layer: nn.Module, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        # compressed-tensors rounds the product to the scale's dtype; the official format has no dtype between
        rounded_to = scale.dtype if SCALES[self.scale_name] == FLOAT8 else layer.compute_dtype
        columns = weight.shape[-1]
        return dequantise(
            weight,
            scale,
            lambda q, _: q.float(),
            columns=columns,
            group=columns if self.group == -1 else self.group,
            rounded_to=rounded_to,
            dtype=layer.compute_dtype,
        )


def _by_shape(name: str, rows: int, columns: int, scale: tuple[int, int]) -> list[WeightFormat]:
    """What a scale may be where no config says it: a scale a row, or blocks of 128."""
    form = SCALES[name]
    blocks = WeightFormat(form, 8, 128, 128, quantize_inputs=True)
    return [blocks] if form == OFFICIAL_FP8 else [WeightFormat(form, 8, quantize_inputs=True), blocks]
