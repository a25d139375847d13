"""Causal attention over keys and values that live in pages.

A sequence's tokens lie in pages of `block_size` tokens that its block table lists. A step first writes the keys and values of its own
tokens, then each token attends to its sequence up to itself:

    decoding rows   one token each: all rows at once, `ops/attention_decode.py`
    prompt chunks   sequence by sequence, `ops/attention_prefill.py`

Nothing here reads a device tensor on the host.
"""

from __future__ import annotations

import torch
from torch import nn

from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.ops.attention_decode import attention_decode
from vllm.model_executor.layers.ops.attention_prefill import attention_prefill
from vllm.model_executor.layers.ops.attention_torch import (
    Pages,
    ProjectedRows,
    attend_chunks,
    attend_decode,
    prepare_torch,
    write_pages,
)


class Attention(nn.Module):
    """One layer's attention between its projections, and its pages.

    Args:
        num_heads, num_kv_heads: of this rank.
        head_size: features of a head.
        scale: factor on the scores; default head_size ** -0.5.

    Attributes:
        kv_cache: (keys, values), each [num_blocks, block_size, num_kv_heads, head_size], set by the runner before the first forward.
            They must start out finite (zeros): what lies behind a sequence's end is masked, not skipped. Page 0 belongs to nobody.
        k_scale, v_scale: what float8 pages hold is multiplied by them; other pages ignore them.
    """

    def __init__(self, num_heads: int, head_size: int, num_kv_heads: int, scale: float | None = None) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_size = num_heads, num_kv_heads, head_size
        self.scale = head_size**-0.5 if scale is None else scale
        self.kv_cache: tuple[torch.Tensor, torch.Tensor] | None = None
        self.k_scale = self.v_scale = 1.0

    def kv_shape(self, num_blocks: int, block_size: int) -> tuple[int, int, int, int]:
        """Shape of the keys, and of the values, of `num_blocks` pages."""
        return (num_blocks, block_size, self.num_kv_heads, self.head_size)

    @property
    def _pages(self) -> Pages:
        return Pages(*self.kv_cache, self.k_scale, self.v_scale)

    def gated(self, rows: ProjectedRows) -> torch.Tensor:
        """Gated attention of a projection's rows of T tokens: [T, num_heads * head_size] in their dtype.

        Rows of no sequence (padding) come out finite.
        """
        qkv = rows.qkv
        if not qkv.is_cuda or qkv.dtype == torch.float32:
            q, gate, k, v = prepare_torch(rows, self.num_kv_heads)
            return (self(q, k, v) * gate.sigmoid()).flatten(1)
        meta, pages = get_forward_context().attn, self._pages
        out = torch.empty(qkv.shape[0], self.num_heads * self.head_size, dtype=qkv.dtype, device=qkv.device)
        d = meta.num_decodes
        if d:
            attention_decode(rows.part(0, d), pages, meta.block_table, meta.seq_lens[:d], self.scale, out[:d])
        if meta.num_prefills:
            attention_prefill(rows, pages, meta, self.scale, out)
        elif d < qkv.shape[0]:
            out[d:] = 0
        return out

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [T, num_heads, head_size], k and v [T, num_kv_heads, head_size] -> [T, num_heads, head_size], in plain PyTorch.

        Rows of no sequence (padding) come out finite.
        """
        meta, pages = get_forward_context().attn, self._pages
        write_pages(pages, k, v, meta.slot_mapping)
        out = torch.empty_like(q)
        d = meta.num_decodes
        if d:
            used = -(-max(meta.max_seq_len, 1) // pages.block_size)
            out[:d] = attend_decode(q[:d], pages, meta.block_table[:d, :used], meta.seq_lens[:d], self.scale)
        attend_chunks(q, k, v, pages, meta, self.scale, out)
        return out
