import pytest
import torch

from tests.kernels.common import TOLERANCE, assert_close
from tests.kernels.experts import layer
from vllm.model_executor.layers.fused_moe.ops.front import front_torch, front_triton, plan_front_rows, prefers_rows
from vllm.model_executor.layers.ops.rms_norm import Unnormed


def check(T, E, D, S, shared, dtype, device, hs_planes, xp_planes):
    weights = layer(E, D, 32, S, "plain", dtype, device, shared)
    x = torch.randn(T, D).to(device, dtype)
    planes = {"hs_planes": hs_planes, "xp_planes": xp_planes}
    (logits, hs, xp), want = front_triton(x, weights, **planes), front_torch(x, weights, **planes)
    assert_close(logits[:, : want[0].shape[1]], want[0], 1e-4, "logits")
    assert_close(hs, want[1], TOLERANCE[dtype], "hs")
    assert torch.equal(xp, want[2])


@pytest.mark.parametrize("T", [1, 2, 3, 17])
@pytest.mark.parametrize("shared", ["plain", "int4", "int4 zero", "fp8"])
def test_both_forms(device, T, shared):
    """D of 256: more than two tokens and plain weights take rows."""
    check(T, 10, 256, 64, shared, torch.float16, device, 8, 8)


@pytest.mark.parametrize(
    "T,E,D,S,shared", [(3, 5, 192, 32, "plain"), (4, 33, 512, 24, "plain"), (2, 8, 128, 96, "fp4")]
)
def test_shapes(device, T, E, D, S, shared):
    check(T, E, D, S, shared, torch.bfloat16, device, 1, 2)


@pytest.mark.parametrize("T", [1, 5])
def test_without_a_shared_expert(device, T):
    check(T, 8, 256, 0, "plain", torch.float16, device, 1, 4)


@pytest.mark.parametrize("T", [1, 2, 3, 17])
@pytest.mark.parametrize(
    "D,shared,planes,plus_one", [(256, "plain", 8, True), (192, "int4", 1, False), (512, "", 1, True)]
)
def test_behind_a_norm(device, T, D, shared, planes, plus_one):
    """Both forms, packed shared experts and none; the copy of x is always made, and normalised. The rows themselves stay."""
    weights = layer(10, D, 32, 64 if shared else 0, "plain", torch.bfloat16, device, shared or "plain")
    x = torch.randn(T, D).to(device, torch.bfloat16) * torch.logspace(-2, 2, T).to(device, torch.bfloat16)[:, None]
    rows = Unnormed(x, (torch.randn(D) * 0.3).to(device, x.dtype), 1e-6, plus_one)
    before, order = x.clone(), {"hs_planes": 8, "xp_planes": planes}
    (logits, hs, xp), want = front_triton(rows, weights, **order), front_torch(rows, weights, **order)
    assert torch.equal(x, before)
    for got, expected, name in (
        (logits[:, : want[0].shape[1]], want[0], "logits"),
        (hs, want[1], "hs"),
        (xp, want[2], "xp"),
    ):
        assert_close(got, expected, TOLERANCE[x.dtype], name)


def test_plan():
    plain, packed = (layer(4, 256, 32, 64, "plain", torch.bfloat16, "cpu", form) for form in ("plain", "int4"))
    assert [prefers_rows(T, plain) for T in (1, 2, 3, 64)] == [False, False, True, True]
    assert not prefers_rows(8, packed)
    assert [plan_front_rows(T)["BM"] for T in (3, 16, 17, 64)] == [16, 16, 32, 64]
    for T in (3, 17, 64):
        plan = plan_front_rows(T)
        assert (plan["BR"] + plan["BM"]) * plan["BK"] * 2 * plan["num_stages"] <= 99 * 1024 and 256 % plan["BK"] == 0
