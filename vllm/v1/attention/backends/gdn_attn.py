"""Metadata of the GDN layers: the state slot of every sequence, and which prompts go on from one."""

from __future__ import annotations

import torch

from vllm.forward_context import GDNAttentionMetadata
from vllm.v1.worker.input_batch import StepInputs


def build_gdn_attention_metadata(step: StepInputs, state_slot: torch.Tensor) -> GDNAttentionMetadata:
    """Args: the step; state_slot [max_num_seqs] int32 by row."""
    first = step.num_decodes
    return GDNAttentionMetadata(
        num_decodes=first,
        num_prefills=len(step.query_lens_cpu) - first,
        num_prefill_tokens=sum(step.query_lens_cpu[first:]),
        state_indices=state_slot[step.rows],
        prefill_query_start_loc=step.query_start_loc[first:] - first,
        prefill_query_lens_cpu=step.query_lens_cpu[first:],
        prefill_has_initial_state=step.has_state[first:],
    )
