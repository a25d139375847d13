"""Launch every expert kernel on the GPU, small, for NVIDIA's checkers; as `tests.kernels.sanitize` does for the GDN kernels:

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 python -m tests.kernels.sanitize_moe
"""

import itertools

import torch

from tests.kernels.experts import FORMS, layer
from tests.kernels.test_grouped_fp8 import FORMS as FP8_FORMS
from tests.kernels.test_grouped_fp8 import make
from vllm import _custom_ops as ops
from vllm.model_executor.layers.fused_moe.ops.few_tokens import moe_few_tokens_triton
from vllm.model_executor.layers.fused_moe.ops.grouped import by_planes_triton, combine_triton, experts_triton
from vllm.model_executor.layers.fused_moe.ops.grouped_fp8 import experts_fp8_triton
from vllm.model_executor.layers.fused_moe.ops.route import route_triton
from vllm.model_executor.layers.fused_moe.ops.w4 import moe_w4_cuda
from vllm.model_executor.layers.ops.rms_norm import Unnormed

E, D, I, S, TOP_K = 6, 384, 128, 96, 3


def few(form: str) -> None:
    for T in (1, 2, 5):
        x = torch.randn(T, D, device="cuda").bfloat16()
        for shared in ("plain", form):
            moe_few_tokens_triton(
                x, layer(E, D, I, S if shared == "plain" else 128, form, x.dtype, "cuda", shared), TOP_K
            )
        moe_few_tokens_triton(x, layer(E, D, I, 0, form, x.dtype, "cuda"), TOP_K)
        rows = Unnormed(x, torch.randn(D, device="cuda").to(x.dtype), 1e-6, True)
        moe_few_tokens_triton(rows, layer(E, D, I, S, form, x.dtype, "cuda"), TOP_K, x)


def many(form: str) -> None:
    weights = layer(E, D, I, 0, form, torch.bfloat16, "cuda")
    for T, block in ((1, 16), (37, 16), (150, 64)):
        x, logits = torch.randn(T, D, device="cuda").bfloat16(), torch.randn(T, E + 1, device="cuda")
        routed = route_triton(logits, E, TOP_K, block)
        y = experts_triton(by_planes_triton(x, weights.w13.kind), routed, weights.w13, weights.w2)
        combine_triton(y, routed.shares, x, logits[:, E:])
        combine_triton(y, routed.shares, x.clone(), logits[:, E:], x)


def w4(form: str) -> None:
    """csrc's kernels, with a shared expert in 16 bits or, beside fp4, in fp4, and without."""
    experts = [(S, "plain"), (0, "plain")] + [(S, form)] * (form == "fp4 nv")
    for T, (columns, shared) in itertools.product((1, 3, 40), experts):
        x = torch.randn(T, D, device="cuda").bfloat16()
        weights = layer(E, D, I, columns, form, x.dtype, "cuda", shared)
        moe_w4_cuda(x, weights, TOP_K)
        moe_w4_cuda(x, weights, TOP_K, x)


def many_with_fp8_inputs() -> None:
    for form, T in itertools.product(FP8_FORMS, (3, 150)):
        experts_fp8_triton(*make(T, E, D, I, TOP_K, form, torch.bfloat16, "cuda", 32))


def main() -> None:
    torch.manual_seed(0)
    for form in FORMS:
        few(form)
        many(form)
        if form in ("int4", "int4 zero", "int4 128", "fp4 nv") and ops.available("cuda"):
            w4(form)
        torch.cuda.synchronize()
    many_with_fp8_inputs()
    torch.cuda.synchronize()
    print("all expert kernels launched")


if __name__ == "__main__":
    main()
