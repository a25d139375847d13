"""Metadata of the GDN layers: the state slot of every sequence, which prompts go on from one, and where their chunks begin."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from vllm.forward_context import GDNAttentionMetadata
from vllm.model_executor.layers.fla.ops import prepare_chunk_indices, prepare_chunk_offsets
from vllm.v1.worker.input_batch import StepInputs


def build_gdn_attention_metadata(step: StepInputs, state_slot: torch.Tensor) -> GDNAttentionMetadata:
    """Args: the step; state_slot [max_num_seqs] int32 by row."""
    first = step.num_decodes
    lens = step.query_lens_cpu[first:]
    return GDNAttentionMetadata(
        num_decodes=first,
        num_prefills=len(lens),
        num_prefill_tokens=sum(lens),
        state_indices=state_slot[step.rows],
        prefill_query_start_loc=step.query_start_loc[first:] - first,
        prefill_query_lens_cpu=lens,
        prefill_has_initial_state=step.has_state[first:],
        **prefill_chunks(lens, state_slot.device),
    )


def prefill_chunks(lens: Sequence[int], device: torch.device) -> dict[str, torch.Tensor]:
    """The metadata's chunk lists, made once a step from the host's lengths. Empty off the GPU, where PyTorch makes its own."""
    if device.type != "cuda" or not lens:
        return {}
    starts = list(accumulate(lens, initial=0))
    return {
        "prefill_chunk_indices": prepare_chunk_indices(starts, device=device),
        "prefill_chunk_offsets": prepare_chunk_offsets(starts, device=device),
    }
