"""RMS norm over the last dimension, y = x / sqrt(mean(x²) + eps) * w, and rows that are still to be normalised.

A norm of a few rows takes as long as its launch. A kernel that multiplies the rows can normalise what it reads instead: it gets them as
`Unnormed`, and whoever cannot calls `normed`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm import _custom_ops as ops


@dataclass(frozen=True)
class Unnormed:
    """Rows before a norm, and the norm. They have to be read before they are added to."""

    rows: torch.Tensor  # [..., D]
    weight: torch.Tensor  # [D]
    eps: float
    plus_one: bool
    """Whether the factor is 1 + weight rather than weight."""

    @property
    def shape(self) -> torch.Size:
        return self.rows.shape


def rows_of(x: torch.Tensor | Unnormed) -> torch.Tensor:
    """The rows as they lie in memory, normalised or not: for shapes, dtype and device."""
    return x.rows if isinstance(x, Unnormed) else x


def normed(x: torch.Tensor | Unnormed) -> torch.Tensor:
    """The normalised rows, by a kernel of their own where that is still to be done."""
    return rms_norm(x.rows, x.weight, x.eps, x.plus_one) if isinstance(x, Unnormed) else x


def rms_norm_torch(x: torch.Tensor, weight: torch.Tensor, eps: float, plus_one: bool = False) -> torch.Tensor:
    """PyTorch form of :func:`rms_norm`."""
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    scale = 1.0 + weight.float() if plus_one else weight.float()
    return (y * scale).to(x.dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, plus_one: bool = False) -> torch.Tensor:
    """x [..., D] normalised and times weight [D], or 1 + weight; float32 inside, x's dtype outside."""
    if not ops.available(x.device):
        return rms_norm_torch(x, weight, eps, plus_one)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    ops.rms_norm(out, x, weight, eps, plus_one)
    return out
