"""``y = x Wᵀ`` for many rows of x and a quantised W: dequantised in registers on its way to the tensor cores, or copied to 16 bits once.

W is the left operand of the product, the one that tensor cores take from registers, so that what a thread has converted goes nowhere
else; x comes from shared memory. A thread converts whole words, which gives it a column of every plane of a tile (`stored_weight.py`):
the product then runs over [plane 0 | plane 1 | ...] of each 128 columns, and x is brought into that order first. That costs a pass over
x, and spares every program a detour of its tile of W through shared memory.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from vllm.model_executor.layers.fla.ops.device import dot, multiprocessors, settled, tile_of

from .fp8_gemm import fp8_gemm_library, fp8_gemm_triton, input_group, quantise_triton, takes_fp8
from .quantised_gemm_plan import BK, GROUPED, Gpu, Tile, plan_quantised_gemm
from .skinny_gemm import MOST_SLICED_ROWS, few_rows, quantised_gemm
from .stored_weight import PLANES, SIXTEEN_BIT, as_scale, dense, dense_tile, load_words, operands, regular

if TYPE_CHECKING:
    from vllm.model_executor.layers.quantization.base import KernelWeight


@triton.jit(do_not_specialize=["M"])
def _quantised_gemm_kernel(
    x,
    w,
    w_scale,
    w_zero,
    w_factor,
    y,
    M,
    N,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
    GM: tl.constexpr,
    W_KIND: tl.constexpr,
    W_WORDS: tl.constexpr,
    W_GROUP: tl.constexpr,
    W_SCALE_ROWS: tl.constexpr,
):
    """A tile [BN, BM] of yᵀ. x has the planes of every BW words side by side."""
    P: tl.constexpr = K // W_WORDS
    DTYPE: tl.constexpr = x.dtype.element_ty
    ZERO: tl.constexpr = w_zero is not None
    # one scale a row is a factor of its sums
    WHOLE: tl.constexpr = W_GROUP == W_WORDS and not ZERO
    GROUP: tl.constexpr = 0 if WHOLE else W_GROUP
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BM, BN, GM)
    m, n = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN)
    # lanes past the end repeat the last row, so that loads need no mask
    row = tl.minimum(n, N - 1).to(tl.int64)
    at_x = x + tl.minimum(m, M - 1).to(tl.int64)[:, None] * K + tl.arange(0, P * BW)[None, :]
    acc = tl.zeros([BN, BM], tl.float32)
    for w0 in range(0, W_WORDS, BW):
        a, low, high, s, z = load_words(w, w_scale, w_zero, row, w0, W_KIND, W_WORDS, GROUP, W_SCALE_ROWS, BW, DTYPE)
        # [BM, P * BW]
        x_i = tl.load(at_x + P * w0)
        acc = settled(acc + dot(dense_tile(a, low, high, s, z, P, W_KIND, ZERO, GROUP, DTYPE, False), tl.trans(x_i)))
    if WHOLE:
        acc *= as_scale(tl.load(w_scale + row // W_SCALE_ROWS))[:, None]
    if w_factor is not None:
        acc *= tl.load(w_factor + row)[:, None]
    at_y = y + m[None, :].to(tl.int64) * N + n[:, None]
    tl.store(at_y, acc.to(DTYPE), mask=(m < M)[None, :] & (n < N)[:, None])


@triton.jit
def _dequantise_kernel(
    w,
    w_scale,
    w_zero,
    w_factor,
    out,
    N,
    K: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
    W_KIND: tl.constexpr,
    W_WORDS: tl.constexpr,
    W_GROUP: tl.constexpr,
    W_SCALE_ROWS: tl.constexpr,
):
    """A tile [BN, P * BW] of W in 16 bits."""
    P: tl.constexpr = K // W_WORDS
    DTYPE: tl.constexpr = out.dtype.element_ty
    n, w0 = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1) * BW
    row = tl.minimum(n, N - 1).to(tl.int64)
    a, low, high, s, z = load_words(w, w_scale, w_zero, row, w0, W_KIND, W_WORDS, W_GROUP, W_SCALE_ROWS, BW, DTYPE)
    tile = dense_tile(a, low, high, s, z, P, W_KIND, w_zero is not None, W_GROUP, DTYPE, True)
    if w_factor is not None:
        tile = (tile.to(tl.float32) * tl.load(w_factor + row)[:, None]).to(DTYPE)
    at = out + row[:, None] * K + (P * w0 + tl.arange(0, P * BW))[None, :]
    tl.store(at, tile, mask=(n < N)[:, None])


@triton.jit(do_not_specialize=["size"])
def _by_tiles_kernel(x, out, size, P: tl.constexpr, BW: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tiles = tl.reshape(tl.load(x + at, mask=at < size, other=0.0), [BLOCK // (P * BW), BW, P])
    tl.store(out + at, tl.reshape(tl.permute(tiles, (0, 2, 1)), [BLOCK]), mask=at < size)


def by_tiles_triton(x: torch.Tensor, planes: int) -> torch.Tensor:
    """Triton form of :func:`by_tiles_torch`, for contiguous x."""
    out = torch.empty_like(x)
    grid = (triton.cdiv(x.numel(), 2048),)
    _by_tiles_kernel[grid](x, out, x.numel(), P=planes, BW=BK // planes, BLOCK=2048, num_warps=4)
    return out


def by_tiles_torch(x: torch.Tensor, planes: int) -> torch.Tensor:
    """x [M, K] with every 128 columns in the order of planes of words of so many elements."""
    return x.unflatten(-1, (-1, BK // planes, planes)).transpose(-1, -2).flatten(-3)


def _in_words(weight: KernelWeight) -> tuple[KernelWeight, int]:
    """The same weight in words of 32 bits where elements are smaller than bytes, and the elements a word."""
    if weight.kind != "fp4":
        return weight, PLANES[weight.kind]
    return replace(weight, values=weight.values.view(torch.int32)), 8


def quantised_gemm_triton(x: torch.Tensor, weight: KernelWeight, tile: Tile) -> torch.Tensor:
    """Triton form of :func:`quantised_gemm_torch`, for x and weights that :func:`fits` lets through.

    Elements of W are rounded to x's dtype. Scales of int4 are so too, those of other kinds are applied in float32.
    """
    (M, K), N = x.shape, weight.values.shape[0]
    words, P = _in_words(weight)
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    rows = by_tiles_triton(x, P) if P > 1 else x
    grid = (triton.cdiv(M, tile.BM) * triton.cdiv(N, tile.BN),)
    _quantised_gemm_kernel[grid](
        rows, **operands(words, "w", P), y=y, M=M, N=N, K=K, BW=BK // P, GM=GROUPED, **tile.launch
    )
    return y


def quantised_gemm_torch(x: torch.Tensor, weight: KernelWeight) -> torch.Tensor:
    """x [M, K] @ Wᵀ -> [M, N] in x's dtype, computed in float32."""
    return (x.float() @ dense(weight).T).to(x.dtype)


def dequantise_triton(weight: KernelWeight, dtype: torch.dtype) -> torch.Tensor:
    """W [N, K] in 16 bits, rounded as in :func:`quantised_gemm_triton`; its reference is `dense`."""
    words, P = _in_words(weight)
    N, K, BN, BW = weight.values.shape[0], words.values.shape[1] * P, 32, BK // P
    out = torch.empty(N, K, dtype=dtype, device=weight.values.device)
    _dequantise_kernel[(triton.cdiv(N, BN), K // BK)](
        **operands(words, "w", P), out=out, N=N, K=K, BN=BN, BW=BW, num_warps=4
    )
    return out


def fits(x: torch.Tensor, weight: KernelWeight) -> bool:
    """Whether the kernels take this x and this weight: 16 bits, rows of whole groups, K a multiple of 128."""
    return x.dtype in SIXTEEN_BIT and x.shape[-1] % BK == 0 and regular(weight) and weight.values.is_contiguous()


def has_kernels(x: torch.Tensor) -> bool:
    """Whether x is where :func:`quantised_linear` has something to offer. torch.compile sees dense copies alone."""
    return x.is_cuda and x.numel() > 0 and not torch.compiler.is_compiling()


@lru_cache
def gpu_of(device: torch.device) -> Gpu:
    """What plans want to know of it."""
    return Gpu(torch.cuda.get_device_capability(device), multiprocessors(device))


def quantised_linear(x: torch.Tensor, weight: KernelWeight) -> torch.Tensor | None:
    """``x @ Wᵀ`` for any number of rows on a GPU, by the kernel that is fastest there; None where none takes x and W.

    Args:
        x: ``[..., K]``. weight: any kind but plain.

    Returns:
        ``[..., N]`` in x's dtype; sums are float32. Where the format asks for inputs in fp8 (`KernelWeight.quantize_inputs`), many rows of
        x are quantised so on GPUs with tensor cores for it.
    """
    y = quantised_gemm(x, weight) if few_rows(x, MOST_SLICED_ROWS) else None
    if y is not None or not fits(x, weight):
        return y
    N, K = weight.values.shape[0], x.shape[-1]
    group = input_group(weight, K) if takes_fp8(weight, K) else 0
    library = group == K and N % 16 == 0 and x.dtype == torch.bfloat16
    plan = plan_quantised_gemm(gpu_of(x.device), x.numel() // K, N, K, group, library)
    if plan is None:
        return None
    if plan.form == "copy":
        return F.linear(x, dequantise_triton(weight, x.dtype))
    rows = x.reshape(-1, K).contiguous()
    if plan.form == "library":
        y = fp8_gemm_library(*quantise_triton(rows, group), weight, x.dtype)
    elif plan.form == "fp8":
        y = fp8_gemm_triton(*quantise_triton(rows, group), weight, x.dtype, plan.tile)
    else:
        y = quantised_gemm_triton(rows, weight, plan.tile)
    return y.view(*x.shape[:-1], N)
