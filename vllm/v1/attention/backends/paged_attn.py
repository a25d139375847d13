"""Metadata of the attention layers: page of every token written, pages of every sequence read."""

from __future__ import annotations

import torch

from vllm.forward_context import PagedAttentionMetadata
from vllm.v1.worker.input_batch import StepInputs


def build_paged_attention_metadata(
    step: StepInputs, block_table: torch.Tensor, block_size: int
) -> PagedAttentionMetadata:
    """Args: the step; block_table [max_num_seqs, max_pages] int32 by row; tokens in a page."""
    max_seq_len = max(step.seq_lens_cpu)
    num_pages = -(-max_seq_len // block_size)
    page = block_table[step.token_rows, step.positions // block_size].long()  # [T]
    return PagedAttentionMetadata(
        num_decodes=step.num_decodes,
        num_prefills=len(step.query_lens_cpu) - step.num_decodes,
        query_start_loc=step.query_start_loc,
        seq_lens=step.seq_lens,
        block_table=block_table[step.rows, :num_pages],
        slot_mapping=page * block_size + step.positions % block_size,
        query_lens_cpu=step.query_lens_cpu,
        seq_lens_cpu=step.seq_lens_cpu,
        max_query_len=max(step.query_lens_cpu),
        max_seq_len=max_seq_len,
    )
