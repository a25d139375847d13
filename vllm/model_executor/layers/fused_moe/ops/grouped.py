"""Products of experts with the choices that fell to them, for many tokens: tensor cores over blocks of one expert's choices.

    gate_up  h_s = silu(gate_e x_t) * up_e x_t
    down     y_s = down_e h_s

for every choice s = (token t, expert e), in blocks that `ops/route.py` has laid out. Weights are read as they are stored and become
16-bit floats in registers, as the left operand: an expert has many rows and often few tokens. Plane i of a tile of words is one product.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from vllm.model_executor.layers.fla.ops.device import dot, settled
from vllm.model_executor.layers.fused_moe.ops.grouped_fp8 import experts_fp8_triton, prefers_fp8
from vllm.model_executor.layers.fused_moe.ops.route import Routed
from vllm.model_executor.layers.fused_moe.ops.weights import overlapping, store_sum, swiglu
from vllm.model_executor.layers.ops.stored_weight import PLANES, dense, load_words, operands, plane

if TYPE_CHECKING:
    from vllm.model_executor.layers.quantization.base import KernelWeight


@triton.jit
def _grouped_gate_up_kernel(
    x,
    order,
    block_expert,
    block_rows,
    w13,
    w13_scale,
    w13_zero,
    w13_factor,
    h,
    I,
    TOP_K: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
    W13_KIND: tl.constexpr,
    W13_WORDS: tl.constexpr,
    W13_GROUP: tl.constexpr,
    W13_SCALE_ROWS: tl.constexpr,
    H_PLANES: tl.constexpr,
    PDL: tl.constexpr,
):
    """BN outputs of one block's choices. x is in the order of planes, and h is written in w2's."""
    block = tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    P: tl.constexpr = D // W13_WORDS
    DTYPE: tl.constexpr = x.dtype.element_ty
    m = tl.arange(0, BM)
    # past the block's rows anything may stand in the list; asking for all at once saves waiting twice
    choice = tl.load(order + block * BM + m)
    rows, expert = tl.load(block_rows + block), tl.load(block_expert + block)
    if rows == 0:
        return
    choice = tl.where(m < rows, choice, 0)
    # rows in the order of planes, so that neighbours of h are written together
    r: tl.constexpr = BN // H_PLANES
    n = tl.program_id(0) * BN + tl.arange(0, BN) % r * H_PLANES + tl.arange(0, BN) // r
    row = expert.to(tl.int64) * (2 * I) + tl.minimum(n, I - 1)
    at_x = x + (choice // TOP_K).to(tl.int64)[:, None] * D + tl.arange(0, BW)[None, :]
    # [BN, BM]
    gate, up = tl.zeros([BN, BM], tl.float32), tl.zeros([BN, BM], tl.float32)
    for w0 in range(0, W13_WORDS, BW):
        a, al, ah, sa, za = load_words(
            w13, w13_scale, w13_zero, row, w0, W13_KIND, W13_WORDS, W13_GROUP, W13_SCALE_ROWS, BW, DTYPE
        )
        b, bl, bh, sb, zb = load_words(
            w13, w13_scale, w13_zero, row + I, w0, W13_KIND, W13_WORDS, W13_GROUP, W13_SCALE_ROWS, BW, DTYPE
        )
        for i in tl.static_range(P):
            # [BW, BM]
            x_i = tl.trans(tl.load(at_x + i * W13_WORDS + w0))
            gate += dot(plane(a, al, ah, sa, za, i, W13_KIND, w13_zero is not None, W13_GROUP, DTYPE), x_i)
            up += dot(plane(b, bl, bh, sb, zb, i, W13_KIND, w13_zero is not None, W13_GROUP, DTYPE), x_i)
        if W13_KIND != "plain":
            gate, up = settled(gate), settled(up)
    if w13_factor is not None:
        gate *= tl.load(w13_factor + row)[:, None]
        up *= tl.load(w13_factor + row + I)[:, None]
    y = swiglu(gate, up)
    at = n % H_PLANES * (I // H_PLANES) + n // H_PLANES
    tl.store(
        h + choice.to(tl.int64)[None, :] * I + at[:, None], y.to(DTYPE), mask=(m < rows)[None, :] & (n < I)[:, None]
    )


@triton.jit
def _grouped_down_kernel(
    h,
    order,
    block_expert,
    block_rows,
    w2,
    w2_scale,
    w2_zero,
    w2_factor,
    y,
    D,
    I: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
    W2_KIND: tl.constexpr,
    W2_WORDS: tl.constexpr,
    W2_GROUP: tl.constexpr,
    W2_SCALE_ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """BN outputs of one block's choices; h is in the order of planes."""
    block = tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    DTYPE: tl.constexpr = h.dtype.element_ty
    m = tl.arange(0, BM)
    choice = tl.load(order + block * BM + m)
    rows, expert = tl.load(block_rows + block), tl.load(block_expert + block)
    if rows == 0:
        return
    choice = tl.where(m < rows, choice, 0).to(tl.int64)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    row = expert.to(tl.int64) * D + tl.minimum(n, D - 1)
    at_h = h + choice[:, None] * I + tl.arange(0, BW)[None, :]
    # [BN, BM]
    acc = tl.zeros([BN, BM], tl.float32)
    for w0 in range(0, W2_WORDS, BW):
        a, al, ah, sa, za = load_words(
            w2, w2_scale, w2_zero, row, w0, W2_KIND, W2_WORDS, W2_GROUP, W2_SCALE_ROWS, BW, DTYPE
        )
        for i in tl.static_range(I // W2_WORDS):
            h_i = tl.trans(tl.load(at_h + i * W2_WORDS + w0))
            acc += dot(plane(a, al, ah, sa, za, i, W2_KIND, w2_zero is not None, W2_GROUP, DTYPE), h_i)
        if W2_KIND != "plain":
            acc = settled(acc)
    if w2_factor is not None:
        acc *= tl.load(w2_factor + row)[:, None]
    tl.store(y + choice[None, :] * D + n[:, None], acc.to(DTYPE), mask=(m < rows)[None, :] & (n < D)[:, None])


@triton.jit
def _combine_kernel(
    y,
    shares,
    shared,
    gate,
    out,
    D,
    stride_gate,
    TOP_K: tl.constexpr,
    BD: tl.constexpr,
    ADD: tl.constexpr,
    PDL: tl.constexpr,
):
    """BD outputs of one token: its choices by their shares, and the shared expert by its gate. ADD: to what is in out."""
    t, d = tl.program_id(1).to(tl.int64), tl.program_id(0) * BD + tl.arange(0, BD)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    acc, old = tl.zeros([BD], tl.float32), d
    if ADD:
        old = tl.load(out + t * D + d, mask=d < D, other=0.0)
    for k in tl.static_range(TOP_K):
        share = tl.load(shares + t * TOP_K + k)
        acc += share * tl.load(y + (t * TOP_K + k) * D + d, mask=d < D, other=0.0).to(tl.float32)
    if shared is not None:
        g = tl.load(gate + t * stride_gate).to(tl.float32)
        acc += tl.load(shared + t * D + d, mask=d < D, other=0.0).to(tl.float32) / (1.0 + tl.exp(-g))
    store_sum(out + t * D + d, acc, old, d < D, ADD)


@triton.jit
def _planes_kernel(x, xp, D: tl.constexpr, BW: tl.constexpr, P: tl.constexpr):
    """One row of x, element P*c + i to i*D/P + c."""
    t, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * BW + tl.arange(0, BW)
    i = tl.arange(0, P)
    keep = (c < D // P)[:, None] & (i >= 0)[None, :]
    # [BW, P]
    tile = tl.load(x + t * D + c[:, None] * P + i[None, :], mask=keep, other=0.0)
    tl.store(xp + t * D + i[None, :] * (D // P) + c[:, None], tile, mask=keep)


def plan_grouped(kind: str, words: int, width: int, block: int, paired: bool) -> dict[str, int]:
    """Tile of one product: what was fastest on an H200 within the 99 KiB of shared memory of sm_120.

    Args:
        kind, words: of the stored rows.
        width: outputs.
        block: choices a block.
        paired: whether a program reads two matrices, gate and up.
    """
    P, wide = PLANES[kind], block >= 64
    # the more rows a program has, the less it spends on the choices' activations; registers hold the accumulators
    BN, warps, BW = 64, 4, 64 if P == 1 else 16
    if not paired:
        BN, warps = 128, 8 if wide or P == 1 else 4
    elif not wide and P == 8:
        BW = 32
    return {
        "BN": min(BN, max(16, triton.next_power_of_2(width))),
        "BW": min(words & -words, BW),
        "num_warps": warps,
        "num_stages": 3,
    }


def fits_grouped(w13: KernelWeight, w2: KernelWeight) -> bool:
    """Whether rows are of whole tiles."""
    return all((w.values.shape[-1] & -w.values.shape[-1]) >= 16 for w in (w13, w2))


def by_planes_triton(x: torch.Tensor, kind: str) -> torch.Tensor:
    """x [T, D] in the order of planes of weights of this kind."""
    (T, D), P = x.shape, PLANES[kind]
    if P == 1:
        return x
    xp = torch.empty_like(x)
    _planes_kernel[(T, triton.cdiv(D // P, 128))](x, xp, D=D, BW=128, P=P, num_warps=4)
    return xp


def experts_triton(xp: torch.Tensor, routed: Routed, w13: KernelWeight, w2: KernelWeight) -> torch.Tensor:
    """Triton form of :func:`experts_torch`, with x by the planes of w13; or of `experts_fp8_torch` where inputs are to be in fp8."""
    if prefers_fp8(xp, routed, w13, w2):
        return experts_fp8_triton(xp, routed, w13, w2)
    T, D = xp.shape
    I, top_k = w13.values.shape[-2] // 2, routed.shares.shape[1]
    h, y = xp.new_empty(T * top_k, I), xp.new_empty(T * top_k, D)
    plan = plan_grouped(w13.kind, w13.values.shape[-1], I, routed.block, paired=True)
    plan["BN"] = max(plan["BN"], PLANES[w2.kind])
    lists, launch = (routed.order, routed.block_expert, routed.block_rows), overlapping(xp.device)
    _grouped_gate_up_kernel[(triton.cdiv(I, plan["BN"]), routed.blocks)](
        xp,
        *lists,
        **operands(w13, "w13"),
        h=h,
        I=I,
        TOP_K=top_k,
        D=D,
        BM=routed.block,
        H_PLANES=PLANES[w2.kind],
        **plan,
        **launch,
    )
    plan = plan_grouped(w2.kind, w2.values.shape[-1], D, routed.block, paired=False)
    _grouped_down_kernel[(triton.cdiv(D, plan["BN"]), routed.blocks)](
        h, *lists, **operands(w2, "w2"), y=y, D=D, I=I, BM=routed.block, **plan, **launch
    )
    return y


def experts_torch(x: torch.Tensor, routed: Routed, w13: KernelWeight, w2: KernelWeight) -> torch.Tensor:
    """Every choice's own result [T * top_k, D], from x [T, D] in its natural order; in float32."""
    T, top_k = routed.shares.shape
    y = x.new_zeros(T * top_k, x.shape[1], dtype=torch.float32)
    dense13, dense2 = dense(w13), dense(w2)
    for b in range(routed.blocks):
        choices = routed.order[b * routed.block :][: int(routed.block_rows[b])].long()
        expert = routed.block_expert[b]
        gate, up = (x[choices // top_k].float() @ dense13[expert].T).chunk(2, dim=-1)
        y[choices] = (F.silu(gate) * up) @ dense2[expert].T
    return y


def combine_triton(
    y: torch.Tensor,
    shares: torch.Tensor,
    shared: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    add_to: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Triton form of :func:`combine_torch`."""
    (T, top_k), D = shares.shape, y.shape[1]
    out = y.new_empty(T, D) if add_to is None else add_to
    stride = 0 if gate is None else gate.stride(0)
    BD = min(1024, triton.next_power_of_2(D))
    launch = {"TOP_K": top_k, "BD": BD, "ADD": add_to is not None, "num_warps": 4} | overlapping(y.device)
    _combine_kernel[(triton.cdiv(D, BD), T)](y, shares, shared, gate, out, D, stride, **launch)
    return out if add_to is None else None


def combine_torch(
    y: torch.Tensor,
    shares: torch.Tensor,
    shared: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    add_to: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Sum over a token's choices y [T * k, D] by shares [T, k], plus sigmoid(gate [T, 1]) * shared [T, D].

    With `add_to` [T, D], contiguous and in y's dtype, the sum is rounded, added to it in place, and None returned.
    """
    T, top_k = shares.shape
    out = (y.float().view(T, top_k, -1) * shares[..., None]).sum(1)
    if shared is not None:
        out = out + gate.float().sigmoid() * shared.float()
    if add_to is None:
        return out.to(y.dtype)
    add_to += out.to(y.dtype)
    return None
