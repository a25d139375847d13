"""Log decay and write strength of the gated delta rule for whole batches of tokens, as one elementwise launch."""

import torch
import triton
import triton.language as tl

from .device import softplus
from .naive import gating


@triton.jit(do_not_specialize=["rows"])
def _gating_kernel(
    A_log,
    dt_bias,
    a,
    b,
    g,
    strength,
    rows,
    stride_a,
    stride_b,
    beta,
    threshold,
    H: tl.constexpr,
    BR: tl.constexpr,
    BH: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    h = tl.arange(0, BH)
    inside = (r[:, None] < rows) & (h[None, :] < H)
    # [BH]
    decay = tl.exp(tl.load(A_log + h, mask=h < H, other=0.0).to(tl.float32))
    bias = tl.load(dt_bias + h, mask=h < H, other=0.0).to(tl.float32)
    # [BR, BH]
    x = tl.load(a + r[:, None] * stride_a + h[None, :], mask=inside, other=0.0).to(tl.float32) + bias[None, :]
    y = tl.load(b + r[:, None] * stride_b + h[None, :], mask=inside, other=0.0).to(tl.float32)
    at = r[:, None] * H + h[None, :]
    tl.store(g + at, -decay[None, :] * softplus(x, beta, threshold), mask=inside)
    tl.store(strength + at, tl.sigmoid(y), mask=inside)


def fused_gdn_gating_triton(
    A_log: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    dt_bias: torch.Tensor,
    beta: float = 1.0,
    threshold: float = 20.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Triton form of :func:`fused_gdn_gating`."""
    T, H = a.shape
    a, b = (x if x.stride(-1) == 1 else x.contiguous() for x in (a, b))
    g, strength = (torch.empty(1, T, H, dtype=torch.float32, device=a.device) for _ in range(2))
    if T:
        BH = triton.next_power_of_2(H)
        BR = max(1, 1024 // BH)
        grid = (triton.cdiv(T, BR),)
        _gating_kernel[grid](
            A_log,
            dt_bias,
            a,
            b,
            g,
            strength,
            T,
            a.stride(0),
            b.stride(0),
            float(beta),
            float(threshold),
            H,
            BR,
            BH,
            num_warps=4,
        )
    return g, strength


def fused_gdn_gating_torch(
    A_log: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    dt_bias: torch.Tensor,
    beta: float = 1.0,
    threshold: float = 20.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """PyTorch form of :func:`fused_gdn_gating`."""
    g, strength = gating(a, b, A_log, dt_bias, beta, threshold)
    return g[None], strength[None]


def fused_gdn_gating(
    A_log: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    dt_bias: torch.Tensor,
    beta: float = 1.0,
    threshold: float = 20.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``g = -exp(A_log) * softplus(a + dt_bias)`` and ``sigmoid(b)``, both in float32.

    Args:
        A_log, dt_bias: ``[Hv]``. a, b: ``[T, Hv]``, any row stride.
        beta, threshold: of softplus, which is linear where ``beta * x > threshold``.

    Returns:
        ``(g, strength)``, float32 ``[1, T, Hv]``: the g and beta arguments of the delta rule functions.
    """
    if a.shape != b.shape or a.dim() != 2 or A_log.shape != a.shape[1:] or dt_bias.shape != a.shape[1:]:
        shapes = [tuple(x.shape) for x in (a, b, A_log, dt_bias)]
        raise ValueError(f"a and b must be [T, Hv], A_log and dt_bias [Hv], got {shapes}")
    form = fused_gdn_gating_triton if a.is_cuda else fused_gdn_gating_torch
    return form(A_log, a, b, dt_bias, beta, threshold)
