"""The experts of one layer."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from vllm.distributed.parallel_state import get_tensor_parallel_group, tensor_model_parallel_all_reduce
from vllm.model_executor.layers.fused_moe.experts import (
    combine,
    experts_blocks,
    experts_grouped,
    experts_loop,
    has_grouped_matmul,
    plan_experts,
)
from vllm.model_executor.layers.fused_moe.router import topk_softmax
from vllm.model_executor.layers.linear import plain_plan, sources_of_parts
from vllm.model_executor.layers.quantization.plan import WeightPlan
from vllm.model_executor.parameter import Slot, Source


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

    def forward(self, x: torch.Tensor, router_logits: torch.Tensor) -> torch.Tensor:
        """x [T, D], router_logits [T, E] -> [T, D]."""
        weights, experts = topk_softmax(router_logits, self.top_k)
        return tensor_model_parallel_all_reduce(combine(self._choices(x, experts), weights))

    def _choices(self, x: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """x [T, D], experts [T, k] -> every choice's own result [T*k, D]."""
        plan = plan_experts(
            experts.numel(),
            self.num_experts,
            device=x.device.type,
            grouped_matmul=has_grouped_matmul(x.device, x.dtype, self.hidden_size, self.share),
            dense_is_free=self.scheme13.all_is_view and self.scheme2.all_is_view,
        )
        if plan.way == "grouped":
            w13, w2 = lambda: self.scheme13.all(self, "w13_"), lambda: self.scheme2.all(self, "w2_")
            return experts_grouped(x, experts, self.num_experts, w13, w2)
        if plan.way == "loop":
            return experts_loop(x, experts, self._w13, self._w2)
        elements = 2 * self.share * self.hidden_size
        return experts_blocks(x, experts, self.num_experts, plan.block, self._w13, self._w2, elements)

    def _w13(self, experts: torch.Tensor | slice) -> torch.Tensor:
        return self.scheme13.select(self, "w13_", experts)

    def _w2(self, experts: torch.Tensor | slice) -> torch.Tensor:
        return self.scheme2.select(self, "w2_", experts)
