"""A mixture of experts for a few tokens, in three launches: it takes as long as the chosen experts' weights take to arrive.

    front    what depends on x alone: logits, the shared expert's first half (ops/front.py)
    gate_up  silu(gate_e x) * up_e x of every choice: each program finds its expert among the logits for itself
    down     the weighted sum over a token's choices and the shared expert, each output written once

Nothing is sorted, cleared or added atomically, and grids depend on the number of tokens alone. The launches overlap: `front` has its
weights under way before x is written, and `down` has the experts' before `gate_up` is done. `down` may read the logits that early since
it starts after all of `gate_up` has seen `front` complete; past the L1 cache, which nothing has yet told to forget.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from vllm.model_executor.layers.fused_moe.ops.front import front_triton
from vllm.model_executor.layers.fused_moe.ops.route import LOWEST, expert_of_key, key_of_logit
from vllm.model_executor.layers.fused_moe.ops.weights import (
    PLANES,
    MoEWeights,
    absent,
    dense,
    groups_of,
    load_planes,
    load_tile,
    operands,
    overlapping,
    plane_sums,
    row_tile,
    store_sum,
    swiglu,
    tile_products,
)
from vllm.model_executor.layers.ops.rms_norm import Unnormed, normed, rows_of


@triton.jit
def expert_keys(logits, E, EP: tl.constexpr):
    """[EP] keys of one token's experts."""
    e = tl.arange(0, EP)
    logit = tl.load(logits + e, mask=e < E, other=0.0, cache_modifier=".cg")
    return tl.where(e < E, key_of_logit(logit, e, EP), LOWEST)


@triton.jit
def _gate_up_kernel(
    x,
    logits,
    w13,
    w13_scale,
    w13_zero,
    w13_factor,
    h,
    chosen,
    E,
    I,
    TOP_K: tl.constexpr,
    D: tl.constexpr,
    EP: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
    W13_KIND: tl.constexpr,
    W13_WORDS: tl.constexpr,
    W13_GROUP: tl.constexpr,
    W13_SCALE_ROWS: tl.constexpr,
    H_PLANES: tl.constexpr,
    PDL: tl.constexpr,
):
    """BN outputs of one choice. x is in the order of planes, and h is written in w2's."""
    choice = tl.program_id(1)
    t = choice // TOP_K
    c = tl.arange(0, BW)
    P: tl.constexpr = D // W13_WORDS
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    keys = expert_keys(logits + t * (E + 1), E, EP)
    for _ in range(choice % TOP_K):
        keys = tl.where(keys == tl.max(keys, axis=0), LOWEST, keys)
    expert = expert_of_key(tl.max(keys, axis=0), E, EP)
    if tl.program_id(0) == 0:
        tl.store(chosen + choice, expert)
    at_x = x + t * D + c
    xs = load_planes(at_x, W13_WORDS, c < W13_WORDS, P)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    row = expert.to(tl.int64) * (2 * I) + tl.minimum(n, I - 1)
    BG: tl.constexpr = groups_of(W13_GROUP, BW)
    g, u = tl.zeros([BN, BG], tl.float32), tl.zeros([BN, BG], tl.float32)
    for w0 in tl.static_range(0, W13_WORDS, BW):
        # [BN, BW]
        at = row_tile(row, w0, W13_WORDS, W13_GROUP, W13_SCALE_ROWS, BW)
        w_gate, s_gate, z_gate = load_tile(w13, w13_scale, w13_zero, at[0], at[1], at[2], at[3], W13_GROUP)
        at = row_tile(row + I, w0, W13_WORDS, W13_GROUP, W13_SCALE_ROWS, BW)
        w_up, s_up, z_up = load_tile(w13, w13_scale, w13_zero, at[0], at[1], at[2], at[3], W13_GROUP)
        if w0 > 0:
            xs = load_planes(at_x + w0, W13_WORDS, w0 + c < W13_WORDS, P)
        shift, total = plane_sums(xs, P, W13_KIND, w13_zero is not None)
        g += tile_products(w_gate, s_gate, z_gate, xs, shift, total, P, W13_KIND, BG, w13_zero is not None)
        u += tile_products(w_up, s_up, z_up, xs, shift, total, P, W13_KIND, BG, w13_zero is not None)
    gate, up = tl.sum(g, axis=1), tl.sum(u, axis=1)
    if w13_factor is not None:
        gate, up = gate * tl.load(w13_factor + row), up * tl.load(w13_factor + row + I)
    y = swiglu(gate, up)
    at_h = h + choice * I + (n % H_PLANES) * (I // H_PLANES) + n // H_PLANES
    tl.store(at_h, y.to(h.dtype.element_ty), mask=n < I)


@triton.jit
def _down_kernel(
    h,
    hs,
    logits,
    chosen,
    w2,
    w2_scale,
    w2_zero,
    w2_factor,
    s2,
    s2_scale,
    s2_zero,
    s2_factor,
    y,
    E,
    D,
    I: tl.constexpr,
    S: tl.constexpr,
    TOP_K: tl.constexpr,
    KP: tl.constexpr,
    EP: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
    BS: tl.constexpr,
    RUN: tl.constexpr,
    EARLY: tl.constexpr,
    W2_KIND: tl.constexpr,
    W2_WORDS: tl.constexpr,
    W2_GROUP: tl.constexpr,
    W2_SCALE_ROWS: tl.constexpr,
    S2_KIND: tl.constexpr,
    S2_WORDS: tl.constexpr,
    S2_GROUP: tl.constexpr,
    S2_SCALE_ROWS: tl.constexpr,
    ADD: tl.constexpr,
    PDL: tl.constexpr,
):
    """BN outputs of one token: tiles [BN, J] with the words of all its choices side by side, J = KP * BW.

    EARLY: choose again from the logits, to have the first weights under way before gate_up is done. ADD: to what is in y.
    """
    t = tl.program_id(1)
    BG: tl.constexpr = groups_of(W2_GROUP, BW)
    # of each word and of each group: its choice, and where it is in the row
    j, jg, cs = tl.arange(0, KP * BW), tl.arange(0, KP * BG), tl.arange(0, BS)
    s, c, sg, cg = j // BW, j % BW, jg // BG, jg % BG
    if EARLY:
        keys = expert_keys(logits + t * (E + 1), E, EP)
        experts, experts_g = tl.zeros([KP * BW], tl.int32), tl.zeros([KP * BG], tl.int32)
        for k in tl.static_range(TOP_K):
            best = tl.max(keys, axis=0)
            keys = tl.where(keys == best, LOWEST, keys)
            experts = tl.where(s == k, expert_of_key(best, E, EP), experts)
            experts_g = tl.where(sg == k, expert_of_key(best, E, EP), experts_g)
    else:
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        experts = tl.load(chosen + t * TOP_K + s, mask=s < TOP_K, other=0)
        experts_g = tl.load(chosen + t * TOP_K + sg, mask=sg < TOP_K, other=0)
    logit = tl.load(logits + t * (E + 1) + experts_g, mask=sg < TOP_K, other=float("-inf"), cache_modifier=".cg")
    share = tl.exp(logit - tl.max(logit, axis=0))
    share = share / (tl.sum(share, axis=0) / BG)
    at_h = h + (t * TOP_K + s) * I + c
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.minimum(n, D - 1)
    # [BN, J] and [BN, BS]
    rows = experts.to(tl.int64)[None, :] * D + row[:, None]
    rows_g = (experts_g.to(tl.int64)[None, :] * D + row[:, None]) // W2_SCALE_ROWS
    at = tl.max_contiguous(tl.multiple_of(rows * W2_WORDS + c[None, :], [1, RUN]), [1, RUN])
    at_g, keep, keep_g = at, (s < TOP_K) & (c < W2_WORDS), s < TOP_K
    if W2_GROUP > 0:
        at_g, keep_g = rows_g * (W2_WORDS // W2_GROUP) + cg[None, :], (sg < TOP_K) & (cg < W2_WORDS // W2_GROUP)
    w, ws, wz = load_tile(w2, w2_scale, w2_zero, at, keep[None, :], at_g, keep_g[None, :], W2_GROUP)
    if s2 is not None:
        at_s = row_tile(row, 0, S2_WORDS, S2_GROUP, S2_SCALE_ROWS, BS)
        v, vs, vz = load_tile(s2, s2_scale, s2_zero, at_s[0], at_s[1], at_s[2], at_s[3], S2_GROUP)
    if EARLY and PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    old = row
    if ADD:
        old = tl.load(y + t * D + row)
    acc = tl.zeros([BN, KP * BG], tl.float32)
    for w0 in tl.static_range(0, W2_WORDS, BW):
        keep = (s < TOP_K) & (w0 + c < W2_WORDS)
        if w0 > 0:
            # a row's one group, or whole groups further on
            first = 0 if W2_GROUP == 0 else w0 // W2_GROUP
            keep_g = (sg < TOP_K) & (first + cg < W2_WORDS // max(1, W2_GROUP))
            w, ws, wz = load_tile(
                w2, w2_scale, w2_zero, at + w0, keep[None, :], at_g + first, keep_g[None, :], W2_GROUP
            )
        hp = load_planes(at_h + w0, W2_WORDS, keep, I // W2_WORDS)
        shift, total = plane_sums(hp, I // W2_WORDS, W2_KIND, w2_zero is not None)
        acc += tile_products(w, ws, wz, hp, shift, total, I // W2_WORDS, W2_KIND, KP * BG, w2_zero is not None)
    if w2_factor is not None:
        at_factor = experts_g.to(tl.int64)[None, :] * D + row[:, None]
        acc *= tl.load(w2_factor + at_factor, mask=(sg < TOP_K)[None, :], other=0.0)
    out = tl.sum(acc * share[None, :], axis=1)
    if s2 is not None:
        SG: tl.constexpr = groups_of(S2_GROUP, BS)
        hp = load_planes(hs + t * S + cs, S2_WORDS, cs < S2_WORDS, S // S2_WORDS)
        shift, total = plane_sums(hp, S // S2_WORDS, S2_KIND, s2_zero is not None)
        ys = tile_products(v, vs, vz, hp, shift, total, S // S2_WORDS, S2_KIND, SG, s2_zero is not None)
        g = tl.load(logits + t * (E + 1) + E)
        ys = tl.sum(ys, axis=1)
        if s2_factor is not None:
            ys *= tl.load(s2_factor + row)
        out += ys / (1.0 + tl.exp(-g))
    store_sum(y + t * D + n, out, old, n < D, ADD)


def _divisor(words: int, most: int) -> int:
    """The largest power of two that divides `words`, up to `most`."""
    return min(words & -words, most)


def plan_few_tokens(T: int, top_k: int, w13_words: int, w2_words: int) -> dict[str, dict[str, int]]:
    """Tiles of gate_up and down.

    Args:
        w13_words, w2_words: stored words of an expert's rows.
    """
    # Enough bytes in flight on every multiprocessor, and few enough registers that four programs share one.
    gate_up = {"BW": _divisor(w13_words, 256), "num_warps": 4}
    words = 1024 if w13_words > gate_up["BW"] else 2048 if T == 1 else 4096
    gate_up["BN"] = min(32, max(1, words // gate_up["BW"]))
    KP = triton.next_power_of_2(top_k)
    down = {"BW": min(triton.next_power_of_2(w2_words), 128), "num_warps": 4 if T == 1 else 2, "EARLY": T == 1}
    down["BN"] = min(32, max(1, 2048 // (KP * down["BW"])))
    return {"gate_up": gate_up, "down": down}


def moe_few_tokens_triton(
    x: torch.Tensor | Unnormed, weights: MoEWeights, top_k: int, add_to: torch.Tensor | None = None
) -> torch.Tensor | None:
    """Triton form of :func:`moe_few_tokens`."""
    w, (T, D), (E, _) = weights, x.shape, weights.router.shape
    I, S = w.w13.values.shape[-2] // 2, 0 if w.s2 is None else w.s13.values.shape[-2] // 2
    w13_planes, w2_planes, s2_planes = (PLANES[part.kind] if part else 1 for part in (w.w13, w.w2, w.s2))
    w2_words = w.w2.values.shape[-1]
    plan = plan_few_tokens(T, top_k, w.w13.values.shape[-1], w2_words)
    gate_up, down = plan["gate_up"], plan["down"]
    EP, launch = triton.next_power_of_2(E), overlapping(rows_of(x).device)
    logits, hs, xp = front_triton(x, weights, hs_planes=s2_planes, xp_planes=w13_planes)
    h, y = xp.new_empty(T * top_k, I), xp.new_empty(T, D) if add_to is None else add_to
    chosen = torch.empty(T * top_k, dtype=torch.int32, device=xp.device)
    _gate_up_kernel[(triton.cdiv(I, gate_up["BN"]), T * top_k)](
        xp,
        logits,
        **operands(w.w13, "w13"),
        h=h,
        chosen=chosen,
        E=E,
        I=I,
        TOP_K=top_k,
        D=D,
        EP=EP,
        H_PLANES=w2_planes,
        **gate_up,
        **launch,
    )
    _down_kernel[(triton.cdiv(D, down["BN"]), T)](
        h,
        hs,
        logits,
        chosen,
        **operands(w.w2, "w2"),
        **(operands(w.s2, "s2") if S else absent("s2", 1)),
        y=y,
        E=E,
        D=D,
        I=I,
        S=S,
        TOP_K=top_k,
        KP=triton.next_power_of_2(top_k),
        EP=EP,
        BS=triton.next_power_of_2(w.s2.values.shape[-1]) if S else 1,
        ADD=add_to is not None,
        RUN=_divisor(w2_words, min(down["BW"], 16 // w.w2.values.element_size())),
        **down,
        **launch,
    )
    return y if add_to is None else None


def moe_few_tokens_torch(
    x: torch.Tensor | Unnormed, weights: MoEWeights, top_k: int, add_to: torch.Tensor | None = None
) -> torch.Tensor | None:
    """PyTorch form of :func:`moe_few_tokens`: all experts for all tokens, in float32."""
    x = normed(x)
    wide = x.float()
    logits = wide @ weights.router.float().T  # [T, E]
    best, experts = logits.topk(top_k, dim=-1)
    y = _swiglu(wide, dense(weights.w13), dense(weights.w2))  # [E, T, D]
    y = y.transpose(0, 1).gather(1, experts[..., None].expand(-1, -1, x.shape[1]))  # [T, k, D]
    y = (y * best.softmax(-1)[..., None]).sum(1)
    if weights.s13 is not None:
        y = y + _swiglu(wide, dense(weights.s13), dense(weights.s2)) * (wide @ weights.gate.float().T).sigmoid()
    if add_to is None:
        return y.to(x.dtype)
    add_to += y.to(x.dtype)
    return None


def _swiglu(x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    gate, up = (x @ w13.mT).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ w2.mT


def moe_few_tokens(
    x: torch.Tensor | Unnormed, weights: MoEWeights, top_k: int, add_to: torch.Tensor | None = None
) -> torch.Tensor | None:
    """Each token's top_k experts by softmax over the router's logits, weighted and renormalised, plus the gated shared expert.

    Weights must not be written by the kernel right before in the stream: they are read before that kernel ends.

    Args:
        x: [T, D] in bfloat16 or float16. weights: as `fits` wants them.
        add_to: contiguous [T, D] in x's dtype that the result, rounded to it, is added to. It may be x's own rows, still to be normalised.

    Returns:
        [T, D] in x's dtype, None with `add_to`; sums are float32, what goes between gate_up and down is x's dtype.
    """
    return (moe_few_tokens_triton if rows_of(x).is_cuda else moe_few_tokens_torch)(x, weights, top_k, add_to)
