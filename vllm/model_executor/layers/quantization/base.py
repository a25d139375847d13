"""What every weight format implements.

A scheme holds a matrix W [rows, columns] (a linear layer), or a stack of them [E, rows, columns] (experts), in parameters that it
registers on the layer under a prefix: "" for a linear layer, "w13_" and "w2_" for experts. It says which checkpoint tensors fill
them, may repack them once after loading, and multiplies with them or hands out dense copies.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from vllm.config.quantization import WeightFormat
from vllm.model_executor.layers.ops.quantised_gemm import has_kernels, quantised_linear
from vllm.model_executor.layers.ops.rms_norm import Unnormed, normed
from vllm.model_executor.parameter import Slot, Source


@dataclass(frozen=True)
class TensorInfo:
    """A checkpoint tensor as its file's header describes it."""

    dtype: str  # safetensors' name: "BF16", "F8_E4M3", ...
    shape: tuple[int, ...]
    file: str = field(default="", compare=False)


@dataclass(frozen=True)
class KernelWeight:
    """A matrix W [N, K], or a stack of them [E, N, K], as the GEMM kernels read it: W[n, k] = (q[n, k] - zero) * scale * row_scale.

    `scale` and `zero` hold one number for `scale_rows` x `group` elements: that of W[n, k] is [..., n // scale_rows, k // group].
    Neither N nor K has to be a multiple of these: the last block may be cut.
    """

    kind: str
    """How `values` stores q: "plain" (16-bit floats [..., N, K]), "int4" and "int8" (int32 words [..., N, K*bits/32], element k in
    bits (k mod 32/bits)*bits of word k // (32/bits)), "fp8" (e4m3 [..., N, K]), "fp4" (uint8 [..., N, K/2], e2m1, even k low)."""
    values: torch.Tensor
    scale: torch.Tensor | None = (
        None  # [..., ceil(N / scale_rows), ceil(K / group)], 16 or 32 bits, or e4m3 for fp4; None for "plain"
    )
    zero: torch.Tensor | None = None  # uint8, scale's shape; None: 8 for int4, 128 for int8, 0 for floats
    group: int = 0
    scale_rows: int = 1
    row_scale: torch.Tensor | None = None  # float32 [..., N], fp4 only: a further factor of every row; None: 1
    quantize_inputs: bool = False
    """The format was made for inputs in fp8 too, with one scale a token (and a group, where weights have groups). A kernel may do
    that where it is faster; inputs in 16 bits are more exact."""


class WeightScheme(ABC):
    """One format, with what is constant over a module (bits, group size). Equal schemes can share one fused matrix."""

    all_is_view = False
    """Whether `all` costs nothing, so that there is no reason to `select`."""

    @classmethod
    @abstractmethod
    def from_tensors(
        cls, tensors: dict[str, TensorInfo], columns: int, stated: Sequence[WeightFormat] = ()
    ) -> WeightScheme | None:
        """The scheme of a checkpoint module that has these tensors (name after the module's -> header) and `columns` inputs.

        Args:
            stated: what the checkpoint's config says of its modules, this module's own format first.

        None where this is another format. Raises ValueError for a variant of this format that cannot be read, or tensors that no
        format in `stated` explains.
        """

    @classmethod
    @abstractmethod
    def from_format(cls, stated: WeightFormat | None) -> WeightScheme | None:
        """The scheme that a config describes, where there are no tensors (None: plain weights); None where it is another's."""

    @abstractmethod
    def create(
        self, layer: nn.Module, prefix: str, stack: tuple[int, ...], rows: int, columns: int, dtype: torch.dtype
    ) -> None:
        """Register the parameters of a matrix [*stack, rows, columns] that computes in `dtype`."""

    @abstractmethod
    def slots(
        self, layer: nn.Module, prefix: str, source: Source, columns: int, take: slice, stack: tuple[int, ...] = ()
    ) -> Iterator[Slot]:
        """Slots of one checkpoint module.

        Args:
            source: the module, and the rows it fills.
            columns: input features of the checkpoint's matrix, all ranks together.
            take: which of them this rank holds.
            stack: index of the matrix in the stack.
        """

    @abstractmethod
    def all(self, layer: nn.Module, prefix: str = "", rows: slice = slice(None)) -> torch.Tensor:
        """Dense [*stack, rows, columns] in the layer's compute dtype."""

    @abstractmethod
    def select(self, layer: nn.Module, prefix: str, index: torch.Tensor | slice) -> torch.Tensor:
        """Dense matrices [n, rows, columns] of the experts `index` ([n], or a run of n), without waiting for the device."""

    def kernel_weight(self, layer: nn.Module, prefix: str = "", rows: slice = slice(None)) -> KernelWeight | None:
        """The parameters as kernels read them, views of `rows`; None where no kernel reads this format: then dense copies serve."""
        return None

    def apply(self, layer: nn.Module, x: torch.Tensor | Unnormed, rows: slice = slice(None)) -> torch.Tensor:
        """x [..., columns] @ W[rows]ᵀ -> [..., rows]; PyTorch makes dense copies of W only where no kernel reads the format."""
        x = normed(x)
        weight = self.kernel_weight(layer, "", rows) if has_kernels(x) else None
        y = None if weight is None else quantised_linear(x, weight)
        return F.linear(x, self.all(layer, "", rows)) if y is None else y

    def add(self, layer: nn.Module, x: torch.Tensor, total: torch.Tensor) -> None:
        """total [..., rows] += x [..., columns] @ Wᵀ, rounded in between."""
        total += self.apply(layer, x)

    def process(self, layer: nn.Module, prefix: str = "") -> None:  # noqa: B027 (most formats have nothing to do)
        """Called once when all parameters are filled: repack them for the kernels."""

    @abstractmethod
    def fill_dummy(self, layer: nn.Module, prefix: str, std: float, generator: torch.Generator) -> None:
        """Random weights of roughly this standard deviation, made where the parameters are."""


def take_rows(tensor: torch.Tensor, take: slice | torch.Tensor) -> torch.Tensor:
    """Rows of a checkpoint tensor; a view where `take` is a slice."""
    return tensor[take] if isinstance(take, slice) else tensor.index_select(0, take.to(tensor.device))


def take_columns(width: int, columns: int, take: slice) -> slice:
    """Which of `width` words or scales of a row belong to the inputs `take` of `columns`: their share, or the one that all have."""
    first, last, _ = take.indices(columns)
    return slice(first * width // columns, -(-last * width // columns)) if width > 1 else slice(None)


def matrix_shape(tensors: dict[str, TensorInfo], name: str) -> tuple[int, int]:
    """Shape of a module's tensor that must be there and be a matrix (ValueError otherwise)."""
    if name not in tensors:
        raise ValueError(f"{name} is missing; it has {', '.join(sorted(tensors))}")
    if len(tensors[name].shape) != 2:
        raise ValueError(f"{name} is {list(tensors[name].shape)}; expected a matrix")
    return tensors[name].shape
