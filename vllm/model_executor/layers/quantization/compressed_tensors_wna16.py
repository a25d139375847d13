"""Integer weights in groups, 16-bit activations: compressed-tensors' `pack-quantized` format.

A checkpoint module has

    weight_packed      int32 [N, K*bits/32]  element k sits in bits (k mod 32/bits)*bits of word k // (32/bits), offset by 2^(bits-1)
    weight_scale       float [N, K/g]        one scale a group of g inputs
    weight_shape       int64 [2]             N, K
    weight_zero_point  int32 [N*bits/32, K/g], asymmetric checkpoints only; packed along N

and stands for W = (q - zero) * scale, where zero is 2^(bits-1) for symmetric ones. The product is rounded to the scale's dtype, as by
the format's own decompressor, and then cast: the dense weight is bit for bit what a decompressed checkpoint holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from vllm.config.quantization import PACKED, WeightFormat
from vllm.model_executor.layers.quantization import dense
from vllm.model_executor.layers.quantization.base import (
    KernelWeight,
    TensorInfo,
    WeightScheme,
    matrix_shape,
    take_columns,
    take_rows,
)
from vllm.model_executor.parameter import Slot, Source, empty_parameter

SCALE_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_TENSORS = {"weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "bias"}


@dataclass(frozen=True)
class CompressedTensorsWNA16(WeightScheme):
    bits: int
    group_size: int  # -1: one scale a row
    symmetric: bool
    scale_dtype: torch.dtype

    def __str__(self) -> str:
        groups = "one scale a row" if self.group_size == -1 else f"groups of {self.group_size}"
        return f"int{self.bits}, {groups}" + ("" if self.symmetric else ", zero points")

    @property
    def per_word(self) -> int:
        return 32 // self.bits

    @classmethod
    def from_tensors(
        cls, tensors: dict[str, TensorInfo], columns: int, stated: Sequence[WeightFormat] = ()
    ) -> CompressedTensorsWNA16 | None:
        if "weight_packed" not in tensors or tensors["weight_packed"].dtype != "I32":
            return None
        if unknown := sorted(set(tensors) - _TENSORS):
            raise ValueError(f"packed integer weights with {', '.join(unknown)} cannot be read")
        packed, scale = matrix_shape(tensors, "weight_packed"), matrix_shape(tensors, "weight_scale")
        bits, uneven = divmod(32 * packed[1], columns)
        if bits not in (4, 8) or uneven:
            raise ValueError(
                f"weight_packed is {list(packed)}; expected {columns // 8} words a row for 4 bits or {columns // 4} for 8"
            )
        stated = [form for form in stated if form.name == PACKED]
        group_size = group_of(scale, columns, [form.group for form in stated])
        if "weight_zero_point" not in tensors and stated and not any(form.symmetric for form in stated):
            raise ValueError("weight_zero_point is missing; the config says that weights are asymmetric")
        scale_dtype = scale_dtype_of(tensors["weight_scale"], "weight_scale")
        return cls(bits, group_size, "weight_zero_point" not in tensors, scale_dtype)

    @classmethod
    def from_format(cls, stated: WeightFormat | None) -> CompressedTensorsWNA16 | None:
        if stated is None or stated.name != PACKED:
            return None
        return cls(stated.num_bits, stated.group, stated.symmetric, torch.bfloat16)

    def create(
        self, layer: nn.Module, prefix: str, stack: tuple[int, ...], rows: int, columns: int, dtype: torch.dtype
    ) -> None:
        group_size = columns if self.group_size == -1 else self.group_size
        if columns % group_size or columns % self.per_word:
            raise ValueError(f"{columns} inputs cannot be held in groups of {group_size} and words of {self.per_word}")
        packed = empty_parameter(*stack, rows, columns // self.per_word, dtype=torch.int32)
        scale = empty_parameter(*stack, rows, columns // group_size, dtype=self.scale_dtype)
        layer.register_parameter(f"{prefix}weight_packed", packed)
        layer.register_parameter(f"{prefix}weight_scale", scale)
        if not self.symmetric:
            zero_point = empty_parameter(*stack, rows, columns // group_size, dtype=torch.uint8)
            layer.register_parameter(f"{prefix}weight_zero_point", zero_point)
        layer.compute_dtype = dtype

    def slots(
        self, layer: nn.Module, prefix: str, source: Source, columns: int, take: slice, stack: tuple[int, ...] = ()
    ) -> Iterator[Slot]:
        groups = 1 if self.group_size == -1 else columns // self.group_size
        words = columns // self.per_word

        def slot(name: str, shape: tuple[int, ...], transform) -> Slot:
            param = getattr(layer, f"{prefix}{name}")
            return Slot(f"{source.name}.{name}", shape, param, (*stack, source.put), transform)

        mine = take_columns(words, columns, take)
        yield slot("weight_packed", (source.rows, words), lambda w: take_rows(w[:, mine], source.take))
        own = take_columns(groups, columns, take)
        yield slot("weight_scale", (source.rows, groups), lambda s: take_rows(s[:, own], source.take))
        if not self.symmetric:
            if source.rows % self.per_word:
                raise ValueError(f"{source.name}: zero points of {source.rows} rows cannot be packed in words")
            yield slot(
                "weight_zero_point",
                (source.rows // self.per_word, groups),
                lambda z: take_rows(unpack(z.T, self.bits).T[:, own].to(torch.uint8), source.take),
            )
        yield Slot(f"{source.name}.weight_shape", (2,), None)

    def all(self, layer: nn.Module, prefix: str = "", rows: slice = slice(None)) -> torch.Tensor:
        return self._dense(layer, prefix, (..., rows, slice(None)))

    def select(self, layer: nn.Module, prefix: str, index: torch.Tensor | slice) -> torch.Tensor:
        return self._dense(layer, prefix, index)

    def kernel_weight(self, layer: nn.Module, prefix: str = "", rows: slice = slice(None)) -> KernelWeight:
        packed = getattr(layer, f"{prefix}weight_packed")[..., rows, :]
        scale = getattr(layer, f"{prefix}weight_scale")[..., rows, :]
        zero = None if self.symmetric else getattr(layer, f"{prefix}weight_zero_point")[..., rows, :]
        group = packed.shape[-1] * self.per_word // scale.shape[-1]
        return KernelWeight(f"int{self.bits}", packed, scale, zero, group)

    def _dense(self, layer: nn.Module, prefix: str, index) -> torch.Tensor:
        packed = getattr(layer, f"{prefix}weight_packed")[index]
        scale = getattr(layer, f"{prefix}weight_scale")[index]
        zero_point = None if self.symmetric else getattr(layer, f"{prefix}weight_zero_point")[index]
        return dequantise(packed, scale, zero_point, self.bits, layer.compute_dtype)

    def fill_dummy(self, layer: nn.Module, prefix: str, std: float, generator: torch.Generator) -> None:
        packed, scale = getattr(layer, f"{prefix}weight_packed"), getattr(layer, f"{prefix}weight_scale")
        packed.random_(-(2**31), 2**31 - 1, generator=generator)
        scale.fill_(std * 12**0.5 / 2**self.bits)  # uniform integers of this many bits have deviation 2^bits / sqrt(12)
        if not self.symmetric:
            getattr(layer, f"{prefix}weight_zero_point").fill_(2 ** (self.bits - 1))


def group_of(scale: tuple[int, int], columns: int, stated: Sequence[int]) -> int:
    """Inputs that share one of `scale` [N, groups], -1 for all; ValueError where that is none of the `stated` sizes."""
    uneven = scale[1] == 0 or columns % scale[1] != 0
    group = -1 if uneven or (scale[1] == 1 and columns not in stated) else columns // scale[1]
    if uneven or (stated and group not in stated):
        wanted = [f"{1 if size == -1 else columns / size:g} for {_groups(size)}" for size in dict.fromkeys(stated)]
        expected = " or ".join(wanted) or f"a divisor of {columns}"
        raise ValueError(f"the scale is {list(scale)}; expected in a row of {columns} inputs {expected}")
    return group


def _groups(size: int) -> str:
    return "the whole row" if size == -1 else f"groups of {size}"


def scale_dtype_of(info: TensorInfo, name: str) -> torch.dtype:
    if info.dtype not in SCALE_DTYPES:
        raise ValueError(f"{name} is of type {info.dtype}; expected {', '.join(SCALE_DTYPES)}")
    return SCALE_DTYPES[info.dtype]


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 words [..., n] -> int32 unsigned values [..., n * 32/bits], lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=packed.device)
    return ((packed[..., None] >> shifts) & (2**bits - 1)).flatten(-2)


def dequantise(
    packed: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, bits: int, dtype: torch.dtype
) -> torch.Tensor:
    """W = (q - zero) * scale.

    Args:
        packed: int32 [..., N, K*bits/32]. scale: [..., N, groups].
        zero_point: uint8 [..., N, groups], or None for 2^(bits-1).

    Returns:
        [..., N, K] in `dtype`.
    """
    columns = packed.shape[-1] * 32 // bits
    group = columns // scale.shape[-1]
    zeros = None if zero_point is None else zero_point.flatten(0, -2)

    def decode(words: torch.Tensor, piece: slice) -> torch.Tensor:
        q = unpack(words, bits)
        if zeros is None:
            return q - 2 ** (bits - 1)
        return (q.unflatten(-1, (-1, group)) - zeros[piece, :, None].int()).flatten(-2)

    return dense.dequantise(packed, scale, decode, columns=columns, group=group, rounded_to=scale.dtype, dtype=dtype)
