"""One token a sequence: from the projection's rows to the input of the output projection, in two launches.

A program takes one key/value head of one sequence and a piece of its pages. Each repeats the norm and the rotation of the few query heads,
which is cheap. The piece at the end of the sequence also makes the newest key and value, keeps them in registers for its own sum and
writes them to their page, so that nothing waits for memory that was just written.

Where a sequence has several pieces, each leaves (largest score, sum of weights, weighted values) in memory and a second kernel adds them up
("Flash-Decoding for long-context inference", 2023). How many there are follows from the length, which only the device knows: the grid
is that of the longest sequence, and programs past the last piece end at once.
"""

import torch
import triton
import triton.language as tl

from vllm.model_executor.layers.fla.ops.device import multiprocessors, overlaps_launches

from .attention_rows import (
    LOG2E,
    as_stored,
    attend_tile,
    normed_and_turned,
    page_arguments,
    row_constants,
    tile_offsets,
)
from .attention_torch import Pages, ProjectedRows, attend_decode, prepare_torch, write_pages

MAX_SPLITS = 128
"""Pieces that the second kernel adds up at once."""


@triton.jit
def _pieces(length, splits, least, BN: tl.constexpr):
    """Tokens of a sequence that are in its pages, tiles of a piece, and pieces."""
    old = tl.maximum(length - 1, 0)
    tiles = tl.cdiv(old, BN)
    per_split = tl.maximum(tl.cdiv(tiles, splits), least)
    return old, per_split, tl.maximum(tl.cdiv(tiles, per_split), 1)


@triton.jit(do_not_specialize=["S", "splits", "least", "stride_table"])
def _decode_kernel(
    qkv,
    cos_sin,
    q_weight,
    k_weight,
    keys,
    values,
    block_table,
    seq_lens,
    out,
    sums,
    stats,
    S,
    splits,
    least,
    eps,
    scale,
    k_scale,
    v_scale,
    inverse_k_scale,
    inverse_v_scale,
    stride_qkv,
    stride_table,
    stride_page,
    G: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    ROTARY: tl.constexpr,
    PAGE: tl.constexpr,
    FLOAT8: tl.constexpr,
    WIDE: tl.constexpr,
    BG: tl.constexpr,
    BN: tl.constexpr,
    PDL: tl.constexpr,
):
    """Pieces of at least `least` tiles of BN tokens, at most `splits` a sequence. Piece by piece, so that the empty ones come last."""
    unit, split = tl.program_id(0) % (S * HKV), tl.program_id(0) // (S * HKV)
    row, head = (unit // HKV).to(tl.int64), unit % HKV
    length = tl.load(seq_lens + row)
    old, per_split, used = _pieces(length, splits, least, BN)
    if split >= used:
        return
    d, g, n = tl.arange(0, BD), tl.arange(0, BG), tl.arange(0, BN)
    cells = (g < G)[:, None] & (d < D)[None, :]
    begin = split * per_split * BN
    end = tl.minimum(begin + per_split * BN, old)
    block_table += row * stride_table
    keys += head * D
    values += head * D
    # the last tile, which alone may be less than whole, comes first: the pages of earlier tokens are older than the kernel ahead, so that
    # it can be on its way before that one ends
    whole = begin + tl.maximum(tl.cdiv(end - begin, BN) - 1, 0) * BN
    inside = whole + n < end
    features = (d < D)[None, :]
    at = tile_offsets(
        tl.load(block_table + (whole + n) // PAGE, mask=inside, other=0), whole + n, d, stride_page, HKV, D, PAGE, WIDE
    )
    k = tl.load(keys + at, mask=inside[:, None] & features, other=0.0)
    v = tl.load(values + at, mask=inside[:, None] & features, other=0.0)
    # page numbers are a tile ahead of their pages
    page = tl.load(block_table + (begin + n) // PAGE, mask=begin + n < whole, other=0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    out += row * (HKV * G * D) + head * (G * D)
    if length == 0:
        tl.store(out + g[:, None] * D + d[None, :], tl.zeros([BG, BD], out.dtype.element_ty), mask=cells)
        return
    qkv += row * stride_qkv
    query = qkv + head * (2 * G * D)
    cos_sin += row * ROTARY
    TYPE: tl.constexpr = qkv.dtype.element_ty
    # float8 turns into float16 in one instruction, exactly
    COMPUTE: tl.constexpr = tl.float16 if FLOAT8 else TYPE
    scale_log2 = scale * k_scale
    # [BG, BD]
    q = normed_and_turned(query + g * (2 * D), g < G, q_weight, cos_sin, eps, D, BD, ROTARY, TYPE)
    STORED: tl.constexpr = keys.dtype.element_ty
    one = tl.arange(0, 1)
    # [1, BD], the newest token's, which belongs to the last piece
    newest = split == used - 1
    new_k = normed_and_turned(
        qkv + (2 * HKV * G + head) * D + one, one == 0, k_weight, cos_sin, eps, D, BD, ROTARY, TYPE
    )
    new_v = tl.load(qkv + (2 * HKV * G + HKV + head) * D + d, mask=d < D, other=0.0)[None, :]
    new_k, new_v = as_stored(new_k, inverse_k_scale, FLOAT8, STORED), as_stored(new_v, inverse_v_scale, FLOAT8, STORED)
    slot = tl.load(block_table + old // PAGE).to(tl.int64) * stride_page + (old % PAGE) * (HKV * D) + d[None, :]
    tl.store(keys + slot, new_k, mask=(d < tl.where(newest, D, 0))[None, :])
    tl.store(values + slot, new_v, mask=(d < tl.where(newest, D, 0))[None, :])
    m = tl.where(newest, tl.sum(q.to(tl.float32) * new_k.to(tl.float32), axis=1) * scale_log2, float("-inf"))
    l = tl.zeros([BG, BN], tl.float32) + tl.where(n == tl.where(newest, 0, -1), 1.0, 0.0)[None, :]
    acc = tl.zeros([BG, BD], tl.float32) + tl.where(newest, new_v.to(tl.float32), 0.0)
    q = q.to(COMPUTE)
    m, l, acc = attend_tile(q, k, v, inside[None, :], scale_log2, m, l, acc, True, True, COMPUTE)
    for i in range(begin, whole, BN):
        at = tile_offsets(page, i + n, d, stride_page, HKV, D, PAGE, WIDE)
        page = tl.load(block_table + (i + BN + n) // PAGE, mask=i + BN + n < whole, other=0)
        k = tl.load(keys + at, mask=features, other=0.0)
        v = tl.load(values + at, mask=features, other=0.0)
        m, l, acc = attend_tile(q, k, v, None, scale_log2, m, l, acc, False, True, COMPUTE)

    l = tl.sum(l, axis=1)
    if used == 1:
        gates = tl.load(query + D + g[:, None] * (2 * D) + d[None, :], mask=cells, other=0.0).to(tl.float32)
        y = acc * (v_scale / l)[:, None] * tl.sigmoid(gates)
        tl.store(out + g[:, None] * D + d[None, :], y.to(out.dtype.element_ty), mask=cells)
    else:
        piece = (unit.to(tl.int64) * splits + split) * G
        tl.store(sums + (piece + g)[:, None] * D + d[None, :], acc, mask=cells)
        tl.store(stats + (piece + g) * 2, m, mask=g < G)
        tl.store(stats + (piece + g) * 2 + 1, l, mask=g < G)


@triton.jit(do_not_specialize=["splits", "least"])
def _add_kernel(
    qkv,
    seq_lens,
    out,
    sums,
    stats,
    splits,
    least,
    v_scale,
    stride_qkv,
    G: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    BN: tl.constexpr,
    BS: tl.constexpr,
    BF: tl.constexpr,
    PDL: tl.constexpr,
):
    """BF features of one query head of one sequence: up to BS pieces added, divided and gated."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d, i = tl.program_id(2) * BF + tl.arange(0, BF), tl.arange(0, BS)
    length = tl.load(seq_lens + row)
    _, _, used = _pieces(length, splits, least, BN)
    # the gate is older than the kernel ahead, which has waited for it
    gate = tl.load(qkv + row * stride_qkv + head * (2 * D) + D + d, mask=d < D, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if used == 1:
        return
    there = i < used
    at = ((row * HKV + head // G) * splits + i) * G + head % G  # [BS]
    top = tl.load(stats + at * 2, mask=there, other=float("-inf"))
    weight = tl.load(stats + at * 2 + 1, mask=there, other=0.0)
    # [BS, BF]
    value = tl.load(sums + at[:, None] * D + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0)
    share = tl.exp2(top - tl.max(top, axis=0))
    y = tl.sum(value * share[:, None], axis=0) * (v_scale / tl.sum(weight * share, axis=0)) * tl.sigmoid(gate)
    tl.store(out + (row * (HKV * G) + head) * D + d, y.to(out.dtype.element_ty), mask=d < D)


def plan_attention_decode(
    S: int, num_kv_heads: int, group: int, head_size: int, tokens: int, multiprocessors: int
) -> dict[str, int]:
    """How many pieces a sequence has at most, the least tiles of a piece, and its tile.

    Args:
        S: sequences. group: query heads of a key/value head. tokens: of the longest sequence that the block table can hold.
    """
    # Measured on an H200 for heads of 256: a tile takes about 1 us by latency alone, so that two programs a multiprocessor, with two tiles
    # each on the way, beat larger tiles and deeper pipelines. Two stages of 16 KiB of keys and as much of values fit consumer GPUs too.
    BN = max(16, 8192 // triton.next_power_of_2(head_size))
    units = S * num_kv_heads
    # where sequences alone fill the GPU, only long ones are cut, and in two: programs without a piece are not free, 1 more for each of 64
    # sequences and the sum behind them cost 3 us
    splits = min(max(2 * multiprocessors // units, 2), MAX_SPLITS, triton.cdiv(tokens, BN))
    return {
        "splits": splits,
        "least": 1 if 4 * units <= multiprocessors else 16 * units // multiprocessors + 1,
        "BG": max(16, triton.next_power_of_2(group)),
        "BN": BN,
        "num_warps": 4,
        "num_stages": 3,
    }


def attention_decode_triton(
    rows: ProjectedRows,
    pages: Pages,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> torch.Tensor:
    """Triton form of :func:`attention_decode`."""
    S = rows.qkv.shape[0]
    keys, values, stride_page = page_arguments(pages)
    constants = row_constants(rows, pages)
    heads, D = constants["G"] * constants["HKV"], constants["D"]
    if not out.is_contiguous() or out.shape != (S, heads * D) or block_table.stride(1) != 1:
        raise ValueError(
            f"out must be a contiguous [{S}, {heads * D}] and rows of the block table contiguous, got {tuple(out.shape)} with strides "
            f"{out.stride()} and {block_table.stride()}"
        )
    if seq_lens.shape != (S,) or block_table.shape[0] < S:
        raise ValueError(
            f"{S} rows, but {tuple(seq_lens.shape)} lengths and {block_table.shape[0]} rows of the block table"
        )
    if S == 0:
        return out
    plan = plan_attention_decode(
        S,
        constants["HKV"],
        constants["G"],
        D,
        block_table.shape[1] * pages.block_size,
        multiprocessors(keys.device),
    )
    splits, least, units = plan["splits"], plan["least"], S * constants["HKV"]
    pieces = units * splits if splits > 1 else 1
    sums = torch.empty(pieces, constants["G"], D, dtype=torch.float32, device=keys.device)
    stats = torch.empty(pieces, constants["G"], 2, dtype=torch.float32, device=keys.device)
    overlap = overlaps_launches(keys.device)
    launch = {"PDL": overlap} | ({"launch_pdl": True} if overlap else {})
    _decode_kernel[(units * splits,)](
        rows.qkv,
        rows.cos_sin,
        rows.q_weight,
        rows.k_weight,
        keys,
        values,
        block_table,
        seq_lens,
        out,
        sums,
        stats,
        S,
        splits,
        least,
        rows.eps,
        scale * LOG2E,
        pages.k_scale,
        pages.v_scale,
        1.0 / pages.k_scale,
        1.0 / pages.v_scale,
        rows.qkv.stride(0),
        block_table.stride(0),
        stride_page,
        **constants,
        **{name: plan[name] for name in ("BG", "BN", "num_warps", "num_stages")},
        **launch,
    )
    if splits > 1:
        BS = 8 if splits <= 8 else 32 if splits <= 32 else MAX_SPLITS
        BF = min(constants["BD"], 8192 // BS)
        _add_kernel[(S, heads, triton.cdiv(D, BF))](
            rows.qkv,
            seq_lens,
            out,
            sums,
            stats,
            splits,
            least,
            pages.v_scale,
            rows.qkv.stride(0),
            **{name: constants[name] for name in ("G", "HKV", "D")},
            BN=plan["BN"],
            BS=BS,
            BF=BF,
            num_warps=4,
            **launch,
        )
    return out


def attention_decode_torch(
    rows: ProjectedRows,
    pages: Pages,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> torch.Tensor:
    """PyTorch form of :func:`attention_decode`, over the whole width of the block table."""
    q, gate, k, v = prepare_torch(rows, pages.keys.shape[2])
    newest = (seq_lens - 1).clamp(min=0).long()
    page = block_table[: len(newest)].gather(1, (newest // pages.block_size)[:, None]).squeeze(1).long()
    slots = torch.where(seq_lens > 0, page * pages.block_size + newest % pages.block_size, -1)
    write_pages(pages, k, v, slots)
    y = attend_decode(q, pages, block_table[: len(newest)], seq_lens, scale) * gate.sigmoid()
    # a padding row may carry garbage, and 0 * inf is not 0
    return out.copy_(torch.where((seq_lens > 0)[:, None], y.flatten(1), 0))


def attention_decode(
    rows: ProjectedRows,
    pages: Pages,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> torch.Tensor:
    """Gated attention of each sequence's newest token, whose key and value are written to their page.

    Lengths, block table and the pages of earlier tokens must not be written by the kernel right before this one in the stream: they are
    read before that kernel ends.

    Args:
        rows: of S tokens, in bfloat16 or float16 (the PyTorch form: any).
        block_table: [>= S, max_pages] int32; entries past a sequence's end are not followed.
        seq_lens: [S] int32, the newest token included; 0 for padding rows.
        scale: factor on the scores.
        out: contiguous [S, H*D] to write to.

    Returns:
        out; zeros in padding rows.
    """
    form = attention_decode_triton if rows.qkv.is_cuda else attention_decode_torch
    return form(rows, pages, block_table, seq_lens, scale, out)
