"""From stored numbers and their scales to dense weights, in pieces of bounded memory."""

from __future__ import annotations

from collections.abc import Callable

import torch

PIECE = 1 << 24  # elements at once: decoded they take 4 bytes each


def dequantise(
    values: torch.Tensor,
    scale: torch.Tensor,
    decode: Callable[[torch.Tensor, slice], torch.Tensor],
    *,
    columns: int,
    group: int,
    rounded_to: torch.dtype,
    dtype: torch.dtype,
) -> torch.Tensor:
    """W = decode(values) * scale. The product is taken in float32 and rounded to what the format's own decompressor returns.

    Args:
        values: [..., N, *]. scale: [..., N, G], G = ceil(columns / group).
        decode: some of all rows [R, *], and which they are -> float32 or integers [r, columns], zero points subtracted.
        rounded_to: dtype of the decompressor's weights.
        dtype: of the result.

    Returns:
        [..., N, columns].
    """
    out = torch.empty(*values.shape[:-1], columns, dtype=dtype, device=values.device)
    # [R, ...] with R all rows of all matrices
    flat_out, flat_values, flat_scale = out.view(-1, columns), values.flatten(0, -2), scale.flatten(0, -2)
    step = max(1, PIECE // columns)
    for begin in range(0, flat_out.shape[0], step):
        piece = slice(begin, begin + step)
        q, s = decode(flat_values[piece], piece).float(), flat_scale[piece].float()
        if columns % group:
            w = q * s.repeat_interleave(group, dim=-1)[:, :columns]
        else:
            w = (q.unflatten(-1, (-1, group)) * s[..., None]).flatten(-2)
        flat_out[piece] = w.to(rounded_to)
    return out


def expand_rows(blocks: torch.Tensor, scale_rows: int, rows: int) -> torch.Tensor:
    """[..., ceil(rows / scale_rows), G] -> [..., rows, G], every block's scale for each of its rows."""
    return blocks if scale_rows == 1 else blocks.repeat_interleave(scale_rows, dim=-2)[..., :rows, :]
