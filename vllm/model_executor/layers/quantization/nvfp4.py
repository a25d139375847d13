"""Weights in four-bit floats (e2m1) in groups of 16: compressed-tensors' `nvfp4-pack-quantized`, weights only.

A checkpoint module has

    weight_packed        uint8 [N, K/2]   two codes a byte, the even column in the low half; a code is sign << 3 | index of its size
    weight_scale         e4m3 [N, K/16]
    weight_global_scale  float32 [1]      448 * 6 / the largest weight
    input_global_scale   float32 [1]      for inputs in four bits; not read

and stands for W = size(code) * (weight_scale / weight_global_scale), in float32, rounded to bfloat16 by the format's decompressor.
Inputs keep their precision: that is nearer to the model that was quantised, on every device, than four-bit inputs are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from vllm.config.quantization import NVFP4, WeightFormat
from vllm.model_executor.layers.quantization.base import (
    KernelWeight,
    TensorInfo,
    WeightScheme,
    matrix_shape,
    take_columns,
    take_rows,
)
from vllm.model_executor.layers.quantization.dense import dequantise
from vllm.model_executor.parameter import Slot, Source, empty_parameter
from vllm.utils.torch_utils import kept

SIZES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
GROUP = 16
_DUMMY_STD = (2 * sum(x * x for x in SIZES) / 16) ** 0.5
_OPTIONAL = {"input_global_scale", "bias"}


@dataclass(frozen=True)
class NvFp4(WeightScheme):
    def __str__(self) -> str:
        return f"fp4, groups of {GROUP}"

    @classmethod
    def from_tensors(
        cls, tensors: dict[str, TensorInfo], columns: int, stated: Sequence[WeightFormat] = ()
    ) -> NvFp4 | None:
        if "weight_packed" not in tensors or tensors["weight_packed"].dtype != "U8":
            return None
        needed = {"weight_packed": columns // 2, "weight_scale": columns // GROUP}
        for name, width in needed.items():
            shape = matrix_shape(tensors, name)
            if shape[1] != width or columns % GROUP:
                raise ValueError(f"{name} is {list(shape)}; expected {columns} / {columns // width} = {width} columns")
        if "weight_global_scale" not in tensors:
            raise ValueError(f"weight_global_scale is missing; it has {', '.join(sorted(tensors))}")
        if unknown := sorted(set(tensors) - {*needed, "weight_global_scale"} - _OPTIONAL):
            raise ValueError(f"packed four-bit floats with {', '.join(unknown)} cannot be read")
        return cls()

    @classmethod
    def from_format(cls, stated: WeightFormat | None) -> NvFp4 | None:
        return cls() if stated is not None and stated.name == NVFP4 else None

    def create(
        self, layer: nn.Module, prefix: str, stack: tuple[int, ...], rows: int, columns: int, dtype: torch.dtype
    ) -> None:
        if columns % GROUP:
            raise ValueError(f"{columns} inputs cannot be held in groups of {GROUP}")
        packed = empty_parameter(*stack, rows, columns // 2, dtype=torch.uint8)
        scale = empty_parameter(*stack, rows, columns // GROUP, dtype=torch.float8_e4m3fn)
        layer.register_parameter(f"{prefix}weight_packed", packed)
        layer.register_parameter(f"{prefix}weight_scale", scale)
        # parts of a fused layer have scales of their own: one a row
        layer.register_parameter(f"{prefix}weight_global_scale", empty_parameter(*stack, rows, 1, dtype=torch.float32))
        layer.compute_dtype = dtype

    def slots(
        self, layer: nn.Module, prefix: str, source: Source, columns: int, take: slice, stack: tuple[int, ...] = ()
    ) -> Iterator[Slot]:
        region = (*stack, source.put)

        def slot(name: str, shape: tuple[int, ...], dtype: str, transform) -> Slot:
            param = getattr(layer, f"{prefix}{name}")
            return Slot(f"{source.name}.{name}", shape, param, region, transform, dtypes=(dtype,))

        def codes(w: torch.Tensor) -> torch.Tensor:
            return take_rows(w[:, take_columns(columns // 2, columns, take)], source.take)

        def scales(s: torch.Tensor) -> torch.Tensor:
            own = s[:, take_columns(columns // GROUP, columns, take)]
            return take_rows(own.view(torch.uint8), source.take).view(torch.float8_e4m3fn)

        yield slot("weight_packed", (source.rows, columns // 2), "U8", codes)
        yield slot("weight_scale", (source.rows, columns // GROUP), "F8_E4M3", scales)
        yield slot("weight_global_scale", (1,), "F32", lambda g: g.expand(source.num_put, 1))
        yield Slot(f"{source.name}.input_global_scale", (1,), None)

    def process(self, layer: nn.Module, prefix: str = "") -> None:
        # kernels multiply by the reciprocal
        row_scale = getattr(layer, f"{prefix}weight_global_scale").reciprocal()[..., 0]
        layer.register_parameter(f"{prefix}weight_row_scale", nn.Parameter(row_scale, requires_grad=False))

    def all(self, layer: nn.Module, prefix: str = "", rows: slice = slice(None)) -> torch.Tensor:
        return self._dense(layer, prefix, (..., rows, slice(None)))

    def select(self, layer: nn.Module, prefix: str, index: torch.Tensor | slice) -> torch.Tensor:
        return self._dense(layer, prefix, index)

    def kernel_weight(self, layer: nn.Module, prefix: str = "", rows: slice = slice(None)) -> KernelWeight:
        packed, scale = (getattr(layer, f"{prefix}{name}")[..., rows, :] for name in ("weight_packed", "weight_scale"))
        row_scale = getattr(layer, f"{prefix}weight_row_scale")[..., rows]
        return KernelWeight("fp4", packed, scale, group=GROUP, row_scale=row_scale)

    def _dense(self, layer: nn.Module, prefix: str, index) -> torch.Tensor:
        packed = getattr(layer, f"{prefix}weight_packed")[index]
        scale = getattr(layer, f"{prefix}weight_scale").view(torch.uint8)[index].view(torch.float8_e4m3fn)
        scale = scale.float() / getattr(layer, f"{prefix}weight_global_scale")[index]
        return dequantise(
            packed,
            scale,
            lambda codes, _: unpack(codes),
            columns=2 * packed.shape[-1],
            group=GROUP,
            rounded_to=torch.bfloat16,
            dtype=layer.compute_dtype,
        )

    def fill_dummy(self, layer: nn.Module, prefix: str, std: float, generator: torch.Generator) -> None:
        getattr(layer, f"{prefix}weight_packed").random_(0, 256, generator=generator)
        getattr(layer, f"{prefix}weight_scale").fill_(1.0)
        getattr(layer, f"{prefix}weight_global_scale").fill_(_DUMMY_STD / std)


@lru_cache
def _of_code(device: torch.device) -> torch.Tensor:
    """float32 [16]. Kept, because a CUDA graph cannot be captured over a copy from the host's list."""
    return kept(lambda device: torch.tensor([*SIZES, *(-x for x in SIZES)], device=device), device)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [..., n] -> float32 [..., 2n], the low half of a byte first."""
    return _of_code(packed.device)[torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2).int()]
