"""A mixture of experts with int4 or fp4 weights for a few tokens: csrc/experts_w4.cu behind the front that x alone decides (ops/front.py).

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
from vllm.model_executor.layers.fused_moe.ops.weights import PLANES, MoEWeights
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
class W4Plan:
    """Stages of the rings of both kernels, and warps of `down`."""

    gate_up_stages: int
    down_warps: int
    down_stages: int


def most_lists(tokens: int, num_experts: int, top_k: int) -> int:
    """Lists of up to 8 tokens of one expert that there may be."""
    choices = tokens * top_k
    return min(choices, (choices + num_experts * (TOGETHER - 1)) // TOGETHER)


def shared_bytes(tokens: int, lists: int, stages: int, warps: int, slots: tuple[int, int], rows: int) -> int:
    """Bytes of shared memory of `gate_up`, which has tiles of 32 `rows`, or of `down`, which has 16.

    Args:
        slots: bytes that a row's scales and its zero points take in a stage.
    """
    sums = 2 * 8 * 8 * 36 * 4 if rows == 32 else warps * tokens * 64
    own = lists * (11 if rows == 32 else 43)
    return sums + -(-own // 128) * 128 + warps * stages * rows * (80 + sum(slots))


@lru_cache(maxsize=4096)
def plan_w4(
    memory: int,
    tokens: int,
    num_experts: int,
    top_k: int,
    slots13: tuple[int, int],
    slots2: tuple[int, int],
) -> W4Plan | None:
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
    return W4Plan(STAGES, down[0], STAGES)


def slots_of(weight: KernelWeight) -> tuple[int, int]:
    """Bytes of a stage that a row's scales and its zero points take."""
    return 8 if weight.kind == "fp4" or weight.group == 32 else 4, 0 if weight.zero is None else 4


def reads(weight: KernelWeight, rows: int) -> bool:
    """Whether the kernels read these stacked rows: whole chunks of 128 columns of int4 with bfloat16 scales of groups of 32 or of whole
    chunks, or of fp4 with scales of 8 bits.

    Args:
        rows: of which every expert has to have a multiple.
    """
    dtype = {"int4": torch.bfloat16, "fp4": torch.float8_e4m3fn}.get(weight.kind)
    if dtype is None or weight.values.dim() != 3 or weight.scale_rows != 1 or weight.scale.dtype != dtype:
        return False
    columns = weight.values.shape[-1] * PLANES[weight.kind]
    group = min(weight.group, columns)
    if columns % 128 or columns % group or weight.values.shape[-2] % rows:
        return False
    if weight.kind == "fp4":
        return group == 16
    return group == 32 or (group % 128 == 0 and (group == columns or group & (group - 1) == 0))


def reads_shared(weight: KernelWeight, experts: KernelWeight) -> bool:
    """Whether `down` reads this matrix of the shared expert beside `experts`: in 16 bits, or fp4 beside fp4."""
    if weight.kind == "plain":
        return weight.values.shape[-1] % 32 == 0
    both = weight.kind == experts.kind == "fp4" and weight.scale.dtype == torch.float8_e4m3fn
    return both and weight.group == 16 and weight.scale_rows == 1 and weight.values.shape[-1] % 16 == 0


def w4_tokens(like: torch.Tensor, weights: MoEWeights, top_k: int) -> int:
    """Tokens up to which the kernels take a layer's weights and activations of this dtype on this device; 0: none."""
    w, E = weights, weights.router.shape[0]
    if not like.is_cuda or like.dtype != torch.bfloat16 or E > MOST_EXPERTS or top_k > MOST_CHOICES:
        return 0
    if not reads(w.w13, 32) or not reads(w.w2, 16) or not (w.s2 is None or reads_shared(w.s2, w.w2)):
        return 0
    memory, slots = shared_memory(like.device), (slots_of(w.w13), slots_of(w.w2))
    return max((T for T in range(1, MOST_TOKENS + 1) if plan_w4(memory, T, E, top_k, *slots)), default=0)


@lru_cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block may have; 0 where csrc's kernels do not run."""
    if not (overlaps_launches(device) and ops.available(device)):
        return 0
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def moe_w4_cuda(
    x: torch.Tensor | Unnormed,
    weights: MoEWeights,
    top_k: int,
    add_to: torch.Tensor | None = None,
    plan: W4Plan | None = None,
) -> torch.Tensor | None:
    """csrc's form of :func:`~.few_tokens.moe_few_tokens`, for up to `w4_tokens`."""
    w, T, E = weights, x.shape[0], weights.router.shape[0]
    plan = plan or plan_w4(shared_memory(rows_of(x).device), T, E, top_k, slots_of(w.w13), slots_of(w.w2))
    logits, hs, x = front_triton(x, w, hs_planes=1, xp_planes=1)
    lists = most_lists(T, E, top_k)
    h = x.new_empty(lists * TOGETHER, w.w2.values.shape[-1] * PLANES[w.w2.kind])
    y = torch.empty_like(x) if add_to is None else add_to
    ops.experts_w4_gate_up(h, x, *_parts(w.w13), logits, top_k, plan.gate_up_stages)
    shared = (None,) * 4
    if w.s2 is not None:
        words, scale, _, row_scale = _parts(w.s2)
        shared = hs, words, scale, row_scale
    how = add_to is not None, plan.down_warps, plan.down_stages
    ops.experts_w4_down(y, h, *_parts(w.w2), *shared, logits, top_k, *how)
    return y if add_to is None else None


def _parts(weight: KernelWeight) -> tuple[torch.Tensor | None, ...]:
    """Values, scale, zero points and factors of rows."""
    parts = (weight.values, weight.scale, weight.zero, weight.row_scale)
    return tuple(part if part is None else part.contiguous() for part in parts)
