"""y_s = down_e(silu(gate_e x) * up_e x) for every choice s = (token, expert e): the ways to the same numbers.

    few      kernels that stream each choice's packed weights, router and shared expert included (ops/few_tokens.py)
    w4       csrc's kernels that walk over the chosen experts' weights of 4 bits, router and shared expert included (ops/w4.py)
    tiles    kernels over blocks of one expert's choices, weights as they are stored (ops/route.py, ops/grouped.py)
    loop     expert by expert, those that have tokens: cheap and exact, but it asks the device which they are. For the CPU.
    grouped  tokens sorted by expert, then torch's grouped matrix product. CUDA devices with a grouped kernel.
    blocks   tokens sorted by expert into blocks of one expert each, then a batched product with each block's own copy of its
             expert's matrix. Any device; the number of blocks is fixed by the number of tokens, so nothing waits.

`plan_experts` chooses; it is a pure function of the problem. Weights come through the weight scheme: `select` for some experts'
dense matrices, `all` for the whole stack.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from vllm.model_executor.layers.ops.silu_and_mul import silu_and_mul

WeightsOf = Callable[[torch.Tensor | slice], torch.Tensor]
"""Experts [n] (or a run of n) -> their dense matrices [n, rows, columns]."""

FEW_TOKENS = {"plain": 8, "int4": 12, "int8": 12, "fp8": 16, "fp4": 16}
"""Tokens up to which each choice reads its expert's weights for itself, by how they are stored: what takes longer to become 16-bit floats
waits longer for blocks of 16 choices that are mostly empty (benchmarks/results/moe_h200.json)."""
MOST_FEW_TOKENS = 16
"""The same where nothing else reads them as they are stored."""

W4_TOKENS = {"int4": (4, 24), "fp4": (2, 64)}
"""Tokens between which csrc's kernels for 4 bits are the fastest: fewer have an expert each, more are waiting for tensor cores
(benchmarks/results/moe_h200.json)."""

MAX_BYTES = 256 << 20
"""Bound on copies of expert matrices that `blocks` holds at once."""


@dataclass(frozen=True)
class ExpertsPlan:
    """How one batch is computed. `block` is the number of choices in a block, for `blocks` and `tiles`."""

    way: str
    block: int = 0


def plan_experts(
    tokens: int,
    top_k: int,
    num_experts: int,
    *,
    device: str,
    kernels: bool,
    tiles: bool,
    grouped_matmul: bool,
    dense_is_free: bool,
    kind: str = "plain",
    w4_tokens: int = 0,
) -> ExpertsPlan:
    """Choose a way for one batch.

    Args:
        kernels: whether the kernels in `ops` take the activations and weights; `tiles`, whether the grouped ones do too.
        grouped_matmul: whether `has_grouped_matmul` says so for this device, dtype and size.
        dense_is_free: the weights are dense already; otherwise `grouped` has to dequantise every expert of the layer first, which
            few choices do not repay.
        kind: of the stored weights, as in KernelWeight.
        w4_tokens: tokens up to which csrc's kernels for 4 bits take the activations and weights.
    """
    choices = tokens * top_k
    if device == "cpu":
        return ExpertsPlan("loop")
    least, most = W4_TOKENS.get(kind, (1, 0))
    if least <= tokens <= min(w4_tokens, most):
        return ExpertsPlan("w4")
    if kernels and 0 < tokens <= (FEW_TOKENS[kind] if tiles else MOST_FEW_TOKENS):
        return ExpertsPlan("few")
    if kernels and tiles and tokens:
        per_expert = choices // num_experts
        return ExpertsPlan("tiles", 16 if per_expert < 16 else 64 if dense_is_free and per_expert >= 64 else 32)
    if grouped_matmul and (dense_is_free or choices > num_experts // 2):
        return ExpertsPlan("grouped")
    if choices <= num_experts:
        return ExpertsPlan("blocks", 1)
    per_expert = -(-choices // num_experts)
    return ExpertsPlan("blocks", min(128, max(16, 1 << (per_expert - 1).bit_length())))


@dataclass(frozen=True)
class ExpertsFold:
    """A mixture of experts as `layers/folding.py` asks about it.

    kernels, tiles, kind, w4_tokens: as for `plan_experts`.
    """

    top_k: int
    num_experts: int
    kernels: bool
    tiles: bool
    kind: str = "plain"
    w4_tokens: int = 0

    def folds(self, rows: int, gpu: str) -> bool:
        """Where the kernels include the router: those normalise the rows, and write their results."""
        plan = plan_experts(
            rows,
            self.top_k,
            self.num_experts,
            device="cuda",
            kernels=self.kernels,
            tiles=self.tiles,
            grouped_matmul=False,
            dense_is_free=False,
            kind=self.kind,
            w4_tokens=self.w4_tokens,
        )
        return plan.way in ("few", "w4")


@functools.cache
def has_grouped_matmul(device: torch.device, dtype: torch.dtype, *widths: int) -> bool:
    """Whether torch multiplies groups in one launch here. Elsewhere its grouped product reads the group sizes back to the host.

    The kernel wants bfloat16, Hopper or data-centre Blackwell, and rows of whole 16 bytes.
    """
    if device.type != "cuda" or dtype != torch.bfloat16 or any(width % 8 for width in widths):
        return False
    return hasattr(F, "grouped_mm") and torch.cuda.get_device_capability(device)[0] in (9, 10)


def experts_loop(x: torch.Tensor, experts: torch.Tensor, w13: WeightsOf, w2: WeightsOf) -> torch.Tensor:
    """x [T, D], experts [T, k] -> y [T*k, D], one row a choice."""
    T, top_k = experts.shape
    flat = experts.reshape(-1)
    order = flat.argsort(stable=True)
    y = x.new_empty(T * top_k, x.shape[1])
    begin = 0
    for expert, count in zip(*(u.tolist() for u in torch.unique_consecutive(flat[order], return_counts=True))):
        rows = order[begin : begin + count]
        begin += count
        one = slice(expert, expert + 1)
        y[rows] = F.linear(silu_and_mul(F.linear(x[rows // top_k], w13(one)[0])), w2(one)[0])
    return y


def experts_grouped(
    x: torch.Tensor,
    experts: torch.Tensor,
    num_experts: int,
    w13: Callable[[], torch.Tensor],
    w2: Callable[[], torch.Tensor],
) -> torch.Tensor:
    """As `experts_loop`, with dense stacks w13() [E, 2I, D] and w2() [E, D, I], each asked for when it is needed."""
    top_k = experts.shape[1]
    flat = experts.reshape(-1)
    sorted_experts, order = flat.sort(stable=True)
    ends = _ends(sorted_experts, num_experts).int()  # [E]
    # [T*k, D] -> [T*k, 2I] -> [T*k, I] -> [T*k, D], rows sorted by expert
    h = F.grouped_mm(x[order // top_k], w13().transpose(1, 2), offs=ends)
    h = F.grouped_mm(silu_and_mul(h), w2().transpose(1, 2), offs=ends)
    return torch.empty_like(h).index_copy_(0, order, h)


def experts_blocks(
    x: torch.Tensor, experts: torch.Tensor, num_experts: int, block: int, w13: WeightsOf, w2: WeightsOf, elements: int
) -> torch.Tensor:
    """As `experts_loop`, with blocks of up to `block` choices of one expert.

    Args:
        elements: of the larger of an expert's matrices, to bound the memory of their copies.
    """
    T, top_k = experts.shape
    choices = T * top_k
    sorted_experts, order = experts.reshape(-1).sort(stable=True)
    ends = _ends(sorted_experts, num_experts)  # [E]
    counts = torch.diff(ends, prepend=ends.new_zeros(1))
    block_ends = ((counts + block - 1) // block).cumsum(0)  # [E], in blocks
    num_blocks = min(choices, -(-choices // block) + num_experts)  # as many as there can be
    # The j-th choice of expert e goes to row j of e's first block and on.
    first = (ends - counts)[sorted_experts]
    first_block = block_ends[sorted_experts] - (counts[sorted_experts] + block - 1) // block
    place = first_block * block + torch.arange(choices, device=x.device) - first  # [T*k]
    blocks = x.new_zeros(num_blocks * block, x.shape[1]).index_copy_(0, place, x[order // top_k])
    blocks = blocks.view(num_blocks, block, -1)
    of_block = torch.searchsorted(block_ends, torch.arange(num_blocks, device=x.device), right=True)
    of_block = of_block.clamp(max=num_experts - 1)  # spare blocks compute zeros
    step = max(1, MAX_BYTES // (elements * x.element_size()))
    y = torch.empty_like(blocks)
    for begin in range(0, num_blocks, step):
        piece = slice(begin, begin + step)
        h = torch.bmm(blocks[piece], w13(of_block[piece]).transpose(1, 2))
        y[piece] = torch.bmm(silu_and_mul(h), w2(of_block[piece]).transpose(1, 2))
    out = x.new_empty(choices, x.shape[1])
    return out.index_copy_(0, order, y.view(num_blocks * block, -1)[place])


def combine(y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted sum over each token's choices: y [T*k, D], weights [T, k] -> [T, D]."""
    T, top_k = weights.shape
    return torch.bmm(weights[:, None].to(y.dtype), y.view(T, top_k, -1))[:, 0]


def _ends(sorted_experts: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Where each expert's choices end in the sorted list: int64 [E]."""
    return torch.searchsorted(sorted_experts, torch.arange(num_experts, device=sorted_experts.device), right=True)
