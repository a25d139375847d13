"""Rotary position embedding: each position turns pairs of a head's features by angles that grow with the position.

Feature j of the first half of the rotary part pairs with feature j of its second half; frequency j is theta^(-2j / rotary_dim).
Features past the rotary part pass unchanged. With three position axes (time, height, width) each frequency follows one axis,
interleaved: j mod 3 = 1 follows height and j mod 3 = 2 width, as far as their sections reach; the others follow time.
Source: "RoFormer", arXiv 2104.09864; "Qwen3-VL Technical Report", arXiv 2511.21631, for the interleaved axes.
"""

from __future__ import annotations

import torch
from torch import nn

from vllm.model_executor.layers.ops.attention_torch import apply_rotary


class RotaryEmbedding(nn.Module):
    """Angles of positions, and the turn itself.

    Args:
        head_size: features of a head.
        rotary_dim: how many of them turn, from the first on.
        base: theta.
        mrope_section: frequencies that follow (time, height, width); () for positions of one axis.
    """

    def __init__(self, head_size: int, rotary_dim: int, base: float, mrope_section: tuple[int, ...] = ()) -> None:
        super().__init__()
        if rotary_dim % 2 or rotary_dim > head_size:
            raise ValueError(f"rotary_dim must be even and at most head_size {head_size}; got {rotary_dim}")
        if mrope_section and sum(mrope_section) != rotary_dim // 2:
            raise ValueError(f"mrope_section {mrope_section} must add up to rotary_dim / 2 = {rotary_dim // 2}")
        self.head_size, self.rotary_dim, self.mrope_section = head_size, rotary_dim, mrope_section
        j = torch.arange(0, rotary_dim, 2, dtype=torch.int64, device="cpu")
        self.register_buffer("inv_freq", 1.0 / base ** (j.float() / rotary_dim), persistent=False)
        self.register_buffer("axis", torch.tensor(_axis_of(rotary_dim // 2, mrope_section), device="cpu"), False)

    def cos_sin(self, positions: torch.Tensor) -> torch.Tensor:
        """Cosines and sines [T, rotary_dim] float32, [cos | sin], of positions [T] or [3, T]."""
        if positions.dim() == 2:
            positions = positions[self.axis].T  # [T, rotary_dim/2]: each frequency's own axis
        else:
            positions = positions[:, None]
        angle = positions.float() * self.inv_freq
        return torch.cat([angle.cos(), angle.sin()], dim=-1)

    def forward(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Turn query and key, each [T, H, head_size] or [T, H * head_size], to their positions [T] or [3, T]."""
        cos_sin = self.cos_sin(positions)
        return self._turn(query, cos_sin), self._turn(key, cos_sin)

    def _turn(self, x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
        return apply_rotary(x.unflatten(-1, (-1, self.head_size)).flatten(1, -2), cos_sin).view(x.shape)


def _axis_of(num_frequencies: int, section: tuple[int, ...]) -> list[int]:
    """Axis (0 time, 1 height, 2 width) of each frequency."""
    axes = [0] * num_frequencies
    for axis in (1, 2) if section else ():
        for j in range(axis, min(3 * section[axis], num_frequencies), 3):
            axes[j] = axis
    return axes


def get_rope(
    head_size: int,
    rotary_dim: int | None = None,
    max_position: int | None = None,
    base: float = 10000.0,
    mrope_section: tuple[int, ...] = (),
) -> RotaryEmbedding:
    """The rotary embedding of a model. `max_position` is accepted for its callers' sake: angles are computed, not tabulated."""
    return RotaryEmbedding(head_size, rotary_dim or head_size, base, mrope_section)
