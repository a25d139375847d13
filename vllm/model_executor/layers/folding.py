"""Whether a step's norms and residual adds are part of the projections around them, or kernels of their own.

A layer adds two summands to the residual and normalises it twice. For a few rows a kernel that does both takes about as long as its
launch, and there are two a layer. Where a step folds them, whoever makes a summand adds it where the residual lies, and the projection
behind a norm gets the rows as they are and normalises them as it reads them. The numbers are those of the steps by themselves, but for
the last bit of a row's scale.

All layers fold or none does: the weights are gone through once, and then `step_folds` is a function of the step alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch

from vllm.distributed.parallel_state import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.ops.skinny_gemm import csrc_gpu
from vllm.model_executor.layers.ops.skinny_gemm_plan import MAX_ROWS


class Part(Protocol):
    """What stands between residual and residual: a projection (`Product`) or a mixture of experts (`ExpertsFold`)."""

    def folds(self, rows: int, gpu: str) -> bool:
        """Whether it normalises its rows by itself, or adds its result, at least as fast as with a kernel beside it."""


@dataclass(frozen=True)
class Where:
    """What a step runs on: the GPU's name, whether csrc's kernels for few rows run there (sm_90 and newer), and the number of ranks."""

    gpu: str
    csrc: bool
    ranks: int = 1


def step_folds(rows: int, dtype: torch.dtype, where: Where, in_proj: str, parts: Iterable[Part]) -> bool:
    """Whether a step folds.

    Args:
        rows: of the residual. dtype: of the residual and of the norms' weights.
        in_proj: variant of the GDN layers' input projection.
        parts: of all layers.
    """
    if not 1 <= rows <= MAX_ROWS or dtype != torch.bfloat16 or not where.csrc or where.ranks > 1 or in_proj != "fused":
        return False
    return all(part.folds(rows, where.gpu) for part in parts)


@lru_cache
def where(device: torch.device) -> Where:
    """What steps on this CUDA device run on."""
    return Where(*csrc_gpu(device), get_tensor_model_parallel_world_size())
