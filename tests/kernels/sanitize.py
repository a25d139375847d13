"""Launch every kernel of GDN layers and projections on the GPU, small, for NVIDIA's checkers:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 python -m tests.kernels.sanitize
    compute-sanitizer --tool racecheck --error-exitcode 1 python -m tests.kernels.sanitize

Followed by names of stages (see `main`) it launches these alone. Without torch's allocator every tensor is an allocation of its own, so
that a step past its end is seen.
"""

import itertools
import sys

import torch

from tests.kernels.experts import stored
from tests.kernels.test_fp8_gemm import FORMS as FP8_FORMS
from tests.kernels.test_fp8_gemm import stored as stored_fp8
from tests.kernels.test_fused_decode import make
from tests.kernels.test_quantised_gemm import KINDS
from tests.kernels.test_skinny_gemm import QUANTISED, quantised
from vllm import _custom_ops
from vllm.model_executor.layers.fla.ops import (
    chunk_gated_delta_rule,
    fused_gdn_gating,
    fused_recurrent_gated_delta_rule,
    fused_recurrent_gated_delta_rule_packed_decode,
    fused_sigmoid_gating_delta_rule_update,
    l2norm_fwd,
    rmsnorm_gated,
)
from vllm.model_executor.layers.fla.ops.fused_decode import fused_gdn_decode_triton
from vllm.model_executor.layers.fla.ops.fused_decode_cuda import fused_gdn_decode_cuda
from vllm.model_executor.layers.mamba.ops.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from vllm.model_executor.layers.ops.fp8_gemm import fp8_gemm_triton, quantise_triton
from vllm.model_executor.layers.ops.quantised_gemm import dequantise_triton, quantised_gemm_triton
from vllm.model_executor.layers.ops.quantised_gemm_plan import TILES
from vllm.model_executor.layers.ops.rms_norm import Unnormed
from vllm.model_executor.layers.ops.silu_and_mul import silu_and_mul
from vllm.model_executor.layers.ops.skinny_gemm import (
    quantised_gemm_cuda,
    skinny_gemm_add_cuda,
    skinny_gemm_cuda,
    skinny_gemm_triton,
)


def decode(csrc: bool) -> None:
    for head_dim, state in itertools.product((64, 128), (torch.float32, torch.bfloat16)):
        x = make(3, 2, 4, head_dim, head_dim, torch.bfloat16, state, "cuda", poison=False)
        for form in (fused_gdn_decode_triton, *((fused_gdn_decode_cuda,) if csrc else ())):
            form(**x)
        index, pool = x["state_indices"], x["ssm_state"]
        mixed = causal_conv1d_update(
            x["mixed_qkv"], x["conv_state"], x["conv_weight"], None, "silu", conv_state_indices=index
        )
        gates = x["A_log"], x["dt_bias"]
        fused_recurrent_gated_delta_rule_packed_decode(mixed, x["a"], x["b"], *gates, None, pool, None, index)
        q, k, v = (
            t.unflatten(1, (-1, head_dim))[:, None] for t in mixed.split([2 * head_dim] * 2 + [4 * head_dim], dim=1)
        )
        g, beta = (t.transpose(0, 1).contiguous() for t in fused_gdn_gating(gates[0], x["a"], x["b"], gates[1]))
        slots = {"initial_state": pool, "ssm_state_indices": index, "use_qk_l2norm_in_kernel": True}
        fused_recurrent_gated_delta_rule(q, k, v, g, beta, **slots)
        a, b = x["a"][:, None], x["b"][:, None]
        o, _ = fused_sigmoid_gating_delta_rule_update(gates[0], a, b, gates[1], q, k, v, **slots)
        silu_and_mul(x["a"].repeat(1, 9))
        rmsnorm_gated(o[:, 0], x["norm_weight"], x["z"].unflatten(1, (4, head_dim)))
        l2norm_fwd(q)


def prefill() -> None:
    for head_dim, dtype in ((64, torch.bfloat16), (128, torch.bfloat16), (32, torch.float32)):
        lengths, dim = [70, 1, 65], 8 * head_dim
        T, starts = sum(lengths), torch.tensor([0, 70, 71, 136], dtype=torch.int32, device="cuda")
        slots = torch.tensor([2, 0, 3], dtype=torch.int32, device="cuda")
        flags = torch.tensor([True, False, True], device="cuda")
        x, weight = torch.randn(T, dim, device="cuda").to(dtype), torch.randn(dim, 4, device="cuda").to(dtype)
        windows = torch.randn(4, dim, 3, device="cuda").to(dtype)
        mixed = causal_conv1d_fn(x.T, weight, None, windows, starts, slots, flags, "silu").T
        q, k, v = (
            t.unflatten(1, (-1, head_dim))[None] for t in mixed.split([2 * head_dim] * 2 + [4 * head_dim], dim=1)
        )
        chunk_gated_delta_rule(
            q,
            k,
            v,
            -torch.rand(1, T, 4, device="cuda"),
            torch.rand(1, T, 4, device="cuda"),
            initial_state=torch.randn(4, 4, head_dim, head_dim, device="cuda"),
            cu_seqlens=starts,
            cu_seqlens_cpu=[0, 70, 71, 136],
            ssm_state_indices=slots,
            has_initial_state=flags,
            use_qk_l2norm_in_kernel=True,
        )


def projections(csrc: bool) -> None:
    weight = torch.randn(45, 512, device="cuda").bfloat16()
    for rows in (1, 3, 16, 20):
        skinny_gemm_triton(torch.randn(rows, 512, device="cuda").bfloat16(), weight)
    if not csrc:
        return
    for rows, columns in itertools.product((1, 9, 32), (512, 2048)):
        x = torch.randn(rows, columns, device="cuda").bfloat16()
        weight, norm = (torch.randn(*shape, columns, device="cuda").bfloat16() for shape in ((1100,), ()))
        skinny_gemm_cuda(x, weight)
        skinny_gemm_cuda(Unnormed(x, norm, 1e-6, True), weight)
        skinny_gemm_add_cuda(x, weight, torch.randn(rows, 1100, device="cuda").bfloat16())
        skinny_gemm_cuda(x, torch.randn(4400, columns, device="cuda").bfloat16())  # fills its few stages several times
    for form in QUANTISED:
        skinny_gemm_cuda(torch.randn(9, 2048, device="cuda").bfloat16(), quantised(form, 45, 2048))
    for form, rows in itertools.product([form for form in QUANTISED if form != "fp8 128"], (1, 9, 20)):
        for weight_rows, columns in (
            (45, 512),
            (45, 2048),
            (45, 5120),
            (2800, 2048),
        ):  # the last: more tiles than blocks
            x = torch.randn(rows, columns, device="cuda").bfloat16()
            quantised_gemm_cuda(x, quantised(form, weight_rows, columns))


def many_rows() -> None:
    """A part of a tile beside whole ones, both ways."""
    large = torch.cuda.get_device_capability()[0] in (9, 10)
    x = torch.randn(70, 384, device="cuda").bfloat16()
    for form in KINDS:
        weight = stored((141, 384), form, x.dtype, "cuda")
        dequantise_triton(weight, x.dtype)
        for tile in TILES["registers"][large]:
            quantised_gemm_triton(x, weight, tile)
    for form, tile in itertools.product(FP8_FORMS, TILES["fp8"][large]):
        weight = stored_fp8(141, 384, form, "cuda")
        fp8_gemm_triton(*quantise_triton(x, weight.group), weight, x.dtype, tile)


def main() -> None:
    torch.manual_seed(0)
    csrc = _custom_ops.available("cuda")
    stages = {
        "decode": lambda: decode(csrc),
        "prefill": prefill,
        "projections": lambda: projections(csrc),
        "many_rows": many_rows,
    }
    for name in sys.argv[1:] or stages:
        stages[name]()
        torch.cuda.synchronize()
    print("all kernels launched" if csrc else "all kernels launched but csrc's, which is not built")


if __name__ == "__main__":
    main()
