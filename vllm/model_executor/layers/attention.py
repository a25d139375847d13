"""Causal attention over keys and values that live in pages.

A sequence's tokens lie in pages of `block_size` tokens that its block table lists. A step first writes the keys and values of its own
tokens, then each token attends to its sequence up to itself:

    decoding rows   one token each: all rows in one gather and one masked product, shapes known from the host's max_seq_len
    prompt chunks   sequence by sequence, by the lengths that the host knows, in pieces of queries of bounded memory

Nothing here reads a device tensor on the host. Query heads of one key/value head are handled as further queries of the same position,
so keys and values are never repeated.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from vllm.forward_context import PagedAttentionMetadata, get_forward_context

MAX_BYTES = 128 << 20
"""Bound on gathered keys or on scores that a step holds at once."""


class Attention(nn.Module):
    """One layer's attention between its projections, and its pages.

    Args:
        num_heads, num_kv_heads: of this rank.
        head_size: features of a head.
        scale: factor on the scores; default head_size ** -0.5.

    Attributes:
        kv_cache: (keys, values), each [num_blocks, block_size, num_kv_heads, head_size], set by the runner before the first forward.
            They must start out finite (zeros): what lies behind a sequence's end is masked, not skipped. Page 0 belongs to nobody.
    """

    def __init__(self, num_heads: int, head_size: int, num_kv_heads: int, scale: float | None = None) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_size = num_heads, num_kv_heads, head_size
        self.scale = head_size**-0.5 if scale is None else scale
        self.kv_cache: tuple[torch.Tensor, torch.Tensor] | None = None

    def kv_shape(self, num_blocks: int, block_size: int) -> tuple[int, int, int, int]:
        """Shape of the keys, and of the values, of `num_blocks` pages."""
        return (num_blocks, block_size, self.num_kv_heads, self.head_size)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [T, num_heads, head_size], k and v [T, num_kv_heads, head_size] -> [T, num_heads, head_size].

        Rows of no sequence (padding) come out finite.
        """
        meta = get_forward_context().attn
        write_pages(self.kv_cache, k, v, meta.slot_mapping)
        out = torch.empty_like(q)
        d, end = meta.num_decodes, sum(meta.query_lens_cpu)
        if d:
            out[:d] = self._decode(q[:d], meta)
        if meta.num_prefills:
            self._prefill(q, k, v, out, meta)
        if end < q.shape[0]:
            out[end:] = 0
        return out

    def _decode(self, q: torch.Tensor, meta: PagedAttentionMetadata) -> torch.Tensor:
        """q [S, H, D] -> [S, H, D], a bounded number of rows at a time."""
        keys, values = self.kv_cache
        block_size = keys.shape[1]
        pages = min(meta.block_table.shape[1], -(-max(meta.max_seq_len, 1) // block_size))
        context = pages * block_size
        step = max(1, MAX_BYTES // (context * self.num_kv_heads * self.head_size * keys.element_size()))
        position = torch.arange(context, device=q.device)
        out = []
        for begin in range(0, q.shape[0], step):
            rows = slice(begin, begin + step)
            table = meta.block_table[: q.shape[0]][rows, :pages].long()  # [s, pages]
            # [s, pages, block, Hkv, D] -> [s, Hkv, context, D]
            k, v = (pool[table].flatten(1, 2).transpose(1, 2) for pool in (keys, values))
            # a padding row has length 0; it looks at one token of page 0, for a finite result
            length = meta.seq_lens[: q.shape[0]][rows].clamp(min=1)
            mask = (position < length[:, None])[:, None, None]  # [s, 1, 1, context]
            grouped = q[rows].unflatten(1, (self.num_kv_heads, -1))  # [s, Hkv, H/Hkv, D]
            mask = mask.expand(-1, 1, grouped.shape[2], -1)
            out.append(_attend(grouped, k.to(q.dtype), v.to(q.dtype), mask, self.scale).flatten(1, 2))
        return out[0] if len(out) == 1 else torch.cat(out)

    def _prefill(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, meta: PagedAttentionMetadata
    ) -> None:
        """Fill out [T, H, D] at the rows of prompt chunks."""
        begin = meta.num_decodes
        for s in range(meta.num_decodes, meta.num_decodes + meta.num_prefills):
            length, context = meta.query_lens_cpu[s], meta.seq_lens_cpu[s]
            rows = slice(begin, begin + length)
            begin += length
            if length == 0:
                continue
            if length == context:  # the sequence is all here: no need to look into its pages
                keys, values = k[rows], v[rows]
            else:
                keys, values = self._read_pages(meta.block_table[s], context)
            out[rows] = self._causal(q[rows], keys.to(q.dtype), values.to(q.dtype))

    def _read_pages(self, block_table: torch.Tensor, context: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first `context` tokens of a sequence with block_table [max_pages]: keys, values [context, Hkv, D]."""
        pages = block_table[: -(-context // self.kv_cache[0].shape[1])].long()
        keys, values = (pool[pages].flatten(0, 1)[:context] for pool in self.kv_cache)
        return keys, values

    def _causal(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The last L tokens of a sequence attend to all up to themselves.

        q [L, H, D]; k, v [C, Hkv, D] with C >= L -> [L, H, D].
        """
        length, context = q.shape[0], k.shape[0]
        if q.is_cuda and q.dtype != torch.float32 and length == context:
            # flash attention applies: linear memory, no mask
            q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=True)
            return y[0].transpose(0, 1)
        k, v = k.transpose(0, 1), v.transpose(0, 1)  # [Hkv, C, D]
        position = torch.arange(context, device=q.device)
        step = max(1, MAX_BYTES // (4 * self.num_heads * context))
        out = []
        for begin in range(0, length, step):
            piece = q[begin : begin + step]
            n = piece.shape[0]
            first = context - length + begin  # position of the piece's first query
            seen = first + n
            mask = position[:seen] <= position[first:seen, None]  # [n, seen]
            # [n, H, D] -> [Hkv, H/Hkv * n, D]: query heads of one key/value head one after the other
            grouped = piece.unflatten(1, (self.num_kv_heads, -1)).permute(1, 2, 0, 3).flatten(1, 2)
            mask = mask.repeat(grouped.shape[1] // n, 1)
            y = _attend(grouped[None], k[None, :, :seen], v[None, :, :seen], mask, self.scale)[0]
            out.append(y.unflatten(1, (-1, n)).permute(2, 0, 1, 3).flatten(1, 2))
        return out[0] if len(out) == 1 else torch.cat(out)


def write_pages(
    kv_cache: tuple[torch.Tensor, torch.Tensor], k: torch.Tensor, v: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """Store k and v [T, Hkv, D] at their slots. Rows without one (negative) put zeros into page 0, which is nobody's."""
    padding = (slot_mapping < 0)[:, None, None]
    slots = slot_mapping.clamp(min=0)
    for pool, x in zip(kv_cache, (k, v)):
        pool.view(-1, *pool.shape[2:])[slots] = torch.where(padding, 0, x).to(pool.dtype)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """softmax(q kᵀ * scale, where mask) v. q [B, H, M, D]; k, v [B, H, N, D]; mask broadcastable to [B, H, M, N]."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
