"""The choice of a token from edited logits: temperature, what min_p, top_k and top_p leave, a draw by hashed noise.

On a GPU without a sort and without a copy of the logits. The cut is a value, so it is searched for: each pass over a row counts, or weighs,
what lies above four values at once, until nothing is left between two of them. The draw is one pass that makes each id's noise where it
is needed, and keeps the best of each part of the row; a last small kernel takes the best part.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from vllm.v1.sample.rng import gumbel_noise, row_keys

if TYPE_CHECKING:
    from vllm.v1.sample.state import SamplingPlan, SamplingState

PART = 4096
"""Vocabulary ids of one program of the draw."""
ROWS_FOR_SEARCH = 16
"""From this many rows on they keep the GPU busy with one program each; for fewer, PyTorch's selection spreads a row over the GPU."""

# The hash of rng.py, as signed numbers
_GOLDEN32 = tl.constexpr(0x9E3779B1 - (1 << 32))
_M0, _M1 = tl.constexpr(0x7FEB352D), tl.constexpr(0x846CA68B - (1 << 32))
_M2, _M3 = tl.constexpr(0xC2B2AE35 - (1 << 32)), tl.constexpr(0x27D4EB2F)
_GOLDEN64 = tl.constexpr(0x9E3779B97F4A7C15 - (1 << 64))
_L0, _L1 = tl.constexpr(0xBF58476D1CE4E5B9 - (1 << 64)), tl.constexpr(0x94D049BB133111EB - (1 << 64))


@triton.jit
def _mix64(z):
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * _L0
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * _L1
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


@triton.jit
def _gumbel(seed, position, ids):
    """`rng.gumbel_noise` of one row at ids [N]: float32 [N]."""
    key = _mix64(_mix64(seed + _GOLDEN64) + position * _GOLDEN64)
    x = ((ids + 1) * _GOLDEN32) ^ key.to(tl.int32)
    x = (x ^ ((x >> 16) & 0xFFFF)) * _M0
    x = (x ^ ((x >> 15) & 0x1FFFF)) * _M1
    x = x ^ (key >> 32).to(tl.int32)
    x = (x ^ ((x >> 16) & 0xFFFF)) * _M2
    x = (x ^ ((x >> 13) & 0x7FFFF)) * _M3
    x = x ^ ((x >> 16) & 0xFFFF)
    w = ((x & 0x7FFFFFFF).to(tl.float32) + 0.5) * (0.9999998807907104 / 2147483648.0)
    # -log(1 - w): where w is small, 1 - w has lost what matters
    near = w * (1.0 + w * (0.5 + w * (1.0 / 3 + w * (0.25 + w * (0.2 + w * (1.0 / 6))))))
    return -tl.log(tl.where(w < 0.0625, near, -tl.log(1.0 - w)))


@triton.jit
def _scaled(row, ids, V, temperature):
    """Logits over the temperature; -inf past the row's end."""
    return tl.div_rn(tl.load(row + ids, mask=ids < V, other=float("-inf")).to(tl.float32), temperature)


@triton.jit
def _best_kernel(
    logits,
    rows,
    seeds,
    num_generated,
    temperature,
    noise,
    lowest,
    scores,
    ids,
    V,
    stride,
    DRAWS: tl.constexpr,
    CUT: tl.constexpr,
    PART: tl.constexpr,
):
    """The best score of one part of one row, and the lowest id that has it."""
    s, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = part * PART + tl.arange(0, PART)
    if DRAWS:
        row = tl.load(rows + s)
        x = _scaled(logits + s * stride, i, V, tl.load(temperature + row))
        if CUT:
            x = tl.where(x < tl.load(lowest + s), float("-inf"), x)
        x += _gumbel(tl.load(seeds + row), tl.load(num_generated + row), i) * tl.load(noise + row)
    else:
        x = _scaled(logits + s * stride, i, V, 1.0)
    best = tl.max(x, axis=0)
    at = s * tl.num_programs(1) + part
    tl.store(scores + at, best)
    tl.store(ids + at, tl.min(tl.where((x == best) & (i < V), i, 0x7FFFFFFF), axis=0))


@triton.jit
def _pick_kernel(scores, ids, tokens, parts, BP: tl.constexpr):
    s, i = tl.program_id(0).to(tl.int64), tl.arange(0, BP)
    x = tl.load(scores + s * parts + i, mask=i < parts, other=float("-inf"))
    first = tl.load(ids + s * parts + i, mask=i < parts, other=0x7FFFFFFF)
    best = tl.max(x, axis=0)
    tl.store(tokens + s, tl.min(tl.where(x == best, first, 0x7FFFFFFF), axis=0).to(tl.int64))


@triton.jit
def _search(
    row,
    V,
    temperature,
    low,
    high,
    count_low,
    target,
    floor,
    largest,
    WEIGHED: tl.constexpr,
    TILE: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """A value that cuts the row where the largest t does for which all x >= t count, or weigh, at least `target`.

    `low` is such a t, and count_low values are no less; `high` is none. Ends when at most one value lies between, or the two are neighbours. WEIGHED: weights are
    exp(x - largest), and those below `floor` weigh nothing.
    """
    j = tl.arange(0, 4)
    count_high = count_low * 0.0
    moved = high > low
    while (count_low - count_high > 1.0) & moved:
        pivots = low + (high - low) * ((j + 1).to(tl.float32) * 0.2)  # [4]
        counts = tl.zeros([4, TILE], tl.float32)
        weights = tl.zeros([4, TILE], tl.float32)
        for begin in range(0, V, TILE * UNROLL):
            for u in tl.static_range(UNROLL):
                x = _scaled(row, begin + u * TILE + tl.arange(0, TILE), V, temperature)
                above = x[None, :] >= pivots[:, None]
                counts += tl.where(above, 1.0, 0.0)
                if WEIGHED:
                    weight = tl.where(x >= floor, tl.exp(x - largest), 0.0)
                    weights += tl.where(above, weight[None, :], 0.0)
        count = tl.sum(counts, axis=1)
        good = (tl.sum(weights, axis=1) if WEIGHED else count) >= target
        new_low = tl.maximum(low, tl.max(tl.where(good, pivots, float("-inf")), axis=0))
        new_high = tl.minimum(high, tl.min(tl.where(good, float("inf"), pivots), axis=0))
        count_low = tl.minimum(count_low, tl.min(tl.where(good, count, float("inf")), axis=0))
        count_high = tl.maximum(count_high, tl.max(tl.where(good, 0.0, count), axis=0))
        moved = (new_low > low) | (new_high < high)
        low, high = new_low, new_high
    return low


@triton.jit
def _lowest_kernel(
    logits,
    rows,
    temperature,
    log_min_p,
    top_k,
    top_p,
    lowest,
    V,
    stride,
    TILE: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """`lowest_kept` of one row."""
    s = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + s)
    logits += s * stride
    t, k, p = tl.load(temperature + row), tl.load(top_k + row), tl.load(top_p + row)
    tops = tl.full([TILE], float("-inf"), tl.float32)
    lows = tl.full([TILE], float("inf"), tl.float32)
    counts = tl.zeros([TILE], tl.float32)
    for begin in range(0, V, TILE * UNROLL):
        for u in tl.static_range(UNROLL):
            x = _scaled(logits, begin + u * TILE + tl.arange(0, TILE), V, t)
            tops = tl.maximum(tops, x)
            finite = x > float("-inf")
            lows = tl.minimum(lows, tl.where(finite, x, float("inf")))
            counts += tl.where(finite, 1.0, 0.0)
    largest, smallest = tl.max(tops, axis=0), tl.min(lows, axis=0)
    cut = largest + tl.load(log_min_p + row)
    beyond = largest + tl.maximum(1.0, tl.abs(largest) * 1e-6)
    if (k > 0) & (smallest < largest):
        # where fewer than k are not -inf, all of them stay
        wanted = k.to(tl.float32)
        kth = _search(logits, V, t, smallest, beyond, tl.sum(counts, axis=0), wanted, cut, largest, False, TILE, UNROLL)
        cut = tl.maximum(cut, kth)
    if (p < 1.0) & (smallest < largest):
        sums = tl.zeros([TILE], tl.float32)
        counts = tl.zeros([TILE], tl.float32)
        for begin in range(0, V, TILE * UNROLL):
            for u in tl.static_range(UNROLL):
                x = _scaled(logits, begin + u * TILE + tl.arange(0, TILE), V, t)
                sums += tl.where(x >= cut, tl.exp(x - largest), 0.0)
                counts += tl.where(x >= cut, 1.0, 0.0)
        wanted = p * tl.sum(sums, axis=0)
        floor = tl.maximum(cut, smallest)
        last = _search(logits, V, t, floor, beyond, tl.sum(counts, axis=0), wanted, cut, largest, True, TILE, UNROLL)
        cut = tl.maximum(cut, last)
    tl.store(lowest + s, cut)


def draw_triton(
    logits: torch.Tensor, state: SamplingState, rows: torch.Tensor, plan: SamplingPlan, search: bool | None = None
) -> torch.Tensor:
    """Triton form of :func:`draw`. search: for the cut, whatever the number of rows; None: decide by it."""
    S, V = logits.shape
    if logits.stride(1) != 1:
        raise ValueError(f"rows of the logits must be contiguous, got strides {logits.stride()}")
    tokens = torch.empty(S, dtype=torch.int64, device=logits.device)
    if S == 0:
        return tokens
    cut = plan.draws and bool(plan.min_p or plan.num_sorted)
    lowest = tokens
    if cut and (S >= ROWS_FOR_SEARCH if search is None else search):
        lowest = torch.empty(S, dtype=torch.float32, device=logits.device)
        _lowest_kernel[(S,)](
            logits,
            rows,
            state.temperature,
            state.log_min_p,
            state.top_k,
            state.top_p,
            lowest,
            V,
            logits.stride(0),
            TILE=1024,
            UNROLL=8,
            num_warps=8,
        )
    elif cut:
        scaled = logits.float() / state.temperature[rows, None]
        lowest = lowest_kept(scaled, state.log_min_p[rows], state.top_k[rows], state.top_p[rows], plan)
    parts = triton.cdiv(V, PART)
    scores = torch.empty(S, parts, dtype=torch.float32, device=logits.device)
    ids = torch.empty(S, parts, dtype=torch.int32, device=logits.device)
    _best_kernel[(S, parts)](
        logits,
        rows,
        state.seeds,
        state.num_generated,
        state.temperature,
        state.noise,
        lowest,
        scores,
        ids,
        V,
        logits.stride(0),
        DRAWS=plan.draws,
        CUT=cut,
        PART=PART,
        num_warps=4,
    )
    _pick_kernel[(S,)](scores, ids, tokens, parts, BP=triton.next_power_of_2(parts), num_warps=1)
    return tokens


def draw_torch(logits: torch.Tensor, state: SamplingState, rows: torch.Tensor, plan: SamplingPlan) -> torch.Tensor:
    """PyTorch form of :func:`draw`."""
    if not plan.draws:
        return logits.argmax(dim=-1)
    logits = logits.float() / state.temperature[rows, None]
    if plan.min_p or plan.num_sorted:
        lowest = lowest_kept(logits, state.log_min_p[rows], state.top_k[rows], state.top_p[rows], plan)
        logits.masked_fill_(logits < lowest[:, None], float("-inf"))
    noise = gumbel_noise(row_keys(state.seeds[rows], state.num_generated[rows]), logits.shape[1])
    return logits.addcmul_(noise, state.noise[rows, None]).argmax(dim=-1)


def draw(logits: torch.Tensor, state: SamplingState, rows: torch.Tensor, plan: SamplingPlan) -> torch.Tensor:
    """One token a row; of equal scores the lowest id's. Does not wait for the device.

    Args:
        logits: [S, V], any floating dtype, after all edits; left as they are.
        rows: [S] int64, each one's row of the state.
        plan: what the rows need, taken together.

    Returns:
        [S] int64.
    """
    return (draw_triton if logits.is_cuda else draw_torch)(logits, state, rows, plan)


def lowest_kept(
    logits: torch.Tensor, log_min_p: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, plan: SamplingPlan
) -> torch.Tensor:
    """The smallest logit that min_p, then top_k, then top_p leave standing.

    Each of the three keeps the largest logits, so a value says all, and tokens that tie with the last one kept stay too: who
    survives never depends on the order in which a sort happens to leave equals.

    Args:
        logits: [s, V] float32, after the temperature.
        log_min_p, top_p: [s] float32; top_k: [s] int64, 0 for all.

    Returns:
        [s] float32.
    """
    largest = logits.amax(dim=-1)
    lowest = largest + log_min_p
    if plan.num_sorted == 0:
        return lowest

    if plan.num_sorted < logits.shape[1]:
        ordered = logits.topk(plan.num_sorted, dim=-1).values  # [s, num_sorted], largest first
    else:
        ordered = logits.sort(dim=-1, descending=True).values
    kth = ordered.gather(1, (top_k[:, None] - 1).clamp(min=0)).squeeze(1)
    lowest = torch.maximum(lowest, kth.masked_fill(top_k == 0, float("-inf")))
    if not plan.top_p:
        return lowest

    # What is kept so far need not end within `ordered` (ties), so its total weight comes from the whole row. Sums of 248,320
    # float32 weights would be off by more than the tail's share.
    weights = (logits - largest[:, None]).exp_().masked_fill_(logits < lowest[:, None], 0.0)
    total = weights.sum(dim=-1, dtype=torch.float64)
    ordered_weights = (ordered - largest[:, None]).exp_().masked_fill_(ordered < lowest[:, None], 0.0).to(torch.float64)
    before = ordered_weights.cumsum(dim=-1) - ordered_weights
    kept = before < top_p[:, None] * total[:, None]
    smallest = ordered.masked_fill(~kept, float("inf")).amin(dim=-1)
    return torch.maximum(lowest, smallest.masked_fill(top_p >= 1.0, float("-inf")))
