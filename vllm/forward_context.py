"""The one guarded global: this step's batch metadata, set by the runner around the model's forward.

Layers that keep state between steps (attention pages, GDN slots) need to know which rows of the flat token batch belong to which
sequence. Passing that through every signature would hide the network's maths, so it is set here for the length of one
forward. Nested or missing use is an error.

A step's tokens are one flat batch of T tokens of S sequences, decoding sequences first:

    rows 0 .. num_decodes-1        one token each, of sequences that already have state
    rows num_decodes ..            chunks of prompts, sequence after sequence

Rows behind the last chunk belong to nobody. Where a CUDA graph has to hold for every length, only the device's tensors say where that is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PAD_SLOT_ID = -1
"""A row that belongs to no sequence (padding of a CUDA graph's batch): its state is neither read nor written."""


@dataclass(frozen=True)
class PagedAttentionMetadata:
    """Where each token's keys and values go, and what each sequence may look at.

    Host copies (`*_cpu`) are tuples of ints, so that code that loops over sequences never waits for the device; None where the host's
    knowledge must not shape the work.
    """

    num_decodes: int
    num_prefills: int
    query_start_loc: torch.Tensor  # [S+1] int32: sequence s owns rows [query_start_loc[s], query_start_loc[s+1])
    seq_lens: torch.Tensor  # [S] int32: tokens of the sequence after this step
    block_table: torch.Tensor  # [S, max_pages] int32; unused entries point at page 0, which is nobody's
    slot_mapping: torch.Tensor  # [T] int64: page * block_size + offset; PAD_SLOT_ID for padding rows
    query_lens_cpu: tuple[int, ...] | None  # [S]
    seq_lens_cpu: tuple[int, ...] | None  # [S]
    max_query_len: int
    max_seq_len: int


@dataclass(frozen=True)
class GDNAttentionMetadata:
    """Which state slot each sequence owns, and whether it starts from zero."""

    num_decodes: int
    num_prefills: int
    num_prefill_tokens: int  # with the rows behind the last chunk where lengths are the device's alone
    state_indices: torch.Tensor  # [S] int32: slot of each sequence; PAD_SLOT_ID for padding rows
    prefill_query_start_loc: torch.Tensor  # [num_prefills+1] int32, relative to row num_decodes
    prefill_query_lens_cpu: tuple[int, ...] | None  # [num_prefills]; None as in PagedAttentionMetadata
    prefill_has_initial_state: torch.Tensor  # [num_prefills] bool: False on a sequence's first chunk
    # Chunks of the prefill kernels, the same for every layer (fla/ops/index.py); None where PyTorch computes them
    prefill_chunk_indices: torch.Tensor | None = None  # [chunks, 2] int32: sequence, chunk within it
    prefill_chunk_offsets: torch.Tensor | None = None  # [num_prefills+1] int32: first chunk of each sequence


@dataclass(frozen=True)
class ForwardContext:
    """Everything a layer may ask about the current step."""

    attn: PagedAttentionMetadata
    gdn: GDNAttentionMetadata


_current: ForwardContext | None = None


@contextmanager
def set_forward_context(context: ForwardContext) -> Iterator[None]:
    """Make `context` the current one. Raises RuntimeError when one is already set."""
    global _current
    if _current is not None:
        raise RuntimeError("a forward pass is already running: forward contexts do not nest")
    _current = context
    try:
        yield
    finally:
        _current = None


def get_forward_context() -> ForwardContext:
    """The current step's context. Raises RuntimeError outside `set_forward_context`."""
    if _current is None:
        raise RuntimeError("no forward pass is running: call the model inside set_forward_context(...)")
    return _current
