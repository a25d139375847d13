"""Which kernels prompts of many lengths would compile that the warm-up before the first request does not.

``python -m tests.kernels.prompt_lengths`` prints one line for each. Launches are recorded, not run: see `tests.kernels.aot`.
"""

import sys
from dataclasses import replace

import torch
from triton.runtime.jit import JITFunction

from tests.kernels.aot import describe  # before any kernel: it turns the interpreter off
from tests.kernels.attention_case import AttentionCase
from tests.kernels.experts import layer, stored
from vllm.model_executor.layers.fla.ops import chunk, gating, layernorm_guard
from vllm.model_executor.layers.folding import INPUT_ROWS, POST_ROWS
from vllm.model_executor.layers.fused_moe.experts import plan_experts
from vllm.model_executor.layers.fused_moe.layer import FRONT_TOKENS
from vllm.model_executor.layers.fused_moe.ops import few_tokens, front, grouped, grouped_fp8
from vllm.model_executor.layers.fused_moe.ops.route import route_triton
from vllm.model_executor.layers.mamba.ops import causal_conv1d
from vllm.model_executor.layers.ops import attention_prefill, quantised_gemm
from vllm.model_executor.layers.ops.quantised_gemm_plan import Gpu
from vllm.model_executor.layers.ops.rms_norm import Unnormed
from vllm.v1.worker.warm_up import _LENGTHS

D, E, TOP_K, I = 2048, 256, 8, 512  # of the 35B model
HEADS_K, HEADS_V, WIDTH = 16, 32, 128
LONGEST = 4096
LENGTHS = [
    *range(1, 140),
    *range(144, 700, 16),
    255,
    257,
    300,
    511,
    513,
    1001,
    1023,
    1024,
    1025,
    1200,
    1536,
    1999,
    2000,
    2047,
    2048,
    3000,
    4095,
]
DTYPE = torch.bfloat16
KEY, VALUE = HEADS_K * WIDTH, HEADS_V * WIDTH


class Layers:
    """The launches of one GDN layer's core, one attention layer's, one layer of experts in int4 and one in FP8, and of linear layers."""

    def __init__(self) -> None:
        experts = layer(2, D, I, I, "int4", DTYPE, "cpu")  # two stand for all: nothing is launched
        self.experts = replace(experts, router=torch.zeros(E, D, dtype=DTYPE))
        self.fp8 = [
            replace(stored(shape, "fp8 row", DTYPE, "cpu"), quantize_inputs=True)
            for shape in ((2, 2 * I, D), (2, D, I))
        ]
        self.linear = [
            stored((D, D), "int4", DTYPE, "cpu"),
            replace(self.fp8[0], values=self.fp8[0].values[0], scale=self.fp8[0].scale[0]),
        ]
        self.state = torch.zeros(4, HEADS_V, WIDTH, WIDTH)
        self.windows = torch.zeros(4, 3, 2 * KEY + VALUE, dtype=DTYPE).transpose(1, 2)
        self.taps = torch.zeros(4, 2 * KEY + VALUE, dtype=DTYPE).T

    def prompt(self, T: int, behind: int) -> None:
        """behind: sequences that decode in the same step, whose integers come first."""
        self._gdn(T, behind)
        self._experts(T)
        self._linear(T)
        case = AttentionCase([(0, T)], 16, 2, 256, 64, DTYPE, DTYPE)
        attention_prefill.attention_prefill_triton(case.rows, case.clean, case.meta, case.scale, case.out())

    def _gdn(self, T: int, behind: int) -> None:
        projected = torch.zeros(T, 2 * KEY + 2 * VALUE + 2 * HEADS_V, dtype=DTYPE)
        mixed, z, b, a = projected.split([2 * KEY + VALUE, VALUE, HEADS_V, HEADS_V], dim=-1)
        starts, slot = torch.tensor([0, T], dtype=torch.int32), torch.ones(2, dtype=torch.int32)[behind:][:1]
        first, vector = torch.zeros(2, dtype=torch.bool)[behind:][:1], torch.zeros(HEADS_V)
        convolved = causal_conv1d.causal_conv1d_fn_triton(
            mixed.T, self.taps, None, self.windows, starts, slot, first, query_start_loc_cpu=[0, T]
        ).T
        q, k, v = (x.unflatten(-1, (-1, WIDTH))[None] for x in convolved.split([KEY, KEY, VALUE], dim=-1))
        g, beta = gating.fused_gdn_gating_triton(vector, a, b, vector)
        o, _ = chunk.chunk_gated_delta_rule_triton(
            q,
            k,
            v,
            g,
            beta,
            initial_state=self.state,
            cu_seqlens=starts,
            cu_seqlens_cpu=[0, T],
            ssm_state_indices=slot,
            has_initial_state=first,
            use_qk_l2norm_in_kernel=True,
        )
        layernorm_guard.rmsnorm_gated_triton(o[0], torch.zeros(WIDTH), z.unflatten(-1, (-1, WIDTH)))

    def _experts(self, T: int) -> None:
        x = torch.zeros(T, D, dtype=DTYPE)
        self._experts_of(x, x, None)
        if T <= INPUT_ROWS:
            self._experts_of(x, x, x)
        if T <= POST_ROWS:
            self._experts_of(x, Unnormed(x, torch.zeros(D, dtype=DTYPE), 1e-6, True), x)

    def _linear(self, T: int) -> None:
        x = torch.zeros(T, D, dtype=DTYPE)
        for weight in self.linear:
            quantised_gemm.quantised_linear(x, weight)
        routed = route_triton(torch.zeros(T, E), E, TOP_K, 16 if T * TOP_K < 16 * E else 32)
        if routed.block >= grouped_fp8.LEAST_BLOCK:
            grouped_fp8.experts_fp8_triton(x, routed, *self.fp8)

    def _experts_of(self, x: torch.Tensor, rows: torch.Tensor | Unnormed, add_to: torch.Tensor | None) -> None:
        T, weights = x.shape[0], self.experts
        plan = plan_experts(
            T,
            TOP_K,
            E,
            device="cuda",
            kernels=True,
            tiles=True,
            grouped_matmul=True,
            dense_is_free=False,
            kind="int4",
        )
        if plan.way == "few":
            few_tokens.moe_few_tokens_triton(rows, weights, TOP_K, add_to)
            return
        by_front = T <= FRONT_TOKENS
        if by_front:
            front.front_triton(rows, weights, hs_planes=1, xp_planes=8)
        else:
            grouped.by_planes_triton(x, "int4")
        routed = route_triton(torch.zeros(T, E + by_front), E, TOP_K, plan.block)
        y = grouped.experts_triton(x, routed, weights.w13, weights.w2)
        grouped.combine_triton(y, routed.shares, x, x[:, :1], add_to)


def compiled_by(layers: Layers, T: int, behind: int = 0) -> dict[str, str]:
    """What Triton would compile for a prompt of T tokens, alone or behind others: signature, constants and specialisations -> the kernel's name."""
    seen: dict[str, str] = {}

    def run(self, *args, grid, warmup, **kwargs):
        values = dict(zip(self.arg_names, args)) | {name: kwargs[name] for name in self.arg_names if name in kwargs}
        entry = describe(self, tuple(values[name] for name in self.arg_names), kwargs)
        seen[repr((self.fn.__name__, *entry[1:]))] = self.fn.__name__

    original, JITFunction.run = JITFunction.run, run
    try:
        layers.prompt(T, behind)
    finally:
        JITFunction.run = original
    return seen


def late_kernels(layers: Layers, warmed: list[int], lengths: list[int]) -> dict[str, list[int]]:
    """Kernels that are compiled after the warm-up's lengths, and by which prompts."""
    ready = {key for T in warmed for key in compiled_by(layers, T)}
    late: dict[str, list[int]] = {}
    for T in lengths:
        for key, name in (compiled_by(layers, T) | compiled_by(layers, T, behind=1)).items():
            if key not in ready:
                late.setdefault(name, []).append(T)
    return late


def main() -> None:
    for module in (chunk, few_tokens, front):
        if hasattr(module, "multiprocessors"):
            module.multiprocessors = lambda device: 132
    attention_prefill.capability_of = lambda device: (9, 0)
    quantised_gemm.gpu_of = lambda device: Gpu((9, 0), 132)
    layers, warmed = Layers(), [n for n in _LENGTHS if n < LONGEST] + [LONGEST]
    for name, lengths in late_kernels(layers, warmed, LENGTHS).items():
        print(name, *lengths[:8])
    # the check itself: without the warm-up's short prompts something is late
    if not late_kernels(layers, [LONGEST], [1]):
        print("nothing was recorded")


if __name__ == "__main__":
    sys.exit(main())
