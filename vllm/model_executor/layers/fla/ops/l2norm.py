"""L2 normalisation of rows: ``x / sqrt(sum(x**2) + eps)`` in float32."""

import torch
import triton
import triton.language as tl

from .naive import L2NORM_EPS, l2norm


@triton.jit(do_not_specialize=["rows"])
def _l2norm_kernel(x, y, rows, eps, D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr):
    r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    d = tl.arange(0, BD)
    at, inside = r[:, None] * D + d[None, :], (r[:, None] < rows) & (d[None, :] < D)
    # [BR, BD]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    norm = tl.rsqrt(tl.sum(value * value, axis=1) + eps)
    tl.store(y + at, (value * norm[:, None]).to(y.dtype.element_ty), mask=inside)


def plan_rows(D: int) -> dict[str, int]:
    """Tile of a kernel that handles whole rows: about 2048 elements a program."""
    BD = triton.next_power_of_2(D)
    return {"BR": max(1, 2048 // BD), "BD": BD, "num_warps": 4}


def l2norm_fwd_triton(
    x: torch.Tensor, eps: float = L2NORM_EPS, output_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Triton form of :func:`l2norm_fwd`."""
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    y = torch.empty(flat.shape, dtype=output_dtype or x.dtype, device=x.device)
    rows, D = flat.shape
    if rows:
        plan = plan_rows(D)
        _l2norm_kernel[(triton.cdiv(rows, plan["BR"]),)](flat, y, rows, eps, D, **plan)
    return y.view(x.shape)


def l2norm_fwd_torch(x: torch.Tensor, eps: float = L2NORM_EPS, output_dtype: torch.dtype | None = None) -> torch.Tensor:
    """PyTorch form of :func:`l2norm_fwd`."""
    return l2norm(x, eps).to(output_dtype or x.dtype)


def l2norm_fwd(x: torch.Tensor, eps: float = L2NORM_EPS, output_dtype: torch.dtype | None = None) -> torch.Tensor:
    """Normalise the last axis of ``x [..., D]`` to unit length, calculated in float32.

    Returns:
        A new tensor of x's shape in ``output_dtype`` (x's dtype by default).
    """
    form = l2norm_fwd_triton if x.is_cuda else l2norm_fwd_torch
    return form(x, eps, output_dtype)
