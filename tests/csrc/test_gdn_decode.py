"""csrc/gdn_decode.cu against the PyTorch form of the fused decode step."""

import pytest
import torch

from tests.kernels.common import TOLERANCE, assert_close
from tests.kernels.test_fused_decode import make, run
from vllm import _custom_ops as ops
from vllm.model_executor.layers.fla.ops import fused_decode_cuda
from vllm.model_executor.layers.fla.ops.fused_decode import fused_gdn_decode_torch
from vllm.model_executor.layers.fla.ops.fused_decode_cuda import (
    MAX_CLUSTER,
    fits_fused_decode_cuda,
    fused_gdn_decode_cuda,
    plan_fused_decode_cuda,
    prefers_cuda,
)


@pytest.fixture
def library():
    if not ops.available("cuda"):
        pytest.skip("csrc/ is not built: pip install --no-build-isolation -e .")


def fits(x: dict) -> bool:
    vectors = x["A_log"], x["dt_bias"], x["norm_weight"]
    return fits_fused_decode_cuda(x["mixed_qkv"], x["conv_state"], x["conv_weight"], vectors, x["ssm_state"])


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("ratio", [1, 2, 3, 4])
@pytest.mark.parametrize("B", [1, 16, 500])
def test_plan_fits_a_cluster(head_dim, ratio, B):
    plan = plan_fused_decode_cuda(B, 16, 16 * ratio, head_dim, 132)
    assert plan["rows_a_block"] in (32, 64) and plan["early"] in (True, False)
    assert ratio * head_dim // plan["rows_a_block"] <= MAX_CLUSTER
    assert plan_fused_decode_cuda(B, 1, 5, 128, 132) is None


def test_many_heads_are_left_to_triton():
    assert prefers_cuda(4 * 32, torch.float32, 132) and not prefers_cuda(8 * 32, torch.float32, 132)
    assert prefers_cuda(2 * 32, torch.bfloat16, 132) and not prefers_cuda(4 * 32, torch.bfloat16, 132)


def test_a_cpu_takes_another_form():
    assert not fits(make(1, 1, 1, 64, 64, torch.bfloat16, torch.float32, "cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("rows_a_block", [32, 64])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("ratio", [1, 2, 3, 4])
def test_matches_the_separate_stages(library, seed, monkeypatch, ratio, head_dim, dtype, state_dtype, rows_a_block):
    if ratio * head_dim // rows_a_block > MAX_CLUSTER:
        pytest.skip("more blocks than a cluster holds")
    for early in (False, True):
        plan = {"rows_a_block": rows_a_block, "early": early}
        monkeypatch.setattr(fused_decode_cuda, "plan_fused_decode_cuda", lambda *_, plan=plan: plan)
        for B in (1, 3, 17):
            x = make(B, 2, 2 * ratio, head_dim, head_dim, dtype, state_dtype, "cuda")
            assert fits(x)
            for _ in range(2):
                want, after = run(fused_gdn_decode_torch, x)
                got, written = run(fused_gdn_decode_cuda, x)
                assert_close(got, want, 2 * TOLERANCE[dtype], "y")
                assert torch.equal(written["conv_state"], after["conv_state"])
                # a convolution output may round to the neighbouring 16-bit value
                assert_close(written["ssm_state"], after["ssm_state"], 8e-3, "state")
                if B > 1:
                    assert got[B // 2].abs().max() == 0
                x |= after
                x["mixed_qkv"] = x["mixed_qkv"].roll(1, dims=1)


@pytest.mark.gpu
def test_options(library, seed):
    """Longer windows in channel-major order, a bias, a sigmoid gate, no l2norm, 64-bit slots and a buffer to write to."""
    x = make(4, 2, 4, 128, 128, torch.bfloat16, torch.float32, "cuda", state_len=5)
    x["conv_bias"] = torch.randn(x["conv_weight"].shape[0], device="cuda").bfloat16()
    x["conv_weight"] = x["conv_weight"].contiguous()
    x["state_indices"] = x["state_indices"].long()
    x["mixed_qkv"] = x["mixed_qkv"] * 0.1
    out = torch.empty(4, 512, device="cuda", dtype=torch.bfloat16)
    more = {"gate_activation": "sigmoid", "scale": 0.01, "activation": None, "use_qk_l2norm_in_kernel": False}
    want, after = run(fused_gdn_decode_torch, x, **more)
    got, written = run(fused_gdn_decode_cuda, x, **more, out=out)
    assert got is out
    assert_close(got.view(want.shape), want, 2 * TOLERANCE[torch.bfloat16])
    assert torch.equal(written["conv_state"], after["conv_state"])
    assert_close(written["ssm_state"], after["ssm_state"], 8e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("B", [1, 7, 64])
def test_a_chain_inside_a_cuda_graph(library, seed, B, state_dtype):
    """Launches on the same states follow each other without a gap: each must see what the one before it wrote. Real sizes."""
    steps = 8
    x = make(B, 16, 32, 128, 128, torch.bfloat16, state_dtype, "cuda")
    inputs = [x["mixed_qkv"].roll(i, dims=1).contiguous() for i in range(steps)]
    kept, want = {}, []
    for mixed in inputs:
        y, after = run(fused_gdn_decode_torch, x | kept | {"mixed_qkv": mixed})
        want.append(y)
        kept = after
    pools = {name: x[name].clone() for name in ("conv_state", "ssm_state")}
    outs = [torch.empty_like(y) for y in want]
    live = x | pools

    def chain():
        for mixed, out in zip(inputs, outs):
            fused_gdn_decode_cuda(**live | {"mixed_qkv": mixed}, out=out)

    chain()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain()
    bound = 1 if state_dtype == torch.float32 else 2
    for _ in range(10):
        for name, pool in pools.items():
            pool.copy_(x[name])
        graph.replay()
        for step, (got, y) in enumerate(zip(outs, want)):
            assert_close(got, y, bound * 2 * TOLERANCE[torch.bfloat16], f"step {step}")
        assert torch.equal(pools["conv_state"], kept["conv_state"])
        assert_close(pools["ssm_state"], kept["ssm_state"], bound * 8e-3)


@pytest.mark.gpu
def test_bad_arguments_are_named(library):
    x = make(2, 1, 2, 64, 64, torch.bfloat16, torch.float32, "cuda", poison=False)
    for message, change in {
        "z must be": {"z": x["z"].float()},
        "conv_weight must be": {"conv_weight": x["conv_weight"][:, :3]},
        "conv_state must be": {"conv_state": x["conv_state"].float()},
        "A_log must be": {"A_log": x["A_log"][:1]},
        "states are kept": {"ssm_state": x["ssm_state"].half()},
        "state_indices must be": {"state_indices": x["state_indices"][:1]},
        "do not split": {"mixed_qkv": x["mixed_qkv"][:, :200]},
    }.items():
        with pytest.raises((RuntimeError, ValueError), match=message):
            run(fused_gdn_decode_cuda, x | change)
