"""Slots of Gated DeltaNet state, one a running sequence: convolution window and recurrent matrix of every layer."""

from __future__ import annotations

from vllm.v1.core.id_pool import IdPool


class StatePool(IdPool):
    """`num_slots` slots, slot 0 among them though nobody gets it.

    A pool of its own, not pages padded to the size of a state: a sequence has one slot however long it grows.
    """

    noun = "state slot"
