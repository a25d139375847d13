"""``y = x Wᵀ`` for weights in eight-bit floats (e4m3) made for inputs in e4m3: x is quantised as it comes, and tensor cores multiply both.

Scales stay out of the products: one a row of x and one a row of W are factors of the finished sums; with blocks of W, and a scale for
128 inputs of a row of x, sums of 128 products are scaled before they are added up ("DeepSeek-V3", arXiv 2412.19437, section 3.3.2).
That is done without blocks too: Hopper's tensor cores keep about 14 bits of a sum of 8-bit products, which over long rows is too few.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from vllm.model_executor.layers.fla.ops.device import before_e4m3, dot, tile_of

from .quantised_gemm_plan import BK, FP8_CAPABILITY, GROUPED, Tile
from .stored_weight import dense

if TYPE_CHECKING:
    from vllm.model_executor.layers.quantization.base import KernelWeight

LARGEST = 448.0
"""Of e4m3's numbers."""

LEAST = 1e-12
"""Of scales: rows of zeros have one too."""


@triton.jit(do_not_specialize=["M"])
def _quantise_kernel(
    x,
    q,
    scale,
    M,
    LARGEST: tl.constexpr,
    LEAST: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    BG: tl.constexpr,
    BC: tl.constexpr,
):
    """BG groups of one row."""
    m, g, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * BG + tl.arange(0, BG), tl.arange(0, BC)
    at = g[:, None] * GROUP + c[None, :]
    keep = (c < GROUP)[None, :] & (at < K)
    v = tl.load(x + m * K + at, mask=keep, other=0.0).to(tl.float32)
    s = tl.maximum(tl.max(tl.abs(v), axis=1) / LARGEST, LEAST)
    tl.store(q + m * K + at, before_e4m3(v * (1.0 / s)[:, None]).to(q.dtype.element_ty), mask=keep)
    tl.store(scale + g * M + m, s, mask=g * GROUP < K)


@triton.jit(do_not_specialize=["M"])
def _fp8_gemm_kernel(
    q,
    q_scale,
    w,
    w_scale,
    y,
    M,
    N,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GM: tl.constexpr,
    BLOCKS: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
):
    """A tile [BM, BN] of y. BLOCKS: scales are for BK columns, and a block's number of rows; else for whole rows."""
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BM, BN, GM)
    m, n = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN)
    # lanes past the end repeat the last row, so that loads need no mask
    row_m, row_n = tl.minimum(m, M - 1).to(tl.int64), tl.minimum(n, N - 1).to(tl.int64)
    at_q = q + row_m[:, None] * K + tl.arange(0, BK)[None, :]
    at_w = w + row_n[:, None] * K + tl.arange(0, BK)[None, :]
    acc = tl.zeros([BM, BN], tl.float32)
    for k0 in range(0, K, BK):
        a, b = tl.load(at_q + k0), tl.load(at_w + k0)
        if BLOCKS:
            # asked for before the product, which hides the way
            s = tl.load(q_scale + k0 // BK * M + row_m)
            if SCALE_ROWS % BN == 0:
                s *= tl.load(w_scale + (tile_n * BN // SCALE_ROWS) * (K // BK) + k0 // BK).to(tl.float32)
                acc += dot(a, tl.trans(b)) * s[:, None]
            else:
                t = tl.load(w_scale + row_n // SCALE_ROWS * (K // BK) + k0 // BK).to(tl.float32)
                acc += dot(a, tl.trans(b)) * s[:, None] * t[None, :]
        else:
            acc += dot(a, tl.trans(b))
    if not BLOCKS:
        acc *= tl.load(q_scale + row_m)[:, None]
        acc *= tl.load(w_scale + row_n // SCALE_ROWS).to(tl.float32)[None, :]
    at_y = y + m[:, None].to(tl.int64) * N + n[None, :]
    tl.store(at_y, acc.to(y.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@lru_cache
def multiplies_fp8(device: torch.device) -> bool:
    """Whether its tensor cores take 8-bit floats."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= FP8_CAPABILITY


def takes_fp8(weight: KernelWeight, K: int) -> bool:
    """Whether x may be quantised for this weight [..., N, K], and its scales are those of rows, or of 128 columns."""
    asked = weight.kind == "fp8" and weight.quantize_inputs
    return asked and K % BK == 0 and (weight.group >= K or weight.group == BK)


def input_group(weight: KernelWeight, K: int) -> int:
    """Columns of x that share a scale beside this weight."""
    return BK if weight.group < K else K


def quantise_triton(x: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Triton form of :func:`quantise_torch`, for contiguous x [M, K] and groups that divide K."""
    M, K = x.shape
    q = torch.empty(M, K, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(K // group, M, dtype=torch.float32, device=x.device)
    BC = triton.next_power_of_2(group)
    BG = max(1, min(2048 // BC, triton.next_power_of_2(K // group)))
    _quantise_kernel[(M, triton.cdiv(K, BG * group))](
        x, q, scale, M, LARGEST, LEAST, K=K, GROUP=group, BG=BG, BC=BC, num_warps=min(16, max(4, BC // 2048))
    )
    return q, scale


def quantise_torch(x: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] as e4m3 [M, K] times scale [K / group, M], float32: the largest of a group is 448."""
    groups = x.float().unflatten(-1, (-1, group))
    scale = (groups.abs().amax(-1) / LARGEST).clamp(min=LEAST)
    return (groups / scale[..., None]).flatten(-2).to(torch.float8_e4m3fn), scale.T.contiguous()


def fp8_gemm_triton(
    q: torch.Tensor, scale: torch.Tensor, weight: KernelWeight, dtype: torch.dtype, tile: Tile
) -> torch.Tensor:
    """Triton form of :func:`fp8_gemm_torch`, for weights of :func:`takes_fp8` and K a multiple of 128."""
    (M, K), N = q.shape, weight.values.shape[0]
    y = torch.empty(M, N, dtype=dtype, device=q.device)
    grid = (triton.cdiv(M, tile.BM) * triton.cdiv(N, tile.BN),)
    blocks = {"BLOCKS": weight.group < K, "SCALE_ROWS": weight.scale_rows}
    _fp8_gemm_kernel[grid](
        q, scale, weight.values, weight.scale.contiguous(), y, M, N, K=K, BK=BK, GM=GROUPED, **blocks, **tile.launch
    )
    return y


def fp8_gemm_library(q: torch.Tensor, scale: torch.Tensor, weight: KernelWeight, dtype: torch.dtype) -> torch.Tensor:
    """:func:`fp8_gemm_torch` by cuBLAS, for weights with one scale a row, N and K multiples of 16, and bfloat16 results."""
    rows = weight.scale.float().view(-1)
    columns = rows.repeat_interleave(weight.scale_rows)[: weight.values.shape[0]] if weight.scale_rows > 1 else rows
    return torch._scaled_mm(q, weight.values.T, scale.view(-1, 1), columns.view(1, -1), out_dtype=dtype)


def fp8_gemm_torch(q: torch.Tensor, scale: torch.Tensor, weight: KernelWeight, dtype: torch.dtype) -> torch.Tensor:
    """(q * scale) @ Wᵀ -> [M, N], computed in float32.

    Args:
        q, scale: of :func:`quantise_torch`, with groups as wide as those of the weight [N, K].
    """
    x = q.float().unflatten(-1, (scale.shape[0], -1)) * scale.T[..., None]
    return (x.flatten(-2) @ dense(weight).T).to(dtype)
