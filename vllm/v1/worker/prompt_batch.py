"""Chunks of prompts in tensors that stay where they are, padded to a fixed number of tokens, so that a CUDA graph can be captured.

The host writes the rows of the sequences, how many tokens each has, and the tokens; all else follows on the device. Rows behind the last chunk
are nobody's: they write no page and no state, and no row before them looks at them.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager

import torch
from torch import nn

from vllm.forward_context import (
    PAD_SLOT_ID,
    ForwardContext,
    GDNAttentionMetadata,
    PagedAttentionMetadata,
    set_forward_context,
)
from vllm.model_executor.layers.fla.ops import padded_chunk_lists
from vllm.v1.worker.input_batch import InputBatch


class PromptBatch:
    """The next tokens of sequences that are not decoding yet.

    Args:
        batch: the tables of all sequences.
        max_model_len: the longest that a sequence can become.
        sizes: numbers of tokens that all chunks together are padded to, smallest first.
        most: sequences that there is room for. Kernels are laid out for as many.
    """

    def __init__(
        self, batch: InputBatch, block_size: int, max_model_len: int, sizes: tuple[int, ...], most: int
    ) -> None:
        self.batch, self.block_size, self.max_model_len = batch, block_size, max_model_len
        self.sizes, self.most = sizes, most
        self._packed = torch.zeros(3 * most + max(sizes, default=0), dtype=torch.int64, device=batch.device)
        self._rows, self._lengths, self._sampled = self._packed[: 3 * most].split(most)  # [most] each
        self._token_ids = self._packed[3 * most :]
        self._rows.fill_(batch.pad_row)

    def select(self, rows: list[int], chunks: Seq[list[int]], num_sampled: int) -> None:
        """Make these the next tokens of the sequences with these rows.

        Args:
            num_sampled: of how many sequences, the first ones, the next token will be drawn, which counts the last of these as computed
                (`commit_tokens`).
        """
        n, spare = len(rows), self.most - len(rows)
        head = [
            *(rows + [self.batch.pad_row] * spare),
            *([len(chunk) for chunk in chunks] + [0] * spare),
            *([1] * num_sampled + [0] * (n - num_sampled + spare)),
        ]
        (packed,) = self.batch.to_device([head + [token for chunk in chunks for token in chunk]])
        self._packed[: packed.numel()].copy_(packed)

    @contextmanager
    def nobodys(self, size: int) -> Iterator[None]:
        """Inside, the chunks are nobody's and empty: what runs over them reads and writes no sequence's state."""
        kept = self._packed.clone()
        self._packed.zero_()
        self._rows.fill_(self.batch.pad_row)
        yield
        self._packed.copy_(kept)

    def forward(self, model: nn.Module, size: int) -> torch.Tensor:
        """Run the network over the chunks padded to `size`, and note on the device that they are computed -> hidden [most, D] of each one's
        last token; rows behind the last sequence are not to be read.
        """
        tables, rows, lengths = self.batch.tables, self._rows, self._lengths
        computed = tables.num_computed.index_select(0, rows)
        ends = lengths.cumsum(0)
        t = torch.arange(size, device=rows.device)
        owner = torch.searchsorted(ends, t, right=True)  # [size]: sequences that end before
        padding = owner == self.most
        owner.clamp_(max=self.most - 1)
        positions = (t + (computed - ends + lengths)[owner]).masked_fill(padding, 0)
        block_table = self.batch.block_table.index_select(0, rows)  # [most, pages]
        slots = block_table[owner, positions // self.block_size].long() * self.block_size + positions % self.block_size
        starts = torch.cat([torch.zeros_like(ends[:1]), ends]).int()
        chunk_indices, chunk_offsets = padded_chunk_lists(lengths, size)
        attn = PagedAttentionMetadata(
            num_decodes=0,
            num_prefills=self.most,
            query_start_loc=starts,
            seq_lens=(computed + lengths).int(),
            block_table=block_table,
            slot_mapping=slots.masked_fill(padding, PAD_SLOT_ID),
            query_lens_cpu=None,
            seq_lens_cpu=None,
            max_query_len=size,
            max_seq_len=self.max_model_len,
        )
        gdn = GDNAttentionMetadata(
            num_decodes=0,
            num_prefills=self.most,
            num_prefill_tokens=size,
            state_indices=self.batch.state_slot.index_select(0, rows),
            prefill_query_start_loc=starts,
            prefill_query_lens_cpu=None,
            prefill_has_initial_state=computed > 0,
            prefill_chunk_indices=chunk_indices,
            prefill_chunk_offsets=chunk_offsets,
        )
        with set_forward_context(ForwardContext(attn=attn, gdn=gdn)):
            hidden = model(self._token_ids[:size].masked_fill(padding, 0), positions)  # [size, D]
        tables.num_computed.index_add_(0, rows, lengths - self._sampled)
        return hidden.index_select(0, (ends - 1).clamp(min=0))
