"""``y = x Wᵀ`` for a few rows of x: a decode step's projections, which take as long as their weights take to arrive.

cuBLAS reaches about two thirds of the memory bandwidth on such shapes. Here every program streams some rows of W, through registers for
one row of x and through shared memory for more, with many loads in flight. The launch overlaps the end of the kernel before: the first
weights are on their way while that one still writes x.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from vllm.model_executor.layers.fla.ops.device import dot, multiprocessors, overlaps_launches

MAX_ROWS = 32
"""Rows of x up to which :func:`skinny_gemm` takes its kernel."""


@triton.jit
def _vector_kernel(
    x,
    weight,
    y,
    N,
    stride_w,
    D: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PDL: tl.constexpr,
):
    """BN outputs of one row: sums along D in float32."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    d = tl.arange(0, BK)
    # rows past the end repeat the last one, so that loads need no mask
    at_w = weight + tl.minimum(n, N - 1).to(tl.int64)[:, None] * stride_w + d[None, :]
    # [BN, BK]
    w = tl.load(at_w, mask=(d < D)[None, :], other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros([BN, BK], tl.float32)
    for i in tl.static_range(0, D, BK):
        ahead = w
        if i + BK < D:
            ahead = tl.load(at_w + (i + BK), mask=(d + (i + BK) < D)[None, :], other=0.0)
        x_i = tl.load(x + i + d, mask=d + i < D, other=0.0).to(tl.float32)
        acc += w.to(tl.float32) * x_i[None, :]
        w = ahead
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tl.store(y + n, tl.sum(acc, axis=1).to(y.dtype.element_ty), mask=n < N)


@triton.jit
def _rows_kernel(
    x,
    weight,
    y,
    M,
    N,
    stride_x,
    stride_w,
    stride_y,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PDL: tl.constexpr,
):
    """BN columns of y for all rows: W is the left operand, whose tile may be tall while x has few rows."""
    m, n = tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN)
    d = tl.arange(0, BK)
    # lanes past the end repeat the last row, so that loads need no mask
    at_w = weight + tl.minimum(n, N - 1).to(tl.int64)[:, None] * stride_w + d[None, :]
    at_x = x + tl.minimum(m, M - 1).to(tl.int64)[:, None] * stride_x + d[None, :]
    # [BN, BK], the first tile on its way before x is known
    w = tl.load(at_w)
    if PDL:
        tl.extra.cuda.gdc_wait()
    # [BN, BM]
    acc = dot(w, tl.trans(tl.load(at_x)))
    for i in range(BK, D, BK):
        acc += dot(tl.load(at_w + i), tl.trans(tl.load(at_x + i)))
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    at_y = y + m[None, :].to(tl.int64) * stride_y + n[:, None]
    tl.store(at_y, acc.to(y.dtype.element_ty), mask=(m < M)[None, :] & (n < N)[:, None])


def plan_skinny_gemm(M: int, N: int, D: int, multiprocessors: int) -> dict[str, int] | None:
    """Tile of one launch, or None where the kernels do not fit: too many rows, or a D that no tile divides.

    Args:
        M, N: rows of x and of the weight. D: columns of both.
    """
    if not 1 <= M <= MAX_ROWS or D % 64:
        return None
    # measured on an H200 (benchmarks/results/gdn_in_proj_h200.json): whole rows for one row of x; for more, cache lines of many rows
    if M == 1:
        return {"BN": 4, "BK": min(2048, triton.next_power_of_2(D)), "num_warps": 4}
    return {"BM": max(8, triton.next_power_of_2(M)), "BN": 64, "BK": 64, "num_warps": 4, "num_stages": 6}


def fits_skinny_gemm(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the kernels take these tensors; everything else is cuBLAS's."""
    N, D = weight.shape
    alike = x.dtype == weight.dtype and x.dtype in (torch.bfloat16, torch.float16)
    aligned = weight.stride(1) == 1 and x.stride(-1) == 1 and weight.stride(0) % 8 == 0
    rows = x.numel() // max(1, D)
    return alike and aligned and plan_skinny_gemm(rows, N, D, multiprocessors(x.device)) is not None


def skinny_gemm_triton(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Triton form of :func:`skinny_gemm`."""
    N, D = weight.shape
    rows = x.reshape(-1, D)
    M = rows.shape[0]
    plan = plan_skinny_gemm(M, N, D, multiprocessors(x.device))
    if plan is None or weight.stride(1) != 1 or x.shape[-1] != D:
        raise ValueError(
            f"needs 1 to {MAX_ROWS} rows of x, weight rows of a multiple of 64 side by side and x as wide; got x {tuple(x.shape)}, "
            f"weight {tuple(weight.shape)} with strides {weight.stride()}"
        )
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    y = torch.empty(M, N, dtype=x.dtype, device=x.device) if out is None else out.view(M, N)
    overlap = overlaps_launches(x.device)
    launch = {"PDL": overlap} | ({"launch_pdl": True} if overlap else {})
    grid = (triton.cdiv(N, plan["BN"]),)
    if M == 1:
        _vector_kernel[grid](rows, weight, y, N, weight.stride(0), D=D, **plan, **launch)
    else:
        _rows_kernel[grid](rows, weight, y, M, N, rows.stride(0), weight.stride(0), y.stride(0), D=D, **plan, **launch)
    return y.view(*x.shape[:-1], N) if out is None else out


def skinny_gemm_torch(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """PyTorch form of :func:`skinny_gemm`."""
    y = F.linear(x, weight)
    return y if out is None else out.copy_(y)


def skinny_gemm(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ weightᵀ``: a kernel made for few rows where it fits, ``F.linear`` otherwise.

    The weight must not be written by the kernel right before this one in the stream: its first tile is read before that kernel ends.

    Args:
        x: ``[..., D]``. weight: ``[N, D]``, any row stride. out: contiguous ``[..., N]`` to write to.

    Returns:
        ``out``, or a new ``[..., N]`` in x's dtype; sums are float32.
    """
    form = skinny_gemm_triton if x.is_cuda and fits_skinny_gemm(x, weight) else skinny_gemm_torch
    return form(x, weight, out)
