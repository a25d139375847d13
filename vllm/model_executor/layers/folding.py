"""Whether a step's norms and residual adds are part of the projections around them, or kernels of their own.

A layer adds two summands to the residual and normalises it twice. For a few rows a kernel that does both takes about as long as its
launch, and there are two a layer. Where a step folds one of the norms, whoever makes the summand in front of it adds it where the residual
lies, and the projection behind it gets the rows as they are and normalises them as it reads them. The numbers are those of the steps by
themselves, but for the last bit of a row's scale.

All layers fold the same norms: the weights are gone through once, and then `step_folds` is a function of the step alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch

from vllm.distributed.parallel_state import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.ops.skinny_gemm import csrc_gpu

INPUT_ROWS, POST_ROWS = 8, 2
"""Most rows for which a step folds each layer's input norm, and the one behind its mixer. Up to 2 rows whole steps were measured to be faster
on an H200. From 3 to 8 the pieces are (benchmarks/results/folding_h200.json): the input projections have room for a norm, while output
projections take longer to add. No step of so many rows has been timed with and without in one run.
"""


@dataclass(frozen=True)
class Folds:
    """The norms of each layer that a step folds.

    input: the one in front of the mixer, with the add of what the layer before has made.
    post: the one behind the mixer, with the add of what the mixer has made.
    """

    input: bool = False
    post: bool = False


NOTHING = Folds()


class Part(Protocol):
    """What stands between residual and residual: a projection (`Product`) or a mixture of experts (`ExpertsFold`)."""

    def folds(self, rows: int, gpu: str) -> bool:
        """Whether it can normalise its rows, and add its result, in the kernels that are the fastest without."""


@dataclass(frozen=True)
class Where:
    """What a step runs on: the GPU's name, whether csrc's kernels for few rows run there (sm_90 and newer), and the number of ranks."""

    gpu: str
    csrc: bool
    ranks: int = 1


def step_folds(rows: int, dtype: torch.dtype, where: Where, in_proj: str, parts: Iterable[Part]) -> Folds:
    """The norms that a step folds.

    Args:
        rows: of the residual. dtype: of the residual and of the norms' weights.
        in_proj: variant of the GDN layers' input projection.
        parts: of all layers.
    """
    able = dtype == torch.bfloat16 and where.csrc and where.ranks == 1 and in_proj == "fused"
    if not able or not 1 <= rows <= INPUT_ROWS or not all(part.folds(rows, where.gpu) for part in parts):
        return NOTHING
    return Folds(input=True, post=rows <= POST_ROWS)


@lru_cache
def where(device: torch.device) -> Where:
    """What steps on this CUDA device run on."""
    return Where(*csrc_gpu(device), get_tensor_model_parallel_world_size())
