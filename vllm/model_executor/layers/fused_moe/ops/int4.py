"""A mixture of int4 experts for a few tokens: csrc/experts_int4.cu behind the front that x alone decides (ops/front.py).

    front    logits, the shared expert's first half
    gate_up  silu(gate_e x) * up_e x of every choice
    down     the weighted sum over a token's choices and the shared expert

Both of csrc's kernels choose from the logits by themselves and read each chosen expert once for 8 of its tokens. They stay on their
multiprocessor and walk over weights, so that copies never stop.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from vllm import _custom_ops as ops
from vllm.model_executor.layers.fla.ops.device import overlaps_launches
from vllm.model_executor.layers.fused_moe.ops.front import front_triton
from vllm.model_executor.layers.fused_moe.ops.weights import MoEWeights
from vllm.model_executor.layers.ops.rms_norm import Unnormed, rows_of

if TYPE_CHECKING:
    from vllm.model_executor.layers.quantization.base import KernelWeight

MOST_TOKENS, MOST_EXPERTS, MOST_CHOICES = 64, 512, 32
"""Bounds of the kernels: tokens, experts of a layer, choices of a token."""
TOGETHER = 8
"""Tokens that have an expert in common and share a product."""
STAGES = 3
"""Of the rings through which weights come."""


@dataclass(frozen=True)
class Int4Plan:
    """Stages of the rings of both kernels, and warps of `down`."""

    gate_up_stages: int
    down_warps: int
    down_stages: int


def most_lists(tokens: int, num_experts: int, top_k: int) -> int:
    """Lists of up to 8 tokens of one expert that there may be."""
    choices = tokens * top_k
    return min(choices, (choices + num_experts * (TOGETHER - 1)) // TOGETHER)


def shared_bytes(tokens: int, lists: int, stages: int, warps: int, zeros: tuple[int, int], rows: int) -> int:
    """Bytes of shared memory of `gate_up`, which has tiles of 32 `rows`, or of `down`, which has 16.

    Args:
        zeros: bytes that a row's scales and its zero points take in a stage.
    """
    sums = 2 * 8 * 8 * 36 * 4 if rows == 32 else warps * tokens * 64
    own = lists * (11 if rows == 32 else 43)
    return sums + -(-own // 128) * 128 + warps * stages * rows * (80 + sum(zeros))


@lru_cache(maxsize=4096)
def plan_int4(
    memory: int,
    tokens: int,
    num_experts: int,
    top_k: int,
    slots13: tuple[int, int],
    slots2: tuple[int, int],
) -> Int4Plan | None:
    """Three stages, or fewer warps where there is no room for as many; None where there is too little for that. A pure function of
    sizes and formats. A fourth stage keeps the next kernel from coming onto the multiprocessor early, which costs more than it brings.

    Args:
        memory: bytes of shared memory that a block may have.
        slots13, slots2: `slots_of` both matrices.
    """
    lists = most_lists(tokens, num_experts, top_k)
    down = [warps for warps in (16, 8) if shared_bytes(tokens, lists, STAGES, warps, slots2, 16) <= memory]
    if not down or shared_bytes(tokens, lists, STAGES, 8, slots13, 32) > memory:
        return None
    return Int4Plan(STAGES, down[0], STAGES)


def slots_of(weight: KernelWeight) -> tuple[int, int]:
    """Bytes of a stage that a row's scales and its zero points take."""
    return 8 if weight.group == 32 else 4, 0 if weight.zero is None else 4


def reads(weight: KernelWeight, rows: int) -> bool:
    """Whether the kernels read these stacked rows: whole chunks of 128 columns, bfloat16 scales of groups of 32 or of whole chunks.

    Args:
        rows: of which every expert has to have a multiple.
    """
    if weight.kind != "int4" or weight.values.dim() != 3 or weight.scale_rows != 1 or weight.row_scale is not None:
        return False
    if weight.scale is None or weight.scale.dtype != torch.bfloat16:
        return False
    columns = weight.values.shape[-1] * 8
    group = min(weight.group, columns)
    regular = columns % 128 == 0 and columns % group == 0 and weight.values.shape[-2] % rows == 0
    return regular and (group == 32 or (group % 128 == 0 and (group == columns or group & (group - 1) == 0)))


def int4_tokens(like: torch.Tensor, weights: MoEWeights, top_k: int) -> int:
    """Tokens up to which the kernels take a layer's weights and activations of this dtype on this device; 0: none."""
    w, E = weights, weights.router.shape[0]
    plain = w.s2 is None or (w.s2.kind == "plain" and w.s2.values.shape[-1] % 32 == 0)
    if not like.is_cuda or like.dtype != torch.bfloat16 or not plain or E > MOST_EXPERTS or top_k > MOST_CHOICES:
        return 0
    if not reads(w.w13, 32) or not reads(w.w2, 16):
        return 0
    memory, slots = shared_memory(like.device), (slots_of(w.w13), slots_of(w.w2))
    return max((T for T in range(1, MOST_TOKENS + 1) if plan_int4(memory, T, E, top_k, *slots)), default=0)


@lru_cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block may have; 0 where csrc's kernels do not run."""
    if not (overlaps_launches(device) and ops.available(device)):
        return 0
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def moe_int4_cuda(
    x: torch.Tensor | Unnormed,
    weights: MoEWeights,
    top_k: int,
    add_to: torch.Tensor | None = None,
    plan: Int4Plan | None = None,
) -> torch.Tensor | None:
    """csrc's form of :func:`~.few_tokens.moe_few_tokens`, for up to `int4_tokens`."""
    w, T, E = weights, x.shape[0], weights.router.shape[0]
    plan = plan or plan_int4(shared_memory(rows_of(x).device), T, E, top_k, slots_of(w.w13), slots_of(w.w2))
    logits, hs, x = front_triton(x, w, hs_planes=1, xp_planes=1)
    lists = most_lists(T, E, top_k)
    h = x.new_empty(lists * TOGETHER, w.w2.values.shape[-1] * 8)
    y = torch.empty_like(x) if add_to is None else add_to
    ops.experts_int4_gate_up(h, x, *_parts(w.w13), logits, top_k, plan.gate_up_stages)
    shared = (None, None) if w.s2 is None else (hs, w.s2.values)
    how = add_to is not None, plan.down_warps, plan.down_stages
    ops.experts_int4_down(y, h, *_parts(w.w2), *shared, logits, top_k, *how)
    return y if add_to is None else None


def _parts(weight: KernelWeight) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    return weight.values, weight.scale.contiguous(), None if weight.zero is None else weight.zero.contiguous()
