"""The products of `grouped.py` for experts in eight-bit floats that are made for inputs in them: tensor cores multiply both as they are.

x is quantised once a token, and h = silu(gate x) * up x once a choice, as in `layers/ops/fp8_gemm.py`; scales are applied to sums.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from vllm.model_executor.layers.fla.ops.device import dot
from vllm.model_executor.layers.fused_moe.ops.route import Routed
from vllm.model_executor.layers.fused_moe.ops.weights import overlapping, swiglu
from vllm.model_executor.layers.ops.fp8_gemm import (
    input_group,
    multiplies_fp8,
    quantise_torch,
    quantise_triton,
    takes_fp8,
)
from vllm.model_executor.layers.ops.quantised_gemm_plan import BK
from vllm.model_executor.layers.ops.stored_weight import dense

if TYPE_CHECKING:
    from vllm.model_executor.layers.quantization.base import KernelWeight

LEAST_BLOCK = 32
"""Choices a block from which inputs are quantised. Blocks of fewer are those of experts that wait for their weights either way."""


@triton.jit(do_not_specialize=["X_ROWS"])
def _grouped_fp8_kernel(
    x,
    x_scale,
    order,
    block_expert,
    block_rows,
    w,
    w_scale,
    y,
    X_ROWS,
    N,
    TOP_K: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PAIRED: tl.constexpr,
    BLOCKS: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """BN outputs of one block's choices, each of which reads row choice // TOP_K of x. PAIRED: of gate and up, N rows each, their swiglu."""
    block = tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    m, c = tl.arange(0, BM), tl.arange(0, BK)
    choice = tl.load(order + block * BM + m)
    rows, expert = tl.load(block_rows + block), tl.load(block_expert + block)
    if rows == 0:
        return
    choice = tl.where(m < rows, choice, 0).to(tl.int64)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    row = expert.to(tl.int64) * (N * (2 if PAIRED else 1)) + tl.minimum(n, N - 1)
    from_row = choice // TOP_K
    at_x = x + from_row[:, None] * K + c[None, :]
    at_w = w + row[:, None] * K + c[None, :]
    at_s = w_scale + row // SCALE_ROWS * (K // BK if BLOCKS else 1)
    at_s2 = w_scale + (row + N) // SCALE_ROWS * (K // BK if BLOCKS else 1)
    # [BN, BM]
    acc, acc2 = tl.zeros([BN, BM], tl.float32), tl.zeros([BN, BM], tl.float32)
    for k0 in range(0, K, BK):
        x_i = tl.trans(tl.load(at_x + k0))
        a = tl.load(at_w + k0)
        if PAIRED:
            b = tl.load(at_w + (N * K + k0))
        if BLOCKS:
            s = tl.load(x_scale + k0 // BK * X_ROWS + from_row)[None, :]
            acc += dot(a, x_i) * s * tl.load(at_s + k0 // BK).to(tl.float32)[:, None]
            if PAIRED:
                acc2 += dot(b, x_i) * s * tl.load(at_s2 + k0 // BK).to(tl.float32)[:, None]
        else:
            acc += dot(a, x_i)
            if PAIRED:
                acc2 += dot(b, x_i)
    if not BLOCKS:
        s = tl.load(x_scale + from_row)[None, :]
        acc *= s * tl.load(at_s).to(tl.float32)[:, None]
        if PAIRED:
            acc2 *= s * tl.load(at_s2).to(tl.float32)[:, None]
    if PAIRED:
        acc = swiglu(acc, acc2)
    at_y = y + choice[None, :] * N + n[:, None]
    tl.store(at_y, acc.to(y.dtype.element_ty), mask=(m < rows)[None, :] & (n < N)[:, None])


def prefers_fp8(x: torch.Tensor, routed: Routed, w13: KernelWeight, w2: KernelWeight) -> bool:
    """Whether inputs are to be quantised: asked for by the format, possible here, and worth it."""
    D, I = w13.values.shape[-1], w2.values.shape[-1]
    return routed.block >= LEAST_BLOCK and multiplies_fp8(x.device) and takes_fp8(w13, D) and takes_fp8(w2, I)


def _product(x: torch.Tensor, routed: Routed, weight: KernelWeight, N: int, top_k: int, paired: bool) -> torch.Tensor:
    """Every choice's outputs [choices, N]; x [rows, K] is what choice // top_k reads."""
    K = x.shape[1]
    q, scale = quantise_triton(x, input_group(weight, K))
    y = x.new_empty(routed.shares.numel(), N)
    BN = 64 if paired or routed.block >= 64 else 128  # registers hold the sums twice
    _grouped_fp8_kernel[(triton.cdiv(N, BN), routed.blocks)](
        q,
        scale,
        routed.order,
        routed.block_expert,
        routed.block_rows,
        weight.values,
        weight.scale.contiguous(),
        y,
        X_ROWS=x.shape[0],
        N=N,
        TOP_K=top_k,
        K=K,
        BM=routed.block,
        BN=BN,
        BK=BK,
        PAIRED=paired,
        BLOCKS=weight.group < K,
        SCALE_ROWS=weight.scale_rows,
        num_warps=4,
        num_stages=4,
        **overlapping(x.device),
    )
    return y


def experts_fp8_triton(x: torch.Tensor, routed: Routed, w13: KernelWeight, w2: KernelWeight) -> torch.Tensor:
    """Triton form of :func:`experts_fp8_torch`."""
    h = _product(x, routed, w13, w13.values.shape[-2] // 2, routed.shares.shape[1], paired=True)
    return _product(h, routed, w2, w2.values.shape[-2], 1, paired=False)


def experts_fp8_torch(x: torch.Tensor, routed: Routed, w13: KernelWeight, w2: KernelWeight) -> torch.Tensor:
    """Every choice's own result [T * top_k, D], from x [T, D]: `experts_torch` with x and h in e4m3; sums in float32."""
    T, top_k = routed.shares.shape
    y = x.new_zeros(T * top_k, x.shape[1], dtype=torch.float32)
    dense13, dense2 = dense(w13), dense(w2)
    x = _rounded(x, w13)
    for b in range(routed.blocks):
        choices = routed.order[b * routed.block :][: int(routed.block_rows[b])].long()
        expert = routed.block_expert[b]
        gate, up = (x[choices // top_k] @ dense13[expert].T).chunk(2, dim=-1)
        y[choices] = _rounded(F.silu(gate) * up, w2) @ dense2[expert].T
    return y


def _rounded(x: torch.Tensor, weight: KernelWeight) -> torch.Tensor:
    """x [rows, K] quantised as for this weight, in float32 again."""
    q, scale = quantise_torch(x, input_group(weight, x.shape[1]))
    return (q.float().unflatten(-1, (scale.shape[0], -1)) * scale.T[..., None]).flatten(-2)
