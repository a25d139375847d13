"""What a mixture of experts makes of x alone, in one launch before its experts are known.

    logits  of the router, and of the shared expert's gate in one column more
    hs      the shared expert's silu(gate x) * up x
    xp      x in the order of planes (`ops/weights.py`) that packed experts ask for

Weights are under way before x is written. Where x is still to be normalised, every program does so for itself, and xp is normalised.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from vllm.model_executor.layers.fla.ops.device import INTERPRETED, dot
from vllm.model_executor.layers.fused_moe.ops.weights import (
    MoEWeights,
    absent,
    dense,
    groups_of,
    load_planes,
    load_tile,
    normed_planes,
    operands,
    overlapping,
    plane_sums,
    row_tile,
    swiglu,
    tile_products,
)
from vllm.model_executor.layers.ops.rms_norm import Unnormed, normed, rows_of


@triton.jit
def _copy_by_planes(
    x,
    norm,
    xp,
    t,
    D: tl.constexpr,
    BD: tl.constexpr,
    PLANES: tl.constexpr,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    PDL: tl.constexpr,
):
    """Row t of x, behind a norm where there is one: element P*c + i to xp's i*D/P + c."""
    c = tl.arange(0, BD // PLANES)
    ws = (c,)
    if norm is not None:
        ws = load_planes(norm + PLANES * c, 1, c < D // PLANES, PLANES)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    xs = load_planes(x + t * D + PLANES * c, 1, c < D // PLANES, PLANES)
    if norm is not None:
        xs = normed_planes(xs, ws, D, PLANES, EPS, OFFSET)
    for i in tl.static_range(PLANES):
        tl.store(xp + t * D + i * (D // PLANES) + c, xs[i], mask=c < D // PLANES)


@triton.jit
def _front_kernel(
    x,
    norm,
    router,
    gate,
    s13,
    s13_scale,
    s13_zero,
    s13_factor,
    logits,
    hs,
    xp,
    T,
    E,
    S,
    router_programs,
    shared_programs,
    D: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    BP: tl.constexpr,
    S13_KIND: tl.constexpr,
    S13_WORDS: tl.constexpr,
    S13_GROUP: tl.constexpr,
    S13_SCALE_ROWS: tl.constexpr,
    HS_PLANES: tl.constexpr,
    XP_PLANES: tl.constexpr,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    PDL: tl.constexpr,
):
    """By program: BR rows of the router; the gate; BP pairs of rows of the shared expert; the copy of a token's x by planes.

    norm: weight of the norm that x has still to go through, or None.
    """
    pid = tl.program_id(0)
    if pid < router_programs:
        is_gate = (pid == router_programs - 1) & (gate is not None)
        rows = tl.where(is_gate, 1, E)
        r = tl.where(is_gate, 0, pid * BR) + tl.arange(0, BR)
        d = tl.arange(0, BD)
        base = router
        if gate is not None:
            base = tl.where(is_gate, gate, router)
        # [BR, BD]
        w = tl.load(base + tl.minimum(r, rows - 1)[:, None] * D + d[None, :], mask=(d < D)[None, :], other=0.0)
        ws = (d,)
        if norm is not None:
            ws = load_planes(norm + d, 0, d < D, 1)
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        for t in range(T):
            xs = load_planes(x + t * D + d, 0, d < D, 1)
            if norm is not None:
                xs = normed_planes(xs, ws, D, 1, EPS, OFFSET)
            sums = tl.sum(w.to(tl.float32) * xs[0].to(tl.float32)[None, :], axis=1)
            tl.store(logits + t * (E + 1) + tl.where(is_gate, E, r), sums, mask=r < rows)
    elif pid < router_programs + shared_programs:
        P: tl.constexpr = D // S13_WORDS
        BW: tl.constexpr = BD // P
        n = (pid - router_programs) * BP + tl.arange(0, BP)
        c, row = tl.arange(0, BW), tl.minimum(n, S - 1)
        BG: tl.constexpr = groups_of(S13_GROUP, BW)
        # [BP, BW]
        at = row_tile(row, 0, S13_WORDS, S13_GROUP, S13_SCALE_ROWS, BW)
        w_gate, s_gate, z_gate = load_tile(s13, s13_scale, s13_zero, at[0], at[1], at[2], at[3], S13_GROUP)
        at = row_tile(row + S, 0, S13_WORDS, S13_GROUP, S13_SCALE_ROWS, BW)
        w_up, s_up, z_up = load_tile(s13, s13_scale, s13_zero, at[0], at[1], at[2], at[3], S13_GROUP)
        ws = (c,)
        if norm is not None:
            ws = load_planes(norm + P * c, 1, c < S13_WORDS, P)
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        gate_factor, up_factor = 1.0, 1.0
        if s13_factor is not None:
            gate_factor, up_factor = tl.load(s13_factor + row), tl.load(s13_factor + row + S)
        for t in range(T):
            xs = load_planes(x + t * D + P * c, 1, c < S13_WORDS, P)
            if norm is not None:
                xs = normed_planes(xs, ws, D, P, EPS, OFFSET)
            shift, total = plane_sums(xs, P, S13_KIND, s13_zero is not None)
            g = tile_products(w_gate, s_gate, z_gate, xs, shift, total, P, S13_KIND, BG, s13_zero is not None)
            u = tile_products(w_up, s_up, z_up, xs, shift, total, P, S13_KIND, BG, s13_zero is not None)
            y = swiglu(tl.sum(g, axis=1) * gate_factor, tl.sum(u, axis=1) * up_factor)
            at_h = hs + t * S + (n % HS_PLANES) * (S // HS_PLANES) + n // HS_PLANES
            tl.store(at_h, y.to(hs.dtype.element_ty), mask=n < S)
    else:
        t = pid - router_programs - shared_programs
        _copy_by_planes(x, norm, xp, t, D, BD, XP_PLANES, EPS, OFFSET, PDL)


@triton.jit
def _weighted(x, w, OFFSET: tl.constexpr):
    """x [BM, BK] times a norm's weight w + OFFSET [BK], 0 or 1, in bfloat16: two elements an instruction, which rounds once."""
    w = tl.broadcast_to(w[None, :], x.shape)
    if INTERPRETED:
        return (x.to(tl.float32) * (w.to(tl.float32) + OFFSET)).to(x.dtype)
    else:
        TIMES: tl.constexpr = "fma.rn.bf16x2 $0, $1, $2, $1;" if OFFSET else "mul.rn.bf16x2 $0, $1, $2;"
        return tl.inline_asm_elementwise(TIMES, "=r,r,r", [x, w], dtype=x.dtype, is_pure=True, pack=2)


@triton.jit(do_not_specialize=["T"])  # a prompt of any length runs what the first one compiled
def _front_rows_kernel(
    x,
    norm,
    router,
    gate,
    s13,
    logits,
    hs,
    xp,
    T,
    E,
    S,
    router_programs,
    shared_programs,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    HS_PLANES: tl.constexpr,
    XP_PLANES: tl.constexpr,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    PDL: tl.constexpr,
):
    """The front for several tokens and plain weights: 16 rows of W a program, those of the shared expert as 8 pairs.

    A norm's weight goes to x tile by tile, and each row's scale, which is known at the end, to the sums.
    """
    pid = tl.program_id(0)
    if pid < router_programs + shared_programs:
        lane, m, d = tl.arange(0, 16), tl.arange(0, BM), tl.arange(0, BK)
        r, rows, base, column = pid * 16 + lane, E, router, pid * 16 + lane
        if gate is not None:
            is_gate, is_shared = pid == router_programs - 1, pid >= router_programs
            pair = (pid - router_programs) * 8 + lane // 2
            base = tl.where(is_shared, s13, tl.where(is_gate, gate, router))
            rows = tl.where(is_gate, 1, E)
            r = tl.where(is_gate, lane, r)
            column = tl.where(is_gate, E, r)
            r = tl.where(is_shared, tl.minimum(pair, S - 1) + lane % 2 * S, tl.minimum(r, rows - 1))
        else:
            is_shared = False
            r = tl.minimum(r, E - 1)
        at_w = base + r[:, None] * D + d[None, :]
        at_x = x + tl.minimum(m, T - 1)[:, None] * D + d[None, :]
        # [16, BK], the first tile on its way before x is known
        w = tl.load(at_w)
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        # [16, BM]
        if norm is None:
            acc = dot(w, tl.trans(tl.load(at_x)))
            for i in range(BK, D, BK):
                acc += dot(tl.load(at_w + i), tl.trans(tl.load(at_x + i)))
        else:
            x_i = tl.load(at_x)
            # [BM, BM], whose diagonal has the sums of the squares
            squares = dot(x_i, tl.trans(x_i))
            acc = dot(w, tl.trans(_weighted(x_i, tl.load(norm + d), OFFSET)))
            for i in range(BK, D, BK):
                x_i = tl.load(at_x + i)
                squares += dot(x_i, tl.trans(x_i))
                acc += dot(tl.load(at_w + i), tl.trans(_weighted(x_i, tl.load(norm + i + d), OFFSET)))
            own = tl.sum(tl.where(m[:, None] == m[None, :], squares, 0.0), axis=0)
            acc *= tl.rsqrt(own / D + EPS)[None, :]
        if is_shared:
            g, u = tl.split(tl.permute(tl.reshape(acc, [8, 2, BM]), (0, 2, 1)))
            n = (pid - router_programs) * 8 + tl.arange(0, 8)
            at_h = hs + m[None, :] * S + ((n % HS_PLANES) * (S // HS_PLANES) + n // HS_PLANES)[:, None]
            tl.store(at_h, swiglu(g, u).to(hs.dtype.element_ty), mask=(n < S)[:, None] & (m < T)[None, :])
        else:
            at = logits + m[None, :] * (E + 1) + column[:, None]
            tl.store(at, acc, mask=((column < E) | ((column == E) & (lane == 0)))[:, None] & (m < T)[None, :])
    else:
        t = pid - router_programs - shared_programs
        _copy_by_planes(x, norm, xp, t, D, BD, XP_PLANES, EPS, OFFSET, PDL)


def plan_front() -> dict[str, int]:
    """Tile of the front for one token or two: whole rows of 4 KB for D 2048, as many in flight as a program can hold."""
    return {"BR": 4, "BP": 2, "num_warps": 4}


def plan_front_rows(T: int) -> dict[str, int]:
    """Tile of the front for more tokens."""
    BM = max(16, triton.next_power_of_2(T))
    # four stages within the 99 KiB of shared memory of sm_120
    return {"BR": 16, "BP": 8, "BM": BM, "BK": 256 if BM <= 32 else 128, "num_warps": 2, "num_stages": 4}


def prefers_rows(T: int, weights: MoEWeights) -> bool:
    """Whether the front takes rows of tokens at once, which it does for plain weights alone."""
    plain = weights.s13 is None or weights.s13.kind == "plain"
    return T > 2 and weights.router.shape[1] % 256 == 0 and plain


def front_triton(
    x: torch.Tensor | Unnormed, weights: MoEWeights, *, hs_planes: int, xp_planes: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Triton form of :func:`front_torch`, for weights that `fits` lets through.

    Returns:
        logits float32 [T, E + 1], the shared expert's gate last (left out where there is none); the shared expert's silu(gate x) * up x
        [T, S] in the order of `hs_planes`; x in the order of `xp_planes`, normalised.
    """
    w, (T, D), (E, _) = weights, x.shape, weights.router.shape
    norm, eps, offset = (x.weight, x.eps, int(x.plus_one)) if isinstance(x, Unnormed) else (None, 0.0, 0)
    x = rows_of(x).contiguous()
    S = 0 if w.s13 is None else w.s13.values.shape[-2] // 2
    rows = prefers_rows(T, weights)
    plan = plan_front_rows(T) if rows else plan_front()
    BR, BP = plan.pop("BR"), plan.pop("BP")
    plan |= overlapping(x.device)
    logits = torch.empty(T, E + 1, dtype=torch.float32, device=x.device)
    copies = xp_planes > 1 or norm is not None
    xp = torch.empty_like(x) if copies else x
    hs = x.new_empty(T, S)
    router_programs, shared_programs = triton.cdiv(E, BR) + (w.gate is not None), triton.cdiv(S, BP)
    grid = (router_programs + shared_programs + (T if copies else 0),)
    counts = {"T": T, "E": E, "S": S, "router_programs": router_programs, "shared_programs": shared_programs}
    sizes = {"D": D, "BD": triton.next_power_of_2(D), "HS_PLANES": hs_planes, "XP_PLANES": xp_planes}
    sizes |= {"EPS": eps, "OFFSET": offset}
    # without a shared expert no program reads what stands in for it
    hs_or_x = hs if S else x
    if rows:
        s13 = w.s13.values if S else w.router
        _front_rows_kernel[grid](x, norm, w.router, w.gate, s13, logits, hs_or_x, xp, **counts, **sizes, **plan)
    else:
        s13 = operands(w.s13, "s13") if S else absent("s13", D) | {"s13": w.router, "S13_KIND": "plain"}
        plan |= {"BR": BR, "BP": BP}
        _front_kernel[grid](
            x, norm, w.router, w.gate, logits=logits, hs=hs_or_x, xp=xp, **s13, **counts, **sizes, **plan
        )
    return logits, hs, xp


def front_torch(
    x: torch.Tensor | Unnormed, weights: MoEWeights, *, hs_planes: int, xp_planes: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """PyTorch form, in float32: logits [T, E + 1] (without a shared expert [T, E]), hs [T, S] and x [T, D] by planes."""
    x = normed(x)
    wide = x.float()
    logits, hs = wide @ weights.router.float().T, x.new_empty(x.shape[0], 0)
    if weights.s13 is not None:
        logits = torch.cat([logits, wide @ weights.gate.float().T], dim=1)
        gate, up = (wide @ dense(weights.s13).T).chunk(2, dim=-1)
        hs = F.silu(gate) * up
    return logits, by_planes_torch(hs, hs_planes), by_planes_torch(x, xp_planes)


def by_planes_torch(x: torch.Tensor, planes: int) -> torch.Tensor:
    """x [T, D]: element planes*c + i to column i*D/planes + c."""
    return x.unflatten(1, (-1, planes)).transpose(1, 2).flatten(1) if x.shape[1] else x
