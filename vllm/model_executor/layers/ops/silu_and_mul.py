"""SwiGLU's middle, ``silu(gate) * up``, in one kernel where PyTorch launches two."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from vllm.model_executor.layers.fla.ops.device import overlaps_launches


@triton.jit
def _silu_and_mul_kernel(x, y, stride_x, I: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """BLOCK columns of one row."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at, inside = x + row * stride_x + column, column < I
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + I, mask=inside, other=0.0).to(tl.float32)
    # rounded twice, as PyTorch does in two steps
    activated = (gate / (1.0 + tl.exp(-gate))).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + row * I + column, (activated * up).to(y.dtype.element_ty), mask=inside)


def silu_and_mul_triton(x: torch.Tensor) -> torch.Tensor:
    """Triton form of :func:`silu_and_mul`."""
    I = x.shape[-1] // 2
    rows = x.reshape(-1, 2 * I)
    y = torch.empty(*x.shape[:-1], I, dtype=x.dtype, device=x.device)
    overlap = overlaps_launches(x.device)
    launch = {"launch_pdl": True} if overlap else {}
    block = min(1024, triton.next_power_of_2(I))
    grid = (rows.shape[0], triton.cdiv(I, block))
    _silu_and_mul_kernel[grid](rows, y, rows.stride(0), I=I, BLOCK=block, PDL=overlap, num_warps=4, **launch)
    return y


def silu_and_mul_torch(x: torch.Tensor) -> torch.Tensor:
    """PyTorch form of :func:`silu_and_mul`."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """``[gate | up] -> silu(gate) * up``: x ``[..., 2I]`` -> ``[..., I]`` in x's dtype, silu rounded to it too.

    torch.compile sees the PyTorch form, which it fuses by itself.
    """
    kernel = x.is_cuda and x.numel() > 0 and x.stride(-1) == 1 and not torch.compiler.is_compiling()
    return silu_and_mul_triton(x) if kernel else silu_and_mul_torch(x)
