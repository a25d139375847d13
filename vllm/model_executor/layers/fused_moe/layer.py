"""The experts of one layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from vllm.distributed.parallel_state import get_tensor_parallel_group, tensor_model_parallel_all_reduce
from vllm.model_executor.layers.fused_moe.experts import (
    ExpertsFold,
    ExpertsPlan,
    combine,
    experts_blocks,
    experts_grouped,
    experts_loop,
    has_grouped_matmul,
    plan_experts,
)
from vllm.model_executor.layers.fused_moe.ops.few_tokens import moe_few_tokens
from vllm.model_executor.layers.fused_moe.ops.front import front_triton, prefers_rows
from vllm.model_executor.layers.fused_moe.ops.grouped import (
    by_planes_triton,
    combine_triton,
    experts_triton,
    fits_grouped,
)
from vllm.model_executor.layers.fused_moe.ops.route import route
from vllm.model_executor.layers.fused_moe.ops.w4 import moe_w4_cuda, w4_tokens
from vllm.model_executor.layers.fused_moe.ops.weights import PLANES, MoEWeights, fits
from vllm.model_executor.layers.fused_moe.router import topk_softmax
from vllm.model_executor.layers.linear import Linear, plain_plan, plus, sources_of_parts
from vllm.model_executor.layers.ops.rms_norm import Unnormed, normed, rows_of
from vllm.model_executor.layers.quantization.plan import WeightPlan
from vllm.model_executor.parameter import Slot, Source

FRONT_TOKENS = 64
"""Tokens up to which one launch computes what the router and the shared expert make of x."""

PIECE = 8192
"""Tokens that `tiles` computes at once: each choice has a row of its own until they are added up."""


@dataclass(frozen=True)
class SharedExpert:
    """An expert that every token goes to: sigmoid(gate x) * mlp(x).

    `mlp` has gate_up_proj, act and down_proj, down(act(gate_up x)), and sums over ranks by itself; `gate` is x -> [T, 1].
    """

    mlp: nn.Module
    gate: Linear

    def down(self, h: torch.Tensor) -> torch.Tensor:
        """h [T, S] -> this rank's part of [T, D]."""
        return self.mlp.down_proj.scheme.apply(self.mlp.down_proj, h)


class FusedMoE(nn.Module):
    """Sum over a token's top_k experts of weight * down(silu(gate x) * up x).

    Matrices are stacks: w13 [E, 2I, D] (gate rows, then up rows) and w2 [E, D, I], each expert's inner size I cut over ranks.
    Checkpoints store them per expert (`experts.7.gate_proj`, ...) or, unquantised, fused (`experts.gate_up_proj`, `experts.down_proj`).

    Args:
        prefix: "model.layers.0.mlp.experts".
    """

    def __init__(
        self,
        num_experts: int,
        top_k: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        prefix: str,
        plan: WeightPlan | None = None,
    ) -> None:
        super().__init__()
        plan = plan or plain_plan()
        self.prefix, self.num_experts, self.top_k = prefix, num_experts, top_k
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        group = get_tensor_parallel_group()
        self.share = group.share(intermediate_size, f"{prefix}: intermediate size")
        self.take = slice(group.rank * self.share, (group.rank + 1) * self.share)
        self.group = group
        gate_up = [f"{prefix}.0.gate_proj", f"{prefix}.0.up_proj"]
        self.scheme13 = plan.scheme(gate_up, hidden_size)
        self.scheme2 = plan.scheme([f"{prefix}.0.down_proj"], intermediate_size)
        self.scheme13.create(self, "w13_", (num_experts,), 2 * self.share, hidden_size, plan.dtype)
        self.scheme2.create(self, "w2_", (num_experts,), hidden_size, self.share, plan.dtype)
        self._weights: MoEWeights | None = None
        self._w4_tokens = 0

    def checkpoint_slots(self) -> Iterator[Slot]:
        D, intermediate = self.hidden_size, self.intermediate_size
        parts = {"gate_proj": intermediate, "up_proj": intermediate}
        modules = {name: (name,) for name in parts}
        for e in range(self.num_experts):
            for source in sources_of_parts(parts, modules, f"{self.prefix}.{e}", self.group):
                yield from self.scheme13.slots(self, "w13_", source, D, slice(None), (e,))
            down = Source(f"{self.prefix}.{e}.down_proj", D, slice(0, D), slice(0, D))
            yield from self.scheme2.slots(self, "w2_", down, intermediate, self.take, (e,))
        yield from self._fused_slots()

    def _fused_slots(self) -> Iterator[Slot]:
        E, D, intermediate = self.num_experts, self.hidden_size, self.intermediate_size

        def shard13(w: torch.Tensor) -> torch.Tensor:  # [E, 2I, D] -> [E, 2I/size, D]
            return w.unflatten(1, (2, intermediate))[:, :, self.take].flatten(1, 2)

        if hasattr(self, "w13_weight"):
            shape = (E, 2 * intermediate, D)
            yield Slot(f"{self.prefix}.gate_up_proj", shape, self.w13_weight, (), shard13, "fused")
        if hasattr(self, "w2_weight"):
            shape = (E, D, intermediate)
            yield Slot(f"{self.prefix}.down_proj", shape, self.w2_weight, (), lambda w: w[:, :, self.take], "fused")

    def fill_dummy(self, generator: torch.Generator) -> None:
        self.scheme13.fill_dummy(self, "w13_", self.hidden_size**-0.5, generator)
        self.scheme2.fill_dummy(self, "w2_", self.intermediate_size**-0.5, generator)

    def process_weights_after_loading(self) -> None:
        self.scheme13.process(self, "w13_")
        self.scheme2.process(self, "w2_")
        self._weights = None

    def forward(
        self,
        x: torch.Tensor | Unnormed,
        router: Linear,
        shared: SharedExpert | None = None,
        add_to: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """x [T, D] -> [T, D], with the shared expert's part where there is one.

        With `add_to` [T, D] the result is added to it in place, rounded to its dtype before, and None returned.

        Args:
            router: x -> logits [T, E].
        """
        rows = rows_of(x)
        weights = self._kernel_weights(router, shared) if rows.is_cuda else None
        plan = plan_experts(
            rows.shape[0],
            self.top_k,
            self.num_experts,
            device=rows.device.type,
            kernels=weights is not None and fits(rows, weights),
            tiles=weights is not None and fits_grouped(weights.w13, weights.w2),
            grouped_matmul=has_grouped_matmul(rows.device, rows.dtype, self.hidden_size, self.share),
            dense_is_free=self.scheme13.all_is_view and self.scheme2.all_is_view,
            kind="plain" if weights is None else weights.w13.kind,
            w4_tokens=self._w4_tokens if weights is not None and rows.dtype == weights.router.dtype else 0,
        )
        if add_to is not None and (
            self.group.size > 1 or plan.way not in ("few", "w4", "tiles") or rows.shape[0] > PIECE
        ):
            return plus(add_to, self.forward(x, router, shared))
        if plan.way in ("few", "w4"):
            y = (moe_few_tokens if plan.way == "few" else moe_w4_cuda)(x, weights, self.top_k, add_to)
            return y if y is None else tensor_model_parallel_all_reduce(y)
        if plan.way == "tiles" and rows.shape[0] <= PIECE:
            y = self._tiles(x, weights, router, shared, plan.block, add_to)
            return y if y is None else tensor_model_parallel_all_reduce(y)
        x = normed(x)
        if plan.way == "tiles":
            pieces = [self._tiles(piece, weights, router, shared, plan.block) for piece in x.split(PIECE)]
            return tensor_model_parallel_all_reduce(torch.cat(pieces))
        chances, experts = topk_softmax(router(x), self.top_k)
        y = tensor_model_parallel_all_reduce(combine(self._choices(x, experts, plan), chances))
        return y if shared is None else y + shared.gate(x).sigmoid() * shared.mlp(x)

    def part(self, router: Linear, shared: SharedExpert | None) -> ExpertsFold:
        """What decides whether a norm and an add can be part of these kernels, where activations have the router's dtype."""
        w = self._kernel_weights(router, shared)
        return ExpertsFold(
            self.top_k,
            self.num_experts,
            kernels=w is not None and fits(w.router, w),
            tiles=w is not None and fits_grouped(w.w13, w.w2),
            kind="plain" if w is None else w.w13.kind,
            w4_tokens=self._w4_tokens,
        )

    def _tiles(
        self,
        x: torch.Tensor | Unnormed,
        weights: MoEWeights,
        router: Linear,
        shared: SharedExpert | None,
        block: int,
        add_to: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """x [T, D] -> this rank's part of [T, D], in blocks of one expert's choices."""
        T, kind = x.shape[0], weights.w13.kind
        extra = None
        if T <= FRONT_TOKENS and prefers_rows(T, weights):
            logits, hs, xp = front_triton(x, weights, hs_planes=1, xp_planes=PLANES[kind])
            if shared is not None:
                extra = shared.down(hs), logits[:, self.num_experts :]
        else:
            x = normed(x)
            logits, xp = router(x), by_planes_triton(x.contiguous(), kind)
            if shared is not None:
                extra = shared.down(shared.mlp.act(shared.mlp.gate_up_proj(x))), shared.gate(x)
        routed = route(logits, self.num_experts, self.top_k, block)
        y = experts_triton(xp, routed, weights.w13, weights.w2)
        return combine_triton(y, routed.shares, *(extra or (None, None)), add_to)

    def _choices(self, x: torch.Tensor, experts: torch.Tensor, plan: ExpertsPlan) -> torch.Tensor:
        """x [T, D], experts [T, k] -> every choice's own result [T*k, D]."""
        if plan.way == "grouped":
            w13, w2 = lambda: self.scheme13.all(self, "w13_"), lambda: self.scheme2.all(self, "w2_")
            return experts_grouped(x, experts, self.num_experts, w13, w2)
        if plan.way == "loop":
            return experts_loop(x, experts, self._w13, self._w2)
        elements = 2 * self.share * self.hidden_size
        return experts_blocks(x, experts, self.num_experts, plan.block, self._w13, self._w2, elements)

    def _kernel_weights(self, router: Linear, shared: SharedExpert | None) -> MoEWeights | None:
        """The layer as kernels read it; None where they cannot."""
        if self._weights is None:
            w13, w2 = self.scheme13.kernel_weight(self, "w13_"), self.scheme2.kernel_weight(self, "w2_")
            parts = [w13, w2, router.scheme.kernel_weight(router)]
            if shared is not None:
                linears = (shared.gate, shared.mlp.gate_up_proj, shared.mlp.down_proj)
                parts += [linear.scheme.kernel_weight(linear) for linear in linears]
            plain = parts[2:4]  # router, gate
            if None in parts or any(part.kind != "plain" for part in plain):
                return None
            self._weights = MoEWeights(plain[0].values, w13, w2, *(part.values for part in plain[1:]), *parts[4:])
            self._w4_tokens = w4_tokens(plain[0].values, self._weights, self.top_k)
        return self._weights

    def _w13(self, experts: torch.Tensor | slice) -> torch.Tensor:
        return self.scheme13.select(self, "w13_", experts)

    def _w2(self, experts: torch.Tensor | slice) -> torch.Tensor:
        return self.scheme2.select(self, "w2_", experts)
