"""Tensor parallelism: which share of each layer this process holds, and how shares become wholes again.

The world has one rank. Layers cut their shapes, and the loader its tensors, by what `TensorParallelGroup` says, so that a larger
world changes this file and no layer. `use_group` sets another group for the length of a block; tests build shards with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TensorParallelGroup:
    rank: int = 0
    size: int = 1

    def share(self, total: int, what: str) -> int:
        """`total / size`. Raises ValueError, naming `what`, where that is not whole."""
        if total % self.size:
            raise ValueError(f"{what}: {total} cannot be shared evenly by {self.size} ranks")
        return total // self.size


_group = TensorParallelGroup()


def get_tensor_parallel_group() -> TensorParallelGroup:
    return _group


@contextmanager
def use_group(group: TensorParallelGroup) -> Iterator[None]:
    """Layers built inside the block hold the shard of `group.rank`."""
    global _group
    before, _group = _group, group
    try:
        yield
    finally:
        _group = before


def get_tensor_model_parallel_rank() -> int:
    return _group.rank


def get_tensor_model_parallel_world_size() -> int:
    return _group.size


def tensor_model_parallel_all_reduce(x: torch.Tensor) -> torch.Tensor:
    """Sum of every rank's `x`."""
    _require_one("all_reduce")
    return x


def tensor_model_parallel_all_gather(x: torch.Tensor) -> torch.Tensor:
    """Every rank's `x`, joined along the last dimension in rank order."""
    _require_one("all_gather")
    return x


def _require_one(operation: str) -> None:
    if _group.size != 1:
        raise RuntimeError(f"{operation} over {_group.size} ranks: this version runs on one device")
