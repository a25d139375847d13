"""Gated attention over pages in plain PyTorch: what the kernels beside this file are held against, and what runs on CPUs and in float32.

A projection's row holds, for each query head, the query and its gate side by side, then the key heads, then the value heads:

    [query 0 | gate 0 | query 1 | gate 1 | ... | keys | values], each piece D wide

Queries and keys are normalised over D by an RMS norm whose weight is stored as its distance from one, and turned to their positions.
Keys and values go to pages: bfloat16, float32, or float8_e4m3fn with one scale for all keys of a layer and one for all values.
Query heads of one key/value head are handled as further queries of the same position, so keys and values are never repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from vllm.forward_context import PagedAttentionMetadata

MAX_BYTES = 128 << 20
"""Bound on gathered keys or on scores that a step holds at once."""

FLOAT8_LIMIT = 448.0
"""Largest float8_e4m3fn."""


@dataclass(frozen=True)
class Pages:
    """Keys and values of one layer, each [num_blocks, block_size, Hkv, D]; what float8 pages hold is multiplied by the scales."""

    keys: torch.Tensor
    values: torch.Tensor
    k_scale: float = 1.0
    v_scale: float = 1.0

    @property
    def block_size(self) -> int:
        return self.keys.shape[1]

    @property
    def float8(self) -> bool:
        return self.keys.dtype == torch.float8_e4m3fn


@dataclass(frozen=True)
class ProjectedRows:
    """What the projections made of T tokens, and what makes queries and keys of it."""

    qkv: torch.Tensor  # [T, 2*H*D + 2*Hkv*D], any row stride
    cos_sin: torch.Tensor  # [T, rotary_dim] float32, [cos | sin]
    q_weight: torch.Tensor  # [D]
    k_weight: torch.Tensor  # [D]
    eps: float

    @property
    def head_size(self) -> int:
        return self.q_weight.numel()

    def num_heads(self, num_kv_heads: int) -> int:
        """Query heads. Raises ValueError where the row's width does not fit the key/value heads."""
        heads, rest = divmod(self.qkv.shape[1] // self.head_size - 2 * num_kv_heads, 2)
        if rest or heads < 1 or self.qkv.shape[1] % self.head_size or heads % num_kv_heads:
            raise ValueError(
                f"a row of {self.qkv.shape[1]} is not gated query heads of {self.head_size} over {num_kv_heads} key/value heads"
            )
        return heads

    def part(self, begin: int, end: int) -> ProjectedRows:
        """Rows begin .. end-1."""
        return ProjectedRows(self.qkv[begin:end], self.cos_sin[begin:end], self.q_weight, self.k_weight, self.eps)


def prepare_torch(
    rows: ProjectedRows, num_kv_heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries and gates [T, H, D], keys and values [T, Hkv, D]; queries and keys normalised and turned."""
    heads, D = rows.num_heads(num_kv_heads), rows.head_size
    q_gate, k, v = rows.qkv.split([2 * heads * D, num_kv_heads * D, num_kv_heads * D], dim=1)
    q, gate = q_gate.unflatten(1, (heads, 2 * D)).chunk(2, dim=-1)
    k, v = (x.unflatten(1, (num_kv_heads, D)) for x in (k, v))
    q, k = (
        apply_rotary(_normed(x, weight, rows.eps), rows.cos_sin)
        for x, weight in ((q, rows.q_weight), (k, rows.k_weight))
    )
    return q, gate, k, v


def _normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y * (1.0 + weight.float())).to(x.dtype)


def apply_rotary(x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """Turn the first cos_sin.shape[-1] features of x [T, H, D]; float32 inside, x's dtype outside.

    (a, b) -> (a cos - b sin, b cos + a sin).
    """
    rotary_dim = cos_sin.shape[-1]
    cos, sin = cos_sin[:, None].chunk(2, dim=-1)  # [T, 1, rotary_dim/2]
    a, b = x[..., :rotary_dim].float().chunk(2, dim=-1)
    turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
    return torch.cat([turned, x[..., rotary_dim:]], dim=-1)


def write_pages(pages: Pages, k: torch.Tensor, v: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Store k and v [T, Hkv, D] at their slots. Rows without one (negative) put zeros into page 0, which is nobody's."""
    padding = (slot_mapping < 0)[:, None, None]
    slots = slot_mapping.clamp(min=0)
    for pool, x, scale in ((pages.keys, k, pages.k_scale), (pages.values, v, pages.v_scale)):
        x = torch.where(padding, 0, x)
        if pages.float8:
            # indexing knows no float8
            x = (x.float() / scale).clamp(-FLOAT8_LIMIT, FLOAT8_LIMIT).to(pool.dtype).view(torch.uint8)
            pool = pool.view(torch.uint8)
        pool.view(-1, *pool.shape[2:])[slots] = x.to(pool.dtype)


def read_pages(pages: Pages, block_table: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [..., pages * block_size, Hkv, D] of a block table [..., pages]."""
    table = block_table.long()
    found = []
    for pool, scale in ((pages.keys, pages.k_scale), (pages.values, pages.v_scale)):
        if pages.float8:
            x = (pool.view(torch.uint8)[table].view(pool.dtype).float() * scale).to(dtype)
        else:
            x = pool[table].to(dtype)
        found.append(x.flatten(-4, -3))
    return found[0], found[1]


def attend_decode(
    q: torch.Tensor, pages: Pages, block_table: torch.Tensor, seq_lens: torch.Tensor, scale: float
) -> torch.Tensor:
    """The newest token of each sequence attends to all of its sequence, itself included, which is in the pages already.

    Args:
        q: [S, H, D]. block_table: [S, pages], as wide as the longest sequence needs. seq_lens: [S]; 0 for padding rows.

    Returns:
        [S, H, D], in pieces of a bounded number of rows.
    """
    num_kv_heads, D = pages.keys.shape[2:]
    context = block_table.shape[1] * pages.block_size
    step = max(1, MAX_BYTES // (context * num_kv_heads * D * max(pages.keys.element_size(), q.element_size())))
    position = torch.arange(context, device=q.device)
    out = []
    for begin in range(0, q.shape[0], step):
        piece = slice(begin, begin + step)
        # [s, context, Hkv, D] -> [s, Hkv, context, D]
        k, v = (x.transpose(1, 2) for x in read_pages(pages, block_table[piece], q.dtype))
        # a padding row looks at one token of page 0, for a finite result
        mask = (position < seq_lens[piece].clamp(min=1)[:, None])[:, None, None]  # [s, 1, 1, context]
        grouped = q[piece].unflatten(1, (num_kv_heads, -1))  # [s, Hkv, H/Hkv, D]
        out.append(_attend(grouped, k, v, mask.expand(-1, 1, grouped.shape[2], -1), scale).flatten(1, 2))
    return out[0] if len(out) == 1 else torch.cat(out)


def host_lengths(meta: PagedAttentionMetadata) -> tuple[Sequence[int], Sequence[int]]:
    """Tokens of each sequence in this step, and after it. Where only the device knows, it is asked: nothing on a CPU, on a GPU a wait."""
    if meta.query_lens_cpu is None:
        return meta.query_start_loc.diff().tolist(), meta.seq_lens.tolist()
    return meta.query_lens_cpu, meta.seq_lens_cpu


def attend_chunks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pages: Pages,
    meta: PagedAttentionMetadata,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Fill out [T, H, D] at the rows of prompt chunks, sequence by sequence, and with zeros behind the last.

    q [T, H, D], k and v [T, Hkv, D] are all rows of the step; keys and values are in the pages already.
    """
    begin = meta.num_decodes
    query_lens, seq_lens = host_lengths(meta)
    for s in range(meta.num_decodes, meta.num_decodes + meta.num_prefills):
        length, context = query_lens[s], seq_lens[s]
        rows = slice(begin, begin + length)
        begin += length
        if length == 0:
            continue
        if length == context:  # the sequence is all here: no need to look into its pages
            keys, values = k[rows], v[rows]
        else:
            table = meta.block_table[s, : -(-context // pages.block_size)]
            keys, values = (x[:context] for x in read_pages(pages, table, q.dtype))
        out[rows] = _causal(q[rows], keys.to(q.dtype), values.to(q.dtype), scale)
    out[begin:] = 0


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """The last L tokens of a sequence attend to all up to themselves, in pieces of queries of bounded memory.

    q [L, H, D]; k, v [C, Hkv, D] with C >= L -> [L, H, D].
    """
    length, context, num_kv_heads = q.shape[0], *k.shape[:2]
    if q.is_cuda and q.dtype != torch.float32 and length == context:
        # flash attention applies: linear memory, no mask
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        return y[0].transpose(0, 1)
    k, v = k.transpose(0, 1), v.transpose(0, 1)  # [Hkv, C, D]
    position = torch.arange(context, device=q.device)
    step = max(1, MAX_BYTES // (4 * q.shape[1] * context))
    out = []
    for begin in range(0, length, step):
        piece = q[begin : begin + step]
        n = piece.shape[0]
        first = context - length + begin  # position of the piece's first query
        seen = first + n
        mask = position[:seen] <= position[first:seen, None]  # [n, seen]
        # [n, H, D] -> [Hkv, H/Hkv * n, D]: query heads of one key/value head one after the other
        grouped = piece.unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3).flatten(1, 2)
        mask = mask.repeat(grouped.shape[1] // n, 1)
        y = _attend(grouped[None], k[None, :, :seen], v[None, :, :seen], mask, scale)[0]
        out.append(y.unflatten(1, (-1, n)).permute(2, 0, 1, 3).flatten(1, 2))
    return out[0] if len(out) == 1 else torch.cat(out)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """softmax(q kᵀ * scale, where mask) v. q [B, H, M, D]; k, v [B, H, N, D]; mask broadcastable to [B, H, M, N]."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
