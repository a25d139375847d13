"""``y = x Wᵀ`` for a few rows of x: a decode step's projections, which take as long as their weights take to arrive.

cuBLAS reaches about two thirds of the memory bandwidth on such shapes. Three kernels do better, each somewhere (skinny_gemm_plan.py):
here a Triton kernel for one row of x and one for several, and csrc/skinny_gemm.cu. Quantised weights are read as they are, by the latter or
by csrc/quantised_gemm.cu. Launches overlap the end of the kernel before: the first weights are on their way while that one still writes x.

Sums are float32 and their order depends on the kernel, not on the other rows of x. So a row's result is the same bit for bit beside any
neighbours as long as the plan and the padded number of rows (1, 8, 16, 32) are; otherwise it may differ by the last bit.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from vllm import _custom_ops as ops
from vllm.model_executor.layers.fla.ops.device import dot, overlaps_launches

from .rms_norm import Unnormed, normed, rows_of
from .skinny_gemm_plan import DENSE, MAX_ROWS, Plan, plan_skinny_gemm

if TYPE_CHECKING:
    from vllm.model_executor.layers.quantization.base import KernelWeight

HALVES = (torch.bfloat16, torch.float16)

MOST_SLICED_ROWS = 4 * MAX_ROWS
"""Rows of x up to which a quantised weight is multiplied slice by slice: it is then read four times, 2 to 4 bytes an element."""


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
    ADD: tl.constexpr,
    PDL: tl.constexpr,
):
    """BN outputs of one row: sums along D in float32. With ADD what they are, rounded, is added to what is there."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    d = tl.arange(0, BK)
    # rows past the end repeat the last one, so that loads need no mask
    at_w = weight + tl.minimum(n, N - 1).to(tl.int64)[:, None] * stride_w + d[None, :]
    # [BN, BK]
    w = tl.load(at_w, mask=(d < D)[None, :], other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    if ADD:
        old = tl.load(y + n, mask=n < N, other=0.0).to(tl.float32)
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
    total = tl.sum(acc, axis=1).to(y.dtype.element_ty)
    if ADD:
        total = (total.to(tl.float32) + old).to(y.dtype.element_ty)
    tl.store(y + n, total, mask=n < N)


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


def triton_tile(M: int, D: int) -> dict[str, int] | None:
    """Tile of one Triton launch, or None where the kernels do not fit: too many rows, or a D that no tile divides.

    Args:
        M: rows of x. D: columns of x and of the weight.
    """
    if not 1 <= M <= MAX_ROWS or D % 64:
        return None
    # measured on an H200: whole rows for one row of x; for more, cache lines of many rows
    if M == 1:
        return {"BN": 4, "BK": min(2048, triton.next_power_of_2(D)), "num_warps": 4}
    return {"BM": max(8, triton.next_power_of_2(M)), "BN": 64, "BK": 64, "num_warps": 4, "num_stages": 6}


def skinny_gemm_triton(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Triton form of :func:`skinny_gemm`, for up to 32 rows."""
    return _launch(x, weight, out, add=False)


def skinny_gemm_add_triton(x: torch.Tensor, weight: torch.Tensor, total: torch.Tensor) -> None:
    """Triton form of :func:`skinny_gemm_add`, for one row."""
    if x.numel() != x.shape[-1]:
        raise ValueError(f"needs one row of x, got {tuple(x.shape)}")
    _launch(x, weight, total, add=True)


def _launch(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None, add: bool) -> torch.Tensor:
    N, D = weight.shape
    rows = x.reshape(-1, D)
    M = rows.shape[0]
    tile = triton_tile(M, D)
    if tile is None or weight.stride(1) != 1 or x.shape[-1] != D:
        raise ValueError(
            f"needs 1 to {MAX_ROWS} rows of x, weight rows of a multiple of 64 side by side and x as wide; got x {tuple(x.shape)}, "
            f"weight {tuple(weight.shape)} with strides {weight.stride()}"
        )
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    y = torch.empty(M, N, dtype=x.dtype, device=x.device) if out is None else out.view(M, N)
    overlap = overlaps_launches(x.device)
    launch = {"PDL": overlap} | ({"launch_pdl": True} if overlap else {})
    grid = (triton.cdiv(N, tile["BN"]),)
    if M == 1:
        _vector_kernel[grid](rows, weight, y, N, weight.stride(0), D=D, ADD=add, **tile, **launch)
    else:
        _rows_kernel[grid](rows, weight, y, M, N, rows.stride(0), weight.stride(0), y.stride(0), D=D, **tile, **launch)
    return y.view(*x.shape[:-1], N) if out is None else out


def skinny_gemm_cuda(
    x: torch.Tensor | Unnormed,
    weight: torch.Tensor | KernelWeight,
    out: torch.Tensor | None = None,
    plan: Plan | None = None,
) -> torch.Tensor:
    """csrc/skinny_gemm.cu's form of :func:`skinny_gemm` and of :func:`quantised_gemm`, for the sizes of `ring_fits`.

    Rows that are still to be normalised need bfloat16, a norm's weight too, and a plain weight.
    """
    plan = plan or Plan("ring")
    quantised = not isinstance(weight, torch.Tensor)
    values = weight.values if quantised else weight
    N, K = values.shape[0], x.shape[-1]
    rows = _aligned(rows_of(x).reshape(-1, K))
    y = torch.empty(rows.shape[0], N, dtype=rows.dtype, device=rows.device) if out is None else out.view(-1, N)
    result = y.view(*x.shape[:-1], N) if out is None else out
    if isinstance(x, Unnormed):
        ops.skinny_gemm_norm(y, rows, weight, x.weight, x.eps, x.plus_one, plan.ring * 1000, plan.late)
        return result
    of_weight = (
        (weight.scale, weight.zero, weight.row_scale, weight.kind, weight.group, weight.scale_rows)
        if quantised
        else (None, None, None, "plain", 0, 1)
    )
    ops.skinny_gemm(y, rows, values, *of_weight, plan.ring * 1000, plan.late)
    return result


def skinny_gemm_add_cuda(x: torch.Tensor, weight: torch.Tensor, total: torch.Tensor, plan: Plan | None = None) -> None:
    """csrc/skinny_gemm.cu's form of :func:`skinny_gemm_add`, in bfloat16, for the sizes of `ring_fits`."""
    plan, (N, K) = plan or Plan("ring"), weight.shape
    ops.skinny_gemm_add(total.view(-1, N), _aligned(x.reshape(-1, K)), weight, plan.ring * 1000, plan.late)


def quantised_gemm_cuda(
    x: torch.Tensor, weight: KernelWeight, out: torch.Tensor | None = None, plan: Plan | None = None
) -> torch.Tensor:
    """csrc/quantised_gemm.cu's form of :func:`quantised_gemm`, for the sizes of `quantised_fits`. Scales are applied in float32,
    fp4's of groups exactly, before the sums."""
    plan, N = plan or Plan("quantised"), weight.values.shape[0]
    rows = _aligned(x.reshape(-1, x.shape[-1]))
    y = torch.empty(rows.shape[0], N, dtype=x.dtype, device=x.device) if out is None else out.view(-1, N)
    of_weight = weight.scale, weight.zero, weight.row_scale, weight.kind, weight.group, weight.scale_rows
    ops.quantised_gemm(y, rows, weight.values, *of_weight, plan.ring * 1000, plan.late)
    return y.view(*x.shape[:-1], N) if out is None else out


def _aligned(rows: torch.Tensor) -> torch.Tensor:
    """The same rows, each beginning at a multiple of 16 bytes."""
    inside = rows.stride(1) == 1 and rows.stride(0) % 8 == 0 and rows.data_ptr() % 16 == 0
    return rows if inside else rows.clone(memory_format=torch.contiguous_format)


def skinny_gemm_torch(
    x: torch.Tensor | Unnormed, weight: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """PyTorch form of :func:`skinny_gemm`."""
    y = F.linear(normed(x), weight)
    return y if out is None else out.copy_(y)


def skinny_gemm_add_torch(x: torch.Tensor, weight: torch.Tensor, total: torch.Tensor) -> None:
    """PyTorch form of :func:`skinny_gemm_add`."""
    total += F.linear(x, weight)


def few_rows(x: torch.Tensor, most: int = MAX_ROWS) -> bool:
    """Whether x has so few rows, on a GPU, that a kernel of this file may be faster than cuBLAS. torch.compile sees cuBLAS alone."""
    return x.is_cuda and 0 < x.numel() <= most * x.shape[-1] and not torch.compiler.is_compiling()


@lru_cache
def csrc_gpu(device: torch.device) -> tuple[str, bool]:
    """Name, and whether csrc's kernel runs there. Says once where it is missing."""
    return torch.cuda.get_device_name(device), overlaps_launches(device) and ops.available(device)


def _plan(x: torch.Tensor, N: int, kind: str = "plain", group: int = 0, behind_norm: bool = False) -> Plan:
    K = x.shape[-1]
    gpu, csrc = csrc_gpu(x.device)
    return plan_skinny_gemm(gpu, x.numel() // max(1, K), N, K, kind, group, csrc, behind_norm=behind_norm)


def plan_of(x: torch.Tensor | Unnormed, weight: torch.Tensor) -> Plan:
    """The plan for these tensors; dense where no kernel takes them."""
    behind_norm = isinstance(x, Unnormed) and x.rows.dtype == x.weight.dtype == torch.bfloat16
    x = rows_of(x)
    alike = x.dtype == weight.dtype and x.dtype in HALVES
    if not few_rows(x) or not alike or weight.stride(1) != 1 or weight.stride(0) % 8 or weight.data_ptr() % 16:
        return DENSE
    return _plan(x, weight.shape[0], behind_norm=behind_norm)


def skinny_gemm(x: torch.Tensor | Unnormed, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ weightᵀ``: a kernel made for few rows where one is faster, ``F.linear`` otherwise.

    The weight must not be written by the kernel right before this one in the stream: its first rows are read before that kernel ends.

    Args:
        x: ``[..., D]``; rows still to be normalised are so on the way, where csrc's kernel takes them.
        weight: ``[N, D]``, any row stride. out: contiguous ``[..., N]`` to write to.

    Returns:
        ``out``, or a new ``[..., N]`` in x's dtype; sums are float32.
    """
    plan = plan_of(x, weight)
    if plan.form == "ring":
        folds = isinstance(x, Unnormed) and x.rows.dtype == x.weight.dtype == torch.bfloat16
        return skinny_gemm_cuda(x if folds else normed(x), weight, out, plan)
    form = skinny_gemm_triton if plan.form in ("vector", "rows") else skinny_gemm_torch
    return form(normed(x), weight, out)


def skinny_gemm_add(x: torch.Tensor, weight: torch.Tensor, total: torch.Tensor) -> None:
    """``total += x @ weightᵀ``, the product rounded to x's dtype before it is added: in one kernel where that is the fastest without.

    Args:
        x: ``[..., D]``. weight: as in :func:`skinny_gemm`. total: contiguous ``[..., N]`` in x's dtype, not x itself.
    """
    plan = plan_of(x, weight)
    if plan.form == "ring" and x.dtype == torch.bfloat16:
        skinny_gemm_add_cuda(x, weight, total, plan)
    elif plan.form == "vector":
        skinny_gemm_add_triton(x, weight, total)
    else:
        total += skinny_gemm(x, weight)


def quantised_gemm(x: torch.Tensor, weight: KernelWeight) -> torch.Tensor | None:
    """``x @ Wᵀ`` for few rows, with W dequantised in registers; None where no kernel of csrc/ takes x and W.

    Sums are float32. csrc/quantised_gemm.cu applies scales to them, exactly; the ring rounds W's elements to bfloat16 as in the dense
    copy (scales that bfloat16 does not hold are applied as two of them). The weight must not be written by the kernel right before
    this one in the stream.

    Args:
        x: bfloat16 ``[..., K]``. weight: any format but plain, as kernels read it.
    """
    N, K = weight.values.shape[0], x.shape[-1]
    if not few_rows(x, MOST_SLICED_ROWS) or x.dtype != torch.bfloat16:
        return None
    slices = x.reshape(-1, K).split(MAX_ROWS)
    plan = _plan(slices[0], N, weight.kind, weight.group)
    if plan.form == "ring" and reads(weight, K):
        form = skinny_gemm_cuda
    elif plan.form == "quantised" and reads_any_width(weight):
        form = quantised_gemm_cuda
    else:
        return None
    y = torch.empty(x.numel() // K, N, dtype=x.dtype, device=x.device)
    for piece, out in zip(slices, y.split(MAX_ROWS), strict=True):
        form(piece, weight, out, plan)
    return y.view(*x.shape[:-1], N)


def reads(weight: KernelWeight, K: int) -> bool:
    """Whether csrc's kernel can copy this weight's rows, scales and zero points, which it does in pieces of 16 bytes."""
    if weight.kind == "plain" or not _in_pieces(weight.values, weight.values.shape[1]):
        return False
    if weight.group >= K:
        return weight.zero is None and weight.row_scale is None
    alike = (weight.kind == "fp4") == (weight.scale.dtype == torch.float8_e4m3fn)
    if not alike or K % weight.group or (weight.zero is not None and weight.kind != "int4"):
        return False
    groups = min(K, 2048) // weight.group  # of what is copied at once
    return _in_pieces(weight.scale, groups) and (weight.zero is None or _in_pieces(weight.zero, groups))


def reads_any_width(weight: KernelWeight) -> bool:
    """Whether csrc/quantised_gemm.cu can read this weight's rows, scales and zero points."""
    scales = [part for part in (weight.scale, weight.zero) if part is not None]
    fp4 = weight.kind == "fp4"
    alike = weight.scale.dtype in ((torch.float8_e4m3fn,) if fp4 else (*HALVES, torch.float32))
    zeros = weight.zero is None or weight.kind == "int4"
    if not alike or not zeros or not (fp4 or weight.row_scale is None) or not _in_pieces(weight.values, 16):
        return False
    together = max(1, (128 if weight.kind in ("int4", "fp4") else 64) // weight.group)  # of a row, in one piece
    return all(_in_pieces(s, together, together * s.element_size()) for s in scales)


def _in_pieces(rows: torch.Tensor, columns: int, piece: int = 16) -> bool:
    """Whether pieces of so many columns begin and end at multiples of so many bytes."""
    size = rows.element_size()
    return (
        rows.stride(1) == 1
        and rows.data_ptr() % piece == 0
        and rows.stride(0) * size % piece == 0
        and columns * size % piece == 0
    )
