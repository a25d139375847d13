import pytest
import torch

from tests.kernels.common import TOLERANCE, assert_close, slots
from vllm.model_executor.layers.fla.ops import fused_decode
from vllm.model_executor.layers.fla.ops.fused_decode import (
    fused_gdn_decode_torch,
    fused_gdn_decode_triton,
    plan_fused_decode,
)


def make(B, Hk, Hv, K, V, dtype, state_dtype, device, state_len=3, poison=True):
    dim, pool = 2 * Hk * K + Hv * V, B + 2
    projected = torch.randn(B, dim + Hv * V + 2 * Hv).to(device, dtype)
    mixed, z, b, a = projected.split([dim, Hv * V, Hv, Hv], dim=1)
    index = slots(B, pool, device, (B // 2,) if B > 1 else ())
    if B > 1 and poison:
        projected[B // 2] = float("nan")
    return {
        "mixed_qkv": mixed,
        "z": z,
        "a": a,
        "b": b,
        "conv_state": torch.randn(pool, dim, state_len).to(device, dtype),
        "conv_weight": (torch.randn(4, dim).to(device, dtype) * 0.5).T,
        "conv_bias": None,
        "A_log": torch.randn(Hv, device=device),
        "dt_bias": torch.randn(Hv, device=device).to(dtype),
        "norm_weight": torch.randn(V, device=device),
        "eps": 1e-6,
        "ssm_state": torch.randn(pool, Hv, V, K).to(device, state_dtype),
        "state_indices": index,
    }


def run(form, x, **more):
    pools = {name: x[name].clone() for name in ("conv_state", "ssm_state")}
    return form(**x | pools, **more), pools


@pytest.mark.parametrize("dtype,state_dtype", [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)])
@pytest.mark.parametrize(
    "B,Hk,Hv,K,V,parts",
    [(1, 1, 1, 64, 64, 1), (3, 1, 2, 64, 64, 2), (2, 2, 2, 128, 128, 4), (2, 1, 3, 64, 64, 4), (3, 1, 4, 32, 24, 1)],
)
def test_matches_the_separate_stages(device, monkeypatch, B, Hk, Hv, K, V, parts, dtype, state_dtype):
    """Every way of cutting heads into parts, several steps in a row: the counters must be back at zero after each."""
    plan = plan_fused_decode(100, K, V, 1)
    rows = plan["ROWS"] * plan["PARTS"] // parts
    tile = {"BV": max(8, rows // 2), "ROWS": rows, "PARTS": parts}
    monkeypatch.setattr(fused_decode, "plan_fused_decode", lambda *_: plan | tile)
    x = make(B, Hk, Hv, K, V, dtype, state_dtype, device)
    for _ in range(2):
        want, after = run(fused_gdn_decode_torch, x)
        got, written = run(fused_gdn_decode_triton, x)
        assert got.shape == (B, Hv, V) and got.dtype == dtype
        assert_close(got, want, TOLERANCE[dtype] * (1 if dtype == torch.float32 else 2), "y")
        assert torch.equal(written["conv_state"], after["conv_state"])
        assert_close(written["ssm_state"], after["ssm_state"], 1e-5 if state_dtype == torch.float32 else 2**-7, "state")
        if B > 1:
            assert got[B // 2].abs().max() == 0
        assert not fused_decode._counters(got.device, 1 << 14).any()
        x |= after
        x["mixed_qkv"] = x["mixed_qkv"].roll(1, dims=1)


def test_longer_windows_bias_out_and_sigmoid(device):
    x = make(2, 1, 2, 64, 64, torch.float32, torch.float32, device, state_len=5)
    x["conv_bias"] = torch.randn(x["conv_weight"].shape[0], device=device)
    out = torch.empty(2, 128, device=device)
    want, after = run(fused_gdn_decode_torch, x, gate_activation="sigmoid", scale=0.5)
    got, written = run(fused_gdn_decode_triton, x, gate_activation="sigmoid", scale=0.5, out=out)
    assert got is out
    assert_close(got.view(2, 2, 64), want, 1e-5)
    assert torch.equal(written["conv_state"], after["conv_state"])


def test_refuses_what_does_not_fit(device):
    x = make(1, 1, 1, 64, 64, torch.float32, torch.float32, device)
    with pytest.raises(ValueError, match="tanh"):
        fused_gdn_decode_triton(**x, gate_activation="tanh")
    with pytest.raises(ValueError, match=r"contiguous \[1, 1, 64\]"):
        fused_gdn_decode_triton(**x, out=torch.empty(1, 1, 32, device=device))


@pytest.mark.parametrize("heads", [1, 32, 1000, 100_000])
@pytest.mark.parametrize("K,V", [(128, 128), (64, 64), (32, 48)])
def test_plan_covers_each_head(heads, K, V):
    plan = plan_fused_decode(heads, K, V, 132)
    assert plan["PARTS"] * plan["ROWS"] >= V and plan["ROWS"] % plan["BV"] == 0
    # PARTS * ROWS is the length of a Triton range
    assert (plan["PARTS"] * plan["ROWS"]).bit_count() == 1


@pytest.mark.gpu
@pytest.mark.parametrize("B", [1, 7, 64])
def test_many_steps_inside_a_cuda_graph(B):
    """Real sizes, replayed: catches a window rolled too early, a counter left behind, an output read too soon."""
    x = make(B, 16, 32, 128, 128, torch.bfloat16, torch.float32, "cuda")
    want, kept = run(fused_gdn_decode_torch, x)
    pools = {name: x[name].clone() for name in ("conv_state", "ssm_state")}
    live = {**x, **pools}
    out = torch.empty_like(want)
    fused_gdn_decode_triton(**live, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fused_gdn_decode_triton(**live, out=out)
    for name in pools:
        pools[name].copy_(x[name])
    for step in range(20):
        graph.replay()
        assert_close(out, want, 2 * TOLERANCE[torch.bfloat16], f"step {step}")
        assert torch.equal(pools["conv_state"], kept["conv_state"])
        # a convolution output may round to the neighbouring bfloat16
        assert_close(pools["ssm_state"], kept["ssm_state"], 4e-3, f"step {step}")
        want, kept = run(fused_gdn_decode_torch, x | kept)
