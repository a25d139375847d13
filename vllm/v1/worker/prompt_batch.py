"""One chunk of one prompt in tensors that stay where they are, padded to a fixed number of tokens, so that a CUDA graph can be captured.

The host writes the row of the sequence, how many tokens there are, and the tokens; all else follows on the device. Rows behind the chunk are
nobody's: they write no page and no state, and no row before them looks at them.
"""

from __future__ import annotations

from collections.abc import Iterator
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
from vllm.model_executor.layers.fla.ops import prepare_chunk_indices, prepare_chunk_offsets
from vllm.v1.worker.input_batch import InputBatch


class PromptBatch:
    """The next tokens of one sequence that is not decoding yet.

    Args:
        batch: the tables of all sequences.
        max_model_len: the longest that a sequence can become.
        sizes: numbers of tokens that chunks are padded to, smallest first.
    """

    def __init__(self, batch: InputBatch, block_size: int, max_model_len: int, sizes: tuple[int, ...]) -> None:
        self.batch, self.block_size, self.max_model_len, self.sizes = batch, block_size, max_model_len, sizes
        self._packed = torch.zeros(3 + max(sizes, default=0), dtype=torch.int64, device=batch.device)
        self._row, self._length, self._sampled = self._packed[:3].split(1)  # [1] each
        self._token_ids = self._packed[3:]
        self._row.fill_(batch.pad_row)
        # chunks past the prompt's end find no tokens
        self._chunks = {
            size: {
                "prefill_chunk_indices": prepare_chunk_indices([0, size], device=batch.device),
                "prefill_chunk_offsets": prepare_chunk_offsets([0, size], device=batch.device),
            }
            for size in sizes
        }

    def select(self, row: int, token_ids: list[int], sampled: bool) -> None:
        """Make these the next tokens of the sequence with this row.

        Args:
            sampled: whether its next token will be drawn, which counts the last of these as computed (`commit_tokens`).
        """
        (packed,) = self.batch.to_device([[row, len(token_ids), sampled, *token_ids]])
        self._packed[: packed.numel()].copy_(packed)

    @contextmanager
    def nobodys(self, size: int) -> Iterator[None]:
        """Inside, the chunk is nobody's and empty: what runs over it reads and writes no sequence's state."""
        kept = self._packed.clone()
        self._packed.zero_()
        self._row.fill_(self.batch.pad_row)
        yield
        self._packed.copy_(kept)

    def forward(self, model: nn.Module, size: int) -> torch.Tensor:
        """Run the network over the chunk padded to `size`, and note on the device that it is computed -> hidden [1, D] of its last token."""
        tables, row, length = self.batch.tables, self._row, self._length
        t = torch.arange(size, device=row.device)
        padding = t >= length
        start = tables.num_computed.index_select(0, row)  # [1]
        positions = (start + t).masked_fill(padding, 0)
        block_table = self.batch.block_table.index_select(0, row)  # [1, pages]
        page = block_table[0].index_select(0, positions // self.block_size).long()
        slots = page * self.block_size + positions % self.block_size
        starts = torch.cat([torch.zeros_like(length), length]).int()
        attn = PagedAttentionMetadata(
            num_decodes=0,
            num_prefills=1,
            query_start_loc=starts,
            seq_lens=(start + length).int(),
            block_table=block_table,
            slot_mapping=slots.masked_fill(padding, PAD_SLOT_ID),
            query_lens_cpu=None,
            seq_lens_cpu=None,
            max_query_len=size,
            max_seq_len=self.max_model_len,
        )
        gdn = GDNAttentionMetadata(
            num_decodes=0,
            num_prefills=1,
            num_prefill_tokens=size,
            state_indices=self.batch.state_slot.index_select(0, row),
            prefill_query_start_loc=starts,
            prefill_query_lens_cpu=None,
            prefill_has_initial_state=start > 0,
            **self._chunks[size],
        )
        with set_forward_context(ForwardContext(attn=attn, gdn=gdn)):
            hidden = model(self._token_ids[:size].masked_fill(padding, 0), positions)  # [size, D]
        tables.num_computed.index_add_(0, row, length - self._sampled)
        return hidden.index_select(0, (length - 1).clamp(min=0))
