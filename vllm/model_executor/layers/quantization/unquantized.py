"""Plain weights: `weight` [rows, columns], or for experts a stack of them, in the model's dtype."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from vllm.config.quantization import WeightFormat
from vllm.model_executor.layers.ops.rms_norm import Unnormed
from vllm.model_executor.layers.ops.skinny_gemm import skinny_gemm, skinny_gemm_add
from vllm.model_executor.layers.quantization.base import KernelWeight, TensorInfo, WeightScheme, take_rows
from vllm.model_executor.parameter import Slot, Source, empty_parameter

PLAIN_DTYPES = ("F32", "BF16", "F16")


@dataclass(frozen=True)
class Unquantized(WeightScheme):
    all_is_view = True

    def __str__(self) -> str:
        return "plain"

    @classmethod
    def from_tensors(
        cls, tensors: dict[str, TensorInfo], columns: int, stated: Sequence[WeightFormat] = ()
    ) -> Unquantized | None:
        plain = set(tensors) <= {"weight", "bias"} and all(t.dtype in PLAIN_DTYPES for t in tensors.values())
        return cls() if plain else None

    @classmethod
    def from_format(cls, stated: WeightFormat | None) -> Unquantized | None:
        return cls() if stated is None else None

    def create(
        self, layer: nn.Module, prefix: str, stack: tuple[int, ...], rows: int, columns: int, dtype: torch.dtype
    ) -> None:
        layer.register_parameter(f"{prefix}weight", empty_parameter(*stack, rows, columns, dtype=dtype))

    def slots(
        self, layer: nn.Module, prefix: str, source: Source, columns: int, take: slice, stack: tuple[int, ...] = ()
    ) -> Iterator[Slot]:
        yield Slot(
            name=f"{source.name}.weight",
            shape=(source.rows, columns),
            param=getattr(layer, f"{prefix}weight"),
            region=(*stack, source.put),
            transform=lambda w: take_rows(w[:, take], source.take),
        )

    def all(self, layer: nn.Module, prefix: str = "", rows: slice = slice(None)) -> torch.Tensor:
        return getattr(layer, f"{prefix}weight")[..., rows, :]

    def select(self, layer: nn.Module, prefix: str, index: torch.Tensor | slice) -> torch.Tensor:
        return getattr(layer, f"{prefix}weight")[index]

    def kernel_weight(self, layer: nn.Module, prefix: str = "", rows: slice = slice(None)) -> KernelWeight:
        return KernelWeight("plain", self.all(layer, prefix, rows))

    def apply(self, layer: nn.Module, x: torch.Tensor | Unnormed, rows: slice = slice(None)) -> torch.Tensor:
        return skinny_gemm(x, self.all(layer, "", rows))

    def add(self, layer: nn.Module, x: torch.Tensor, total: torch.Tensor) -> None:
        skinny_gemm_add(x, self.all(layer), total)

    def fill_dummy(self, layer: nn.Module, prefix: str, std: float, generator: torch.Generator) -> None:
        getattr(layer, f"{prefix}weight").normal_(0.0, std, generator=generator)
