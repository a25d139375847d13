"""Which choices go to which expert, laid out in blocks of one expert each: two launches, no sort, nothing waits for the device.

    route  top_k of each token, its share of each, and how many choices each chunk of tokens gives to each expert
    place  from those counts, where each choice goes

Choices are made by float32 logits, rounded to 32 bits less those of an expert's number; of equals the lower expert is taken. An
expert's choices are in the order of their tokens: the layout is the same every time. The number of blocks is bounded by the number
of tokens; blocks past the last have no rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm.model_executor.layers.fused_moe.ops.weights import overlapping


@dataclass(frozen=True)
class Routed:
    """Choices s = t * top_k + k in blocks of up to `block` of one expert."""

    block: int
    shares: torch.Tensor  # float32 [T, top_k]
    order: torch.Tensor  # int32 [blocks * block]: the choices of block b are those of order[b*block:][:block_rows[b]]
    block_expert: torch.Tensor  # int32 [blocks]
    block_rows: torch.Tensor  # int32 [blocks]

    @property
    def blocks(self) -> int:
        return self.block_rows.shape[0]


LOWEST = tl.constexpr(-(2**31))


@triton.jit
def key_of_logit(logit, e, EP: tl.constexpr):
    """An integer in the order of the logits with the expert in its low bits, counted down: the largest is the choice, ties and all."""
    bits = logit.to(tl.int32, bitcast=True)
    # negative floats grow as their bits shrink
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)) & -EP) | (EP - 1 - e)


@triton.jit
def expert_of_key(key, E, EP: tl.constexpr):
    return tl.minimum(EP - 1 - (key & (EP - 1)), E - 1)


@triton.jit(do_not_specialize=["T"])
def _route_kernel(
    logits,
    experts,
    shares,
    counts,
    T,
    E,
    stride,
    TOP_K: tl.constexpr,
    KP: tl.constexpr,
    EP: tl.constexpr,
    BT: tl.constexpr,
    PDL: tl.constexpr,
):
    """BT tokens: their experts and shares, and how many choices each expert got."""
    t, e, k = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, EP), tl.arange(0, KP)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = logits + t.to(tl.int64)[:, None] * stride
    # [BT, EP]
    inside = (t < T)[:, None] & (e < E)[None, :]
    keys = tl.where(
        inside, key_of_logit(tl.load(row + e[None, :], mask=inside, other=0.0).to(tl.float32), e, EP), LOWEST
    )
    chosen, taken = tl.zeros([BT, KP], tl.int32), tl.zeros([BT, EP], tl.int32)
    for j in tl.static_range(TOP_K):
        best = tl.max(keys, axis=1)[:, None]
        taken += (keys == best).to(tl.int32)
        keys = tl.where(keys == best, LOWEST, keys)
        chosen = tl.where((k == j)[None, :], expert_of_key(best, E, EP), chosen)
    keep = (t < T)[:, None] & (k < TOP_K)[None, :]
    logit = tl.load(row + chosen, mask=keep, other=float("-inf")).to(tl.float32)
    logit = tl.where((t < T)[:, None], logit, 0.0)
    share = tl.exp(logit - tl.max(logit, axis=1)[:, None])
    share = share / tl.sum(share, axis=1)[:, None]
    at = t[:, None] * TOP_K + k[None, :]
    tl.store(experts + at, chosen, mask=keep)
    tl.store(shares + at, share, mask=keep)
    tl.store(counts + tl.program_id(0) * EP + e, tl.sum(tl.where(inside, taken, 0), axis=0))


# a prompt of any length runs what the first one compiled
@triton.jit(do_not_specialize=["choices", "chunks", "blocks"])
def _place_kernel(
    experts,
    counts,
    order,
    block_expert,
    block_rows,
    choices,
    E,
    chunks,
    blocks,
    EP: tl.constexpr,
    BC: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    BB: tl.constexpr,
    GP: tl.constexpr,
    PDL: tl.constexpr,
):
    """By program: where the choices of one chunk go; or what BB blocks hold."""
    pid, e = tl.program_id(0), tl.arange(0, EP)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    # [GP, EP]: added up once, since threads meet for that
    totals, befores = tl.zeros([GP, EP], tl.int32), tl.zeros([GP, EP], tl.int32)
    for g0 in range(0, chunks, GP):
        g = g0 + tl.arange(0, GP)
        count = tl.load(counts + g[:, None] * EP + e[None, :], mask=(g < chunks)[:, None], other=0)
        totals += count
        befores += tl.where((g < pid)[:, None], count, 0)
    total, before = tl.sum(totals, axis=0), tl.sum(befores, axis=0)
    own = (total + BLOCK - 1) // BLOCK
    end = tl.cumsum(own, axis=0)
    if pid < chunks:
        first = (end - own) * BLOCK + before
        i = tl.arange(0, BC)
        choice = pid * CHUNK + i
        keep = (i < CHUNK) & (choice < choices)
        expert = tl.load(experts + choice, mask=keep, other=0)
        # a choice's rank among those of its expert in this chunk
        others = tl.load(experts + choice, mask=keep, other=-1)
        rank = tl.sum(((others[None, :] == expert[:, None]) & (i[None, :] < i[:, None])).to(tl.int32), axis=1)
        place = tl.sum(tl.where(e[None, :] == expert[:, None], first[None, :], 0), axis=1) + rank
        tl.store(order + place, choice, mask=keep)
    else:
        b = (pid - chunks) * BB + tl.arange(0, BB)
        # the expert whose blocks come to an end behind b; E past the last
        of_block = tl.sum(((end[None, :] <= b[:, None]) & (e < E)[None, :]).to(tl.int32), axis=1)
        left = total[None, :] - (b[:, None] - (end - own)[None, :]) * BLOCK
        rows = tl.sum(tl.where(e[None, :] == of_block[:, None], left, 0), axis=1)
        tl.store(block_expert + b, tl.minimum(of_block, E - 1), mask=b < blocks)
        tl.store(block_rows + b, tl.maximum(0, tl.minimum(rows, BLOCK)), mask=b < blocks)


def max_blocks(choices: int, num_experts: int, block: int) -> int:
    """As many blocks as there can be: every expert that has choices may leave one unfilled."""
    return min(choices, (choices + num_experts * (block - 1)) // block)


def route_triton(logits: torch.Tensor, num_experts: int, top_k: int, block: int) -> Routed:
    """Triton form of :func:`route`."""
    T, E = logits.shape[0], num_experts
    BT = 8 if T <= 1024 else 16
    chunks, EP, blocks = triton.cdiv(T, BT), triton.next_power_of_2(E), max_blocks(T * top_k, E, block)
    integers = {"dtype": torch.int32, "device": logits.device}
    experts, counts = torch.empty(T * top_k, **integers), torch.empty(chunks, EP, **integers)
    shares = torch.empty(T, top_k, dtype=torch.float32, device=logits.device)
    lists = torch.empty(blocks * block, **integers), torch.empty(blocks, **integers), torch.empty(blocks, **integers)
    launch = overlapping(logits.device)
    KP = triton.next_power_of_2(top_k)
    counted = {"TOP_K": top_k, "KP": KP, "EP": EP, "BT": BT, "num_warps": BT}
    _route_kernel[(chunks,)](logits, experts, shares, counts, T, E, logits.stride(0), **counted, **launch)
    tile = {"EP": EP, "BC": BT * KP, "CHUNK": BT * top_k, "BLOCK": block, "BB": 16, "GP": 16, "num_warps": 8}
    grid = (chunks + triton.cdiv(blocks, 16),)
    _place_kernel[grid](experts, counts, *lists, T * top_k, E, chunks, blocks, **tile, **launch)
    return Routed(block, shares, *lists)


def route_torch(logits: torch.Tensor, num_experts: int, top_k: int, block: int) -> Routed:
    """PyTorch form of :func:`route`."""
    T = logits.shape[0]
    values = logits[:, :num_experts].float()
    bits, EP = values.contiguous().view(torch.int32), triton.next_power_of_2(num_experts)
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)) & -EP
    # a stable sort: of equals the lower expert
    experts = keys.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    flat = experts.reshape(-1)
    counts = torch.bincount(flat, minlength=num_experts)
    own = (counts + block - 1) // block
    ends = own.cumsum(0)
    order = flat.argsort(stable=True)
    within = torch.arange(T * top_k, device=logits.device) - (counts.cumsum(0) - counts)[flat[order]]
    blocks = max_blocks(T * top_k, num_experts, block)
    placed = torch.full((blocks * block,), -1, dtype=torch.int32, device=logits.device)
    placed[(ends - own)[flat[order]] * block + within] = order.int()
    b = torch.arange(blocks, device=logits.device)
    expert = torch.searchsorted(ends, b, right=True)
    inside = expert.clamp(max=num_experts - 1)
    rows = (counts[inside] - (b - (ends - own)[inside]) * block).clamp(0, block)
    rows = torch.where(expert < num_experts, rows, torch.zeros_like(rows))
    return Routed(block, values.gather(1, experts).softmax(-1), placed, inside.int(), rows.int())


def route(logits: torch.Tensor, num_experts: int, top_k: int, block: int) -> Routed:
    """The top_k experts of each token, and all choices in blocks.

    Args:
        logits: [T, E or more]; columns past E are not experts.
        block: choices a block.
    """
    return (route_triton if logits.is_cuda else route_torch)(logits, num_experts, top_k, block)
