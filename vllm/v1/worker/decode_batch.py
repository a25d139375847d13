"""A batch of decoding sequences in tensors that stay where they are, so that a CUDA graph can be captured over them.

The host writes here only when sequences come or go or get pages. From step to step the device itself looks up tokens, positions and lengths.
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
from vllm.model_executor.layers.ops.decode_step import DecodeInputs, prepare_decode
from vllm.v1.worker.input_batch import InputBatch


class DecodeBatch:
    """Up to `max_num_seqs` sequences that compute one token each.

    Args:
        batch: the tables of all sequences.
        max_model_len: the longest that a sequence can become.

    Attributes:
        rows: int64 [max_num_seqs], each sequence's row in the tables; `batch.pad_row` behind the last.
    """

    def __init__(self, batch: InputBatch, block_size: int, max_model_len: int) -> None:
        self.batch, self.block_size, self.max_model_len = batch, block_size, max_model_len
        S, device = batch.pad_row, batch.device
        self.rows = torch.full((S,), batch.pad_row, dtype=torch.int64, device=device)
        self.block_table = torch.zeros(S, batch.block_table.shape[1], dtype=torch.int32, device=device)
        self.state_indices = torch.full((S,), PAD_SLOT_ID, dtype=torch.int32, device=device)
        self.inputs = DecodeInputs(
            *(
                torch.zeros(S, dtype=dtype, device=device)
                for dtype in (torch.int64, torch.int64, torch.int32, torch.int64)
            )
        )
        self._query_start_loc = torch.arange(S + 1, dtype=torch.int32, device=device)
        self._rows_cpu: list[int] = []

    def select(self, rows: list[int], size: int) -> None:
        """Put the sequences with these rows into the batch, padded to `size`. Costs nothing when nothing has changed."""
        padded = rows + [self.batch.pad_row] * (size - len(rows))
        if padded != self._rows_cpu:
            self.rows[:size].copy_(self.batch.to_device([padded])[0])
            self._rows_cpu = padded
        elif not self.batch.pages_changed:
            return
        self.batch.pages_changed = False
        picked = self.rows[:size]
        torch.index_select(self.batch.block_table, 0, picked, out=self.block_table[:size])
        torch.index_select(self.batch.state_slot, 0, picked, out=self.state_indices[:size])

    @contextmanager
    def nobodys(self, size: int) -> Iterator[None]:
        """Inside, the first `size` rows are nobody's: what runs over them reads and writes no sequence's state."""
        rows, slots = self.rows[:size].clone(), self.state_indices[:size].clone()
        self.rows[:size].fill_(self.batch.pad_row)
        self.state_indices[:size].fill_(PAD_SLOT_ID)
        yield
        self.rows[:size], self.state_indices[:size] = rows, slots

    def forward(self, model: nn.Module, size: int, seq_lens: Seq[int] | None = None) -> torch.Tensor:
        """Run the network over the first `size` rows -> hidden [size, D].

        Args:
            seq_lens: lengths after this step, where the host's knowledge of them may bound the work. None in a CUDA graph, which
                has to hold for every length.
        """
        lens = tuple(seq_lens) if seq_lens is not None else (self.max_model_len,) * size
        longest = max(lens)
        pages = -(-longest // self.block_size)
        inputs = DecodeInputs(*(tensor[:size] for tensor in self.inputs))
        prepare_decode(self.rows[:size], self.batch.tables, self.block_table[:size], self.block_size, inputs)
        attn = PagedAttentionMetadata(
            num_decodes=size,
            num_prefills=0,
            query_start_loc=self._query_start_loc[: size + 1],
            seq_lens=inputs.seq_lens,
            block_table=self.block_table[:size, :pages],
            slot_mapping=inputs.slot_mapping,
            query_lens_cpu=(1,) * size,
            seq_lens_cpu=lens,
            max_query_len=1,
            max_seq_len=longest,
        )
        gdn = GDNAttentionMetadata(
            num_decodes=size,
            num_prefills=0,
            num_prefill_tokens=0,
            state_indices=self.state_indices[:size],
            prefill_query_start_loc=self._query_start_loc[:1],
            prefill_query_lens_cpu=(),
            prefill_has_initial_state=self.rows[:0].bool(),
        )
        with set_forward_context(ForwardContext(attn=attn, gdn=gdn)):
            return model(inputs.input_ids, inputs.positions)
