"""Integer weights in groups, 16-bit activations: compressed-tensors' `pack-quantized` format.

A checkpoint module has

    weight_packed      int32 [N, K*bits/32]  element k sits in bits (k mod 32/bits)*bits of word k // (32/bits), offset by 2^(bits-1)
    weight_scale       float [N, K/g]        one scale a group of g inputs
    weight_shape       int64 [2]             N, K
    weight_zero_point  int32 [N*bits/32, K/g], asymmetric checkpoints only; packed along N

and stands for W = (q - zero) * scale, where zero is 2^(bits-1) for symmetric ones. The product is taken in the scale's dtype, as the
format's own decompressor does, and then cast: the dense weight is bit for bit what a decompressed checkpoint holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vllm.model_executor.layers.quantization.base import KernelWeight, TensorInfo, WeightScheme, take_rows
from vllm.model_executor.parameter import Slot, Source, empty_parameter

_SCALE_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_TENSORS = {"weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "bias"}
_PIECE = 1 << 24  # elements dequantised at once: the integers in between take 4 bytes each


@dataclass(frozen=True)
class CompressedTensorsWNA16(WeightScheme):
    bits: int
    group_size: int  # -1: one scale a row
    symmetric: bool
    scale_dtype: torch.dtype | None  # None: the model's

    @property
    def per_word(self) -> int:
        return 32 // self.bits

    @classmethod
    def from_tensors(cls, tensors: dict[str, TensorInfo], columns: int) -> CompressedTensorsWNA16 | None:
        if "weight_packed" not in tensors or tensors["weight_packed"].dtype != "I32":
            return None
        if unknown := sorted(set(tensors) - _TENSORS):
            raise ValueError(f"packed integer weights with {', '.join(unknown)} cannot be read")
        if "weight_scale" not in tensors:
            raise ValueError("weight_packed without weight_scale")
        scale = tensors["weight_scale"]
        bits = 32 * tensors["weight_packed"].shape[-1] // columns
        if bits not in (4, 8) or scale.dtype not in _SCALE_DTYPES or columns % scale.shape[-1]:
            raise ValueError(
                f"weight_packed {tensors['weight_packed'].shape} with weight_scale {scale.dtype} {scale.shape} "
                f"is not 4 or 8 bits in groups of a matrix with {columns} columns"
            )
        group_size = columns // scale.shape[-1] if scale.shape[-1] > 1 else -1
        return cls(bits, group_size, "weight_zero_point" not in tensors, _SCALE_DTYPES[scale.dtype])

    @classmethod
    def from_config(cls, config: dict[str, Any] | None, group: dict[str, Any] | None) -> CompressedTensorsWNA16 | None:
        if config is None or group is None or config.get("quant_method") != "compressed-tensors":
            return None
        weights = group.get("weights") or {}
        packed = (group.get("format") or config.get("format")) == "pack-quantized" and weights.get("type") == "int"
        if not packed or weights.get("num_bits") not in (4, 8) or weights.get("strategy") not in ("group", "channel"):
            return None
        group_size = weights["group_size"] if weights["strategy"] == "group" else -1
        return cls(weights["num_bits"], group_size, weights.get("symmetric", True), None)

    def create(
        self, layer: nn.Module, prefix: str, stack: tuple[int, ...], rows: int, columns: int, dtype: torch.dtype
    ) -> None:
        group_size = columns if self.group_size == -1 else self.group_size
        if columns % group_size or columns % self.per_word:
            raise ValueError(f"{columns} columns cannot be held in groups of {group_size} and words of {self.per_word}")
        scale_dtype = self.scale_dtype or dtype
        packed = empty_parameter(*stack, rows, columns // self.per_word, dtype=torch.int32)
        scale = empty_parameter(*stack, rows, columns // group_size, dtype=scale_dtype)
        layer.register_parameter(f"{prefix}weight_packed", packed)
        layer.register_parameter(f"{prefix}weight_scale", scale)
        if not self.symmetric:
            zero_point = empty_parameter(*stack, rows, columns // group_size, dtype=torch.uint8)
            layer.register_parameter(f"{prefix}weight_zero_point", zero_point)
        layer.compute_dtype = dtype

    def slots(
        self, layer: nn.Module, prefix: str, source: Source, columns: int, take: slice, stack: tuple[int, ...] = ()
    ) -> Iterator[Slot]:
        first, last, _ = take.indices(columns)
        groups = 1 if self.group_size == -1 else columns // self.group_size

        def share(width: int) -> slice:
            return slice(first * width // columns, last * width // columns) if width > 1 else slice(None)

        def slot(name: str, shape: tuple[int, ...], transform) -> Slot:
            param = getattr(layer, f"{prefix}{name}")
            region = (*stack, source.put)
            return Slot(f"{source.name}.{name}", shape, param, region, transform)

        words = columns // self.per_word
        yield slot("weight_packed", (source.rows, words), lambda w: take_rows(w[:, share(words)], source.take))
        yield slot("weight_scale", (source.rows, groups), lambda s: take_rows(s[:, share(groups)], source.take))
        if not self.symmetric:
            yield slot(
                "weight_zero_point",
                (source.rows // self.per_word, groups),
                lambda z: take_rows(unpack(z.T, self.bits).T[:, share(groups)].to(torch.uint8), source.take),
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


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 words [..., n] -> int32 unsigned values [..., n * 32/bits], lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=packed.device)
    return ((packed[..., None] >> shifts) & (2**bits - 1)).flatten(-2)


def dequantise(
    packed: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, bits: int, dtype: torch.dtype
) -> torch.Tensor:
    """W = (q - zero) * scale, piece by piece of rows.

    Args:
        packed: int32 [..., N, K*bits/32]. scale: [..., N, groups].
        zero_point: uint8 [..., N, groups], or None for 2^(bits-1).

    Returns:
        [..., N, K] in `dtype`.
    """
    columns = packed.shape[-1] * 32 // bits
    out = torch.empty(*packed.shape[:-1], columns, dtype=dtype, device=packed.device)
    # [R, ...] with R all rows of all matrices
    flat_out, flat_packed, flat_scale = out.view(-1, columns), packed.flatten(0, -2), scale.flatten(0, -2)
    flat_zero = None if zero_point is None else zero_point.flatten(0, -2)
    step = max(1, _PIECE // columns)
    for begin in range(0, flat_out.shape[0], step):
        piece = slice(begin, begin + step)
        q = unpack(flat_packed[piece], bits).unflatten(-1, (scale.shape[-1], -1))  # [r, groups, g]
        q = q - (2 ** (bits - 1) if flat_zero is None else flat_zero[piece, :, None].int())
        flat_out[piece] = (q.to(scale.dtype) * flat_scale[piece, :, None]).flatten(-2)
    return out
