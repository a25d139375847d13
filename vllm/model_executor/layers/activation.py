"""Activations between linear layers."""

from __future__ import annotations

import torch
from torch import nn

from vllm.model_executor.layers.ops.silu_and_mul import silu_and_mul


class SiluAndMul(nn.Module):
    """SwiGLU's middle: [gate | up] -> silu(gate) * up."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., 2I] -> [..., I]."""
        return silu_and_mul(x)
