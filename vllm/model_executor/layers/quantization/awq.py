"""AutoAWQ's four-bit integers (its `gemm` version), put in order once as they are loaded.

A checkpoint module of N outputs and K inputs has, with inputs first,

    qweight  int32 [K, N/8]    nibble i (bits 4i) of word c belongs to output 8c + ORDER[i]
    qzeros   int32 [K/g, N/8]  the same way
    scales   float16 [K/g, N]

and stands for W[n, k] = (q - z) * s, rounded to float16. What is kept is what `compressed_tensors_wna16` keeps, so kernels know one
layout of four-bit integers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from vllm.config.quantization import AWQ, WeightFormat
from vllm.model_executor.layers.quantization.base import TensorInfo, matrix_shape, take_columns, take_rows
from vllm.model_executor.layers.quantization.compressed_tensors_wna16 import (
    CompressedTensorsWNA16,
    group_of,
    scale_dtype_of,
)
from vllm.model_executor.parameter import Slot, Source

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_NIBBLE_OF = [ORDER.index(column) for column in range(8)]
_TENSORS = {"qweight", "qzeros", "scales", "bias"}
PIECE = 1 << 21  # elements put in order at once: they take some five bytes each meanwhile


@dataclass(frozen=True)
class Awq(CompressedTensorsWNA16):
    def __str__(self) -> str:
        return f"AutoAWQ {super().__str__()}"

    @classmethod
    def from_tensors(
        cls, tensors: dict[str, TensorInfo], columns: int, stated: Sequence[WeightFormat] = ()
    ) -> Awq | None:
        if "qweight" not in tensors:
            return None
        if unknown := sorted(set(tensors) - _TENSORS):
            raise ValueError(f"AutoAWQ weights with {', '.join(unknown)} cannot be read")
        packed, scale, _ = (matrix_shape(tensors, name) for name in ("qweight", "scales", "qzeros"))
        if packed[0] != columns or scale[1] != 8 * packed[1]:
            raise ValueError(
                f"qweight is {list(packed)} beside scales {list(scale)}; expected [{columns}, {scale[1]} / 8]"
            )
        group = group_of((scale[1], scale[0]), columns, [form.group for form in stated if form.name == AWQ])
        return cls(4, group, False, scale_dtype_of(tensors["scales"], "scales"))

    @classmethod
    def from_format(cls, stated: WeightFormat | None) -> Awq | None:
        return cls(4, stated.group, False, torch.float16) if stated is not None and stated.name == AWQ else None

    def slots(
        self, layer: nn.Module, prefix: str, source: Source, columns: int, take: slice, stack: tuple[int, ...] = ()
    ) -> Iterator[Slot]:
        if source.rows % 8:
            raise ValueError(f"{source.name}: {source.rows} outputs cannot be packed in words of 8")
        groups, words = 1 if self.group_size == -1 else columns // self.group_size, source.rows // 8
        own = take_columns(groups, columns, take)

        def slot(theirs: str, ours: str, shape: tuple[int, ...], transform) -> Slot:
            param = getattr(layer, f"{prefix}{ours}")
            return Slot(f"{source.name}.{theirs}", shape, param, (*stack, source.put), transform, on_device=True)

        yield slot("qweight", "weight_packed", (columns, words), lambda q: take_rows(repack(q[take]), source.take))
        yield slot("qzeros", "weight_zero_point", (groups, words), lambda z: take_rows(nibbles(z[own]).T, source.take))
        yield slot("scales", "weight_scale", (groups, source.rows), lambda s: take_rows(s[own].T, source.take))


def nibbles(packed: torch.Tensor) -> torch.Tensor:
    """AutoAWQ's words int32 [R, N/8] -> uint8 [R, N], outputs in their own order."""
    words = packed.contiguous().view(torch.uint8).unflatten(-1, (-1, 4))  # [R, N/8, 4], lowest byte first
    spread = torch.stack([words & 15, words >> 4], dim=-1).flatten(-2)  # [R, N/8, 8]
    return spread[..., _NIBBLE_OF].flatten(-2)


def repack(packed: torch.Tensor) -> torch.Tensor:
    """AutoAWQ's words int32 [K, N/8] -> int32 [N, K/8], input k in bits 4 (k mod 8) of word k // 8."""
    K, N = packed.shape[0], 8 * packed.shape[1]
    out = torch.empty(N, K // 8, dtype=torch.int32, device=packed.device)
    step = max(1, PIECE // (8 * K))  # words of outputs at once
    for begin in range(0, packed.shape[1], step):
        q = nibbles(packed[:, begin : begin + step]).T.contiguous()  # [n, K]
        out[8 * begin : 8 * (begin + step)] = (q[:, ::2] | q[:, 1::2] << 4).view(torch.int32)
    return out
