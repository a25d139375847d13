"""RMS norms, computed in float32 whatever the activations' dtype.

The kernels of csrc/ do the same in one launch where they are built; a layer asks for them once, when its weights are loaded.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from vllm import _custom_ops
from vllm.model_executor.layers.fla.ops import rmsnorm_gated
from vllm.model_executor.layers.ops.rms_norm import Unnormed, rms_norm, rms_norm_torch
from vllm.model_executor.parameter import Slot, empty_parameter


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x²) + eps) * w, over the last dimension.

    Args:
        prefix: the checkpoint module.
        dtype: of the weight.
    """

    neutral = 1.0
    """The weight that leaves a normalised input alone."""
    plus_one = False
    """Whether the factor is 1 + weight rather than weight."""

    def __init__(
        self, hidden_size: int, eps: float = 1e-6, *, prefix: str = "", dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.prefix, self.eps = prefix, eps
        self.weight = empty_parameter(hidden_size, dtype=dtype)
        self.weight.fill_(self.neutral)
        self.use_kernels = False

    def checkpoint_slots(self) -> Iterator[Slot]:
        yield Slot(f"{self.prefix}.weight", tuple(self.weight.shape), self.weight)

    def fill_dummy(self, generator: torch.Generator) -> None:
        self.weight.normal_(self.neutral, 0.02, generator=generator)

    def process_weights_after_loading(self) -> None:
        self.use_kernels = _custom_ops.available(self.weight.device)

    def forward(
        self, x: torch.Tensor | None, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor | Unnormed, torch.Tensor]:
        """Normalise x [..., hidden_size].

        With a residual, x is added to it first: returns (normed, new residual); both arguments may be overwritten with them. Where x is
        None, it has been added before, and the residual's rows come back still to be normalised.
        Without, returns normed alone.
        """
        if residual is None:
            return self._norm(x)
        if x is None:
            return Unnormed(residual, self.weight, self.eps, self.plus_one), residual
        if self.use_kernels:
            _custom_ops.fused_add_rms_norm(x, residual, self.weight, self.eps, self.plus_one)
            return x, residual
        residual = residual + x
        return self._norm(residual), residual

    def _norm(self, x: torch.Tensor) -> torch.Tensor:
        form = rms_norm if self.use_kernels else rms_norm_torch
        return form(x, self.weight, self.eps, self.plus_one)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


class GemmaRMSNorm(RMSNorm):
    """RMSNorm whose weight is stored as its distance from one: y = x / sqrt(mean(x²) + eps) * (1 + w)."""

    neutral = 0.0
    plus_one = True


class RMSNormGated(RMSNorm):
    """The delta rule's output norm: y = x / sqrt(mean(x²) + eps) * w * act(z).

    Args:
        activation: of the gate, "silu" (or its other name "swish") or "sigmoid".
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        *,
        activation: str = "silu",
        prefix: str = "",
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, eps, prefix=prefix, dtype=dtype)
        self.activation = activation

    def forward(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """x and its gate z, both [..., hidden_size] -> the same shape, in x's dtype."""
        return rmsnorm_gated(x, self.weight, z, self.eps, self.activation)
