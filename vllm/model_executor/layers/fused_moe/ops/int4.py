"""A mixture of int4 experts for as few choices an expert as decoding has: csrc/experts_int4.cu behind the launches of its neighbours.

For a few tokens as in ops/few_tokens.py, in three launches; for more over blocks of up to 8 choices of one expert as in ops/grouped.py.
Activations stay in their natural order.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from vllm import _custom_ops as ops
from vllm.model_executor.layers.fla.ops.device import overlaps_launches
from vllm.model_executor.layers.fused_moe.ops.front import front_triton
from vllm.model_executor.layers.fused_moe.ops.route import Routed
from vllm.model_executor.layers.fused_moe.ops.weights import MoEWeights
from vllm.model_executor.layers.ops.rms_norm import Unnormed

if TYPE_CHECKING:
    from vllm.model_executor.layers.quantization.base import KernelWeight

BLOCK = 8
"""Choices of one expert that a product takes."""
MOST_EXPERTS, MOST_CHOICES = 512, 16
"""Bounds of the kernels: experts of a layer, choices of a token."""
OWN_BYTES = 12 << 10
"""What the kernels declare of shared memory, at most, beside the rows of weights."""


def reads(weight: KernelWeight, rows: int) -> bool:
    """Whether the kernels read these stacked rows: whole chunks of 128 columns, bfloat16 scales of groups of 32 or of whole chunks.

    Args:
        rows: of which every expert has to have a multiple.
    """
    if weight.kind != "int4" or weight.values.dim() != 3 or weight.scale_rows != 1 or weight.row_scale is not None:
        return False
    if weight.scale is not None and weight.scale.dtype != torch.bfloat16:
        return False
    columns = weight.values.shape[-1] * 8
    group = min(weight.group, columns)
    regular = columns % 128 == 0 and columns % group == 0 and weight.values.shape[-2] % rows == 0
    return regular and (group == 32 or (group % 128 == 0 and group & (group - 1) == 0))


def shared_bytes(top_k: int, inner: int, shared: int) -> int:
    """Bytes of shared memory that `down` takes of a few tokens: 16 rows of every choice and of the shared expert.

    Args:
        inner, shared: inputs of the experts' and of the shared expert's second matrix; 0: there is none.
    """
    row = inner // 2 + 16 + 3 * (inner // 32 + 4)  # words; scales and zero points at most
    return 16 * (top_k * row + (2 * shared + 64 if shared else 0)) + OWN_BYTES


def fits_int4(x: torch.Tensor, weights: MoEWeights, top_k: int) -> bool:
    """Whether the kernels take these activations and weights, on this device."""
    w = weights
    if not x.is_cuda or x.dtype != torch.bfloat16 or w.w13.kind != "int4" or w.w2.kind != "int4":
        return False
    limit = _shared_memory(x.device)
    if limit == 0 or w.router.shape[0] > MOST_EXPERTS or top_k > MOST_CHOICES:
        return False
    inner, shared = w.w2.values.shape[-1] * 8, 0
    if w.s2 is not None:
        shared = w.s2.values.shape[-1]
        if w.s2.kind != "plain" or shared % 32:
            return False
    return reads(w.w13, 32) and reads(w.w2, 128) and shared_bytes(top_k, inner, shared) <= limit


@lru_cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that a block may have; 0 where the kernels do not run."""
    if not (overlaps_launches(device) and ops.available(device)):
        return 0
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def _parts(weight: KernelWeight) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    zero = None if weight.zero is None else weight.zero.contiguous()
    return weight.values, weight.scale.contiguous(), zero


def moe_few_tokens_cuda(
    x: torch.Tensor | Unnormed, weights: MoEWeights, top_k: int, add_to: torch.Tensor | None = None
) -> torch.Tensor | None:
    """csrc's form of :func:`~.few_tokens.moe_few_tokens`, for what `fits_int4` lets through."""
    w, T = weights, x.shape[0]
    logits, hs, x = front_triton(x, w, hs_planes=1, xp_planes=1)
    h, y = x.new_empty(T * top_k, w.w2.values.shape[-1] * 8), torch.empty_like(x) if add_to is None else add_to
    chosen = torch.empty(T * top_k, dtype=torch.int32, device=x.device)
    ops.experts_gate_up_token(h, x, *_parts(w.w13), logits, chosen, top_k)
    shared = (None, None) if w.s2 is None else (hs, w.s2.values)
    # choosing again hides the way to the weights' addresses, which with more tokens other blocks do
    ops.experts_down_token(y, h, *_parts(w.w2), *shared, logits, chosen, top_k, T == 1, add_to is not None)
    return y if add_to is None else None


def experts_cuda(x: torch.Tensor, routed: Routed, w13: KernelWeight, w2: KernelWeight) -> torch.Tensor:
    """csrc's form of :func:`~.grouped.experts_torch`: x [T, D], in blocks of BLOCK choices -> [T * top_k, D] in x's dtype."""
    choices, top_k = routed.shares.numel(), routed.shares.shape[1]
    h, y = x.new_empty(choices, w2.values.shape[-1] * 8), x.new_empty(choices, x.shape[1])
    lists = routed.order, routed.block_expert, routed.block_rows
    ops.experts_gate_up_blocks(h, x.contiguous(), *_parts(w13), *lists, top_k)
    ops.experts_down_blocks(y, h, *_parts(w2), *lists)
    return y
