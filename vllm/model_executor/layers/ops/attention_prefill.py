"""Chunks of prompts: queries prepared and keys and values written by one kernel, flash attention over pages and the gate in a second.

The query heads of one key/value head are rows of the same tile, so that a tile of keys serves all of them: a tile of 128 rows is
16 tokens of 8 heads. Every chunk reads its keys from the pages, those of its own tokens too ("FlashAttention-2", arXiv 2307.08691, for
the running softmax). Tiles of all sequences are one grid whose size follows from the number of rows; each program finds its sequence, and
how long that is, in tensors of the device.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from vllm.forward_context import PagedAttentionMetadata
from vllm.model_executor.layers.fla.ops.device import overlaps_launches

from .attention_rows import (
    LOG2E,
    as_stored,
    attend_tile,
    normed_and_turned,
    page_arguments,
    row_constants,
    tile_offsets,
)
from .attention_torch import Pages, ProjectedRows, attend_chunks, prepare_torch, write_pages


@triton.jit(do_not_specialize=["first"])
def _prepare_kernel(
    qkv,
    cos_sin,
    q_weight,
    k_weight,
    keys,
    values,
    slot_mapping,
    queries,
    out,
    first,
    eps,
    inverse_k_scale,
    inverse_v_scale,
    stride_qkv,
    stride_page,
    G: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    ROTARY: tl.constexpr,
    PAGE: tl.constexpr,
    FLOAT8: tl.constexpr,
    WIDE: tl.constexpr,
    GP: tl.constexpr,
    PDL: tl.constexpr,
):
    """One key/value head of one token, and its query heads. What attention makes of a token of nobody: zeros."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    index, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = first + index
    d, g, one = tl.arange(0, BD), tl.arange(0, GP), tl.arange(0, 1)
    qkv += row * stride_qkv
    cos_sin += row * ROTARY
    TYPE: tl.constexpr = qkv.dtype.element_ty
    # [GP, BD]
    query = qkv + (head * G + g) * (2 * D)
    q = normed_and_turned(query, g < G, q_weight, cos_sin, eps, D, BD, ROTARY, TYPE)
    at = queries + (index * HKV + head) * (G * D) + g[:, None] * D + d[None, :]
    tl.store(at, q, mask=(g < G)[:, None] & (d < D)[None, :])
    slot = tl.load(slot_mapping + row)
    if slot >= 0:
        STORED: tl.constexpr = keys.dtype.element_ty
        # [1, BD]
        k = normed_and_turned(
            qkv + (2 * HKV * G + head) * D + one, one == 0, k_weight, cos_sin, eps, D, BD, ROTARY, TYPE
        )
        v = tl.load(qkv + (2 * HKV * G + HKV + head) * D + d, mask=d < D, other=0.0)[None, :]
        place = slot // PAGE * stride_page + (slot % PAGE * HKV + head) * D + d[None, :]
        tl.store(keys + place, as_stored(k, inverse_k_scale, FLOAT8, STORED), mask=(d < D)[None, :])
        tl.store(values + place, as_stored(v, inverse_v_scale, FLOAT8, STORED), mask=(d < D)[None, :])
    else:
        at = out + (row * HKV + head) * (G * D) + g[:, None] * D + d[None, :]
        tl.store(at, tl.zeros([GP, BD], out.dtype.element_ty), mask=(g < G)[:, None] & (d < D)[None, :])


@triton.jit
def _sequence_of(tile, starts, sequences, BT: tl.constexpr):
    """The sequence that owns a tile, and that sequence's first tile. Sequence s starts at tile (start of s) // BT + s, which leaves each
    enough of them, whatever the others' lengths."""
    origin, s = tl.load(starts), tl.arange(0, 64)
    count = 0
    for i in range(0, sequences, 64):
        start = tl.load(starts + i + s, mask=i + s < sequences, other=0) - origin
        count += tl.sum(((start // BT + i + s <= tile) & (i + s < sequences)).to(tl.int32), axis=0)
    sequence = count - 1
    return sequence, (tl.load(starts + sequence) - origin) // BT + sequence


@triton.jit(do_not_specialize=["sequences", "first_sequence", "stride_table"])
def _prefill_kernel(
    qkv,
    queries,
    keys,
    values,
    block_table,
    query_start_loc,
    seq_lens,
    out,
    sequences,
    first_sequence,
    scale_log2,
    v_scale,
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
    BM: tl.constexpr,
    BN: tl.constexpr,
    PDL: tl.constexpr,
):
    """BM // G tokens of one sequence, all query heads of one key/value head."""
    BT: tl.constexpr = BM // G
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    # a sequence's last tiles have the longest way to go: they come first
    tile, head = tl.num_programs(1) - 1 - tl.program_id(1), tl.program_id(0)
    query_start_loc += first_sequence
    sequence, first_tile = _sequence_of(tile, query_start_loc, sequences, BT)
    begin = tl.load(query_start_loc + sequence)
    length = tl.load(query_start_loc + sequence + 1) - begin
    token = (tile - first_tile) * BT
    if token >= length:
        return
    before = tl.load(seq_lens + first_sequence + sequence) - length  # tokens of earlier chunks
    d, r, n = tl.arange(0, BD), tl.arange(0, BM), tl.arange(0, BN)
    t = token + r // G  # [BM]
    valid = (r < BT * G) & (t < length)
    index = (begin - tl.load(query_start_loc)).to(tl.int64) + t
    features = (d < D)[None, :]
    block_table += (first_sequence + sequence).to(tl.int64) * stride_table
    keys += head * D
    values += head * D
    heads = (index * HKV + head) * (G * D) + (r % G) * D
    # [BM, BD]
    q = tl.load(queries + heads[:, None] + d[None, :], mask=valid[:, None] & features, other=0.0)
    TYPE: tl.constexpr = qkv.dtype.element_ty
    m = tl.full([BM], float("-inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    # whole tiles that every token sees, then those that reach past the first token
    whole = (before + token + 1) // BN * BN
    end = before + tl.minimum(token + BT, length)
    for i in range(0, whole, BN):
        page = tl.load(block_table + (i + n) // PAGE)
        at = tile_offsets(page, i + n, d, stride_page, HKV, D, PAGE, WIDE)
        k = tl.load(keys + at, mask=features, other=0.0)
        v = tl.load(values + at, mask=features, other=0.0)
        m, l, acc = attend_tile(q, k, v, None, scale_log2, m, l, acc, False, False, TYPE)
    for i in range(whole, end, BN):
        there = i + n < end
        page = tl.load(block_table + (i + n) // PAGE, mask=there, other=0)
        at = tile_offsets(page, i + n, d, stride_page, HKV, D, PAGE, WIDE)
        k = tl.load(keys + at, mask=there[:, None] & features, other=0.0)
        v = tl.load(values + at, mask=there[:, None] & features, other=0.0)
        # a row past the chunk's end sees what its last row sees, for a finite result
        seen = before + tl.minimum(t, length - 1)
        m, l, acc = attend_tile(q, k, v, (i + n)[None, :] <= seen[:, None], scale_log2, m, l, acc, True, False, TYPE)
    inside = valid[:, None] & features
    row = begin.to(tl.int64) + t
    gate = qkv + row * stride_qkv + (head * G + r % G) * (2 * D) + D
    y = acc * (v_scale / l)[:, None]
    y *= tl.sigmoid(tl.load(gate[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float32))
    heads = (row * HKV + head) * (G * D) + (r % G) * D
    tl.store(out + heads[:, None] + d[None, :], y.to(out.dtype.element_ty), mask=inside)


@lru_cache
def capability_of(device: torch.device) -> tuple[int, int]:
    """Of a GPU; the interpreter takes the tiles of the newest."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def plan_attention_prefill(group: int, head_size: int, capability: tuple[int, int]) -> dict[str, int]:
    """Rows (tokens times query heads of a key/value head) and keys of a tile.

    Args:
        capability: of the GPU, such as (9, 0).
    """
    wide = triton.next_power_of_2(head_size) > 128
    BM = 128 if capability[0] in (9, 10) else 64
    if group > BM:
        raise ValueError(f"{group} query heads share a key/value head; the kernel takes at most {BM}")
    if BM == 128:
        # 64 KiB of queries and two stages of 32 KiB each of keys and values, of 227
        return {"BM": 128, "BN": 64, "num_warps": 8, "num_stages": 2}
    # 99 KiB of shared memory on consumer GPUs
    return {"BM": 64, "BN": 32 if wide else 64, "num_warps": 4, "num_stages": 1 if wide else 2}


def attention_prefill_triton(
    rows: ProjectedRows, pages: Pages, meta: PagedAttentionMetadata, scale: float, out: torch.Tensor
) -> torch.Tensor:
    """Triton form of :func:`attention_prefill`."""
    keys, values, stride_page = page_arguments(pages)
    constants = row_constants(rows, pages)
    heads, D = constants["G"] * constants["HKV"], constants["D"]
    first, sequences = meta.num_decodes, meta.num_prefills
    tokens = rows.qkv.shape[0] - first
    if not out.is_contiguous() or out.shape != (rows.qkv.shape[0], heads * D) or meta.block_table.stride(1) != 1:
        raise ValueError(
            f"out must be a contiguous [{rows.qkv.shape[0]}, {heads * D}] and rows of the block table contiguous, got "
            f"{tuple(out.shape)} with strides {out.stride()} and {meta.block_table.stride()}"
        )
    if tokens == 0:
        return out
    device = keys.device
    plan = plan_attention_prefill(constants["G"], D, capability_of(device))
    queries = torch.empty(tokens, heads, D, dtype=rows.qkv.dtype, device=device)
    overlap = overlaps_launches(device)
    launch = {"PDL": overlap} | ({"launch_pdl": True} if overlap else {})
    _prepare_kernel[(tokens, constants["HKV"])](
        rows.qkv,
        rows.cos_sin,
        rows.q_weight,
        rows.k_weight,
        keys,
        values,
        meta.slot_mapping,
        queries,
        out,
        first,
        rows.eps,
        1.0 / pages.k_scale,
        1.0 / pages.v_scale,
        rows.qkv.stride(0),
        stride_page,
        **constants,
        GP=triton.next_power_of_2(constants["G"]),
        num_warps=2,
        **launch,
    )
    tiles = tokens // (plan["BM"] // constants["G"]) + sequences
    _prefill_kernel[(constants["HKV"], tiles)](
        rows.qkv,
        queries,
        keys,
        values,
        meta.block_table,
        meta.query_start_loc,
        meta.seq_lens,
        out,
        sequences,
        first,
        scale * pages.k_scale * LOG2E,
        pages.v_scale,
        rows.qkv.stride(0),
        meta.block_table.stride(0),
        stride_page,
        **constants,
        **plan,
        **launch,
    )
    return out


def attention_prefill_torch(
    rows: ProjectedRows, pages: Pages, meta: PagedAttentionMetadata, scale: float, out: torch.Tensor
) -> torch.Tensor:
    """PyTorch form of :func:`attention_prefill`."""
    begin = meta.num_decodes
    q, gate, k, v = prepare_torch(rows, pages.keys.shape[2])
    write_pages(pages, *(x[begin:] for x in (k, v, meta.slot_mapping)))
    y = torch.empty_like(q)
    attend_chunks(q, k, v, pages, meta, scale, y)
    out[begin:] = (y[begin:] * gate[begin:].sigmoid()).flatten(1)
    return out


def attention_prefill(
    rows: ProjectedRows, pages: Pages, meta: PagedAttentionMetadata, scale: float, out: torch.Tensor
) -> torch.Tensor:
    """Gated causal attention of a step's prompt chunks, whose keys and values are written to their pages.

    Args:
        rows: of all T tokens of the step, decoding rows too, which are left alone; bfloat16 or float16 (the PyTorch form: any).
        meta: of the step. Chunks of no tokens, and sequences that end before their last page does, are fine.
        scale: factor on the scores.
        out: contiguous [T, H*D], written at the rows of chunks; zeros at those behind.

    Returns:
        out.
    """
    form = attention_prefill_triton if rows.qkv.is_cuda else attention_prefill_torch
    return form(rows, pages, meta, scale, out)
