import pytest
import torch

from tests.kernels.common import TOLERANCE, assert_close
from tests.kernels.experts import FORMS, stored
from vllm.model_executor.layers.fused_moe.ops import grouped
from vllm.model_executor.layers.fused_moe.ops.front import by_planes_torch
from vllm.model_executor.layers.fused_moe.ops.route import route_torch, route_triton

ROUGH = {torch.bfloat16: 2e-2, torch.float16: 4e-3}  # weights and what goes between are rounded to 16 bits


def check(T, E, D, I, top_k, form, dtype, device, logits=None, block=16):
    w13, w2 = stored((E, 2 * I, D), form, dtype, device), stored((E, D, I), form, dtype, device)
    assert grouped.fits_grouped(w13, w2)
    x = torch.randn(T, D).to(device, dtype)
    logits = torch.randn(T, E).to(device) if logits is None else logits
    routed = route_torch(logits, E, top_k, block)
    got = grouped.experts_triton(grouped.by_planes_triton(x, w13.kind), routed, w13, w2)
    assert_close(got, grouped.experts_torch(x, routed, w13, w2), ROUGH[dtype])


@pytest.mark.parametrize("form", FORMS)
def test_every_stored_form(device, form):
    check(11, 4, 128, 128, 2, form, torch.float16, device)


@pytest.mark.parametrize("T,E,D,I,top_k", [(1, 4, 128, 128, 1), (33, 4, 384, 128, 3), (20, 8, 128, 384, 2)])
def test_shapes(device, T, E, D, I, top_k):
    check(T, E, D, I, top_k, "int4", torch.bfloat16, device)


def test_all_tokens_to_one_expert(device):
    logits = torch.randn(40, 4).clamp(-2, 2)
    logits[:, 2] = 9
    check(40, 4, 128, 128, 1, "int4 zero", torch.float16, device, logits.to(device))


@pytest.mark.parametrize("shared", [True, False])
def test_combine(device, shared):
    T, top_k, D = 5, 3, 100
    y, shares = torch.randn(T * top_k, D, device=device), torch.rand(T, top_k, device=device)
    extra = (torch.randn(T, D, device=device), torch.randn(T, 4, device=device)[:, 3:]) if shared else ()
    assert_close(
        grouped.combine_triton(y, shares, *extra), grouped.combine_torch(y, shares, *extra), TOLERANCE[y.dtype]
    )


@pytest.mark.parametrize("shared", [True, False])
def test_combine_adding(device, shared):
    T, top_k, D = 5, 3, 100
    y, shares = torch.randn(T * top_k, D, device=device), torch.rand(T, top_k, device=device)
    extra = (torch.randn(T, D, device=device), torch.randn(T, 1, device=device)) if shared else (None, None)
    want = torch.randn(T, D, device=device)
    got = want.clone()
    assert grouped.combine_triton(y, shares, *extra, got) is None
    assert grouped.combine_torch(y, shares, *extra, want) is None
    assert_close(got, want, TOLERANCE[y.dtype])


@pytest.mark.parametrize("kind,P", [("int4", 8), ("int8", 4), ("fp4", 2), ("plain", 1)])
def test_by_planes(device, kind, P):
    x = torch.randn(3, 72, device=device)
    assert torch.equal(grouped.by_planes_triton(x, kind), by_planes_torch(x, P))


@pytest.mark.parametrize("kind,words", [("int4", 256), ("int4", 48), ("plain", 2048), ("fp8", 768), ("fp4", 96)])
@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("paired", [True, False])
def test_plan(kind, words, block, paired):
    plan = grouped.plan_grouped(kind, words, 512, block, paired)
    assert words % plan["BW"] == 0 and plan["BW"] >= 16
    assert plan["BN"] % grouped.PLANES[kind] == 0
    assert grouped.plan_grouped(kind, words, 40, block, paired)["BN"] == 64


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("T", [3, 70, 600])
def test_real_sizes(form, T):
    E, D, I, top_k = 32, 2048, 512, 8
    w13, w2 = (stored(shape, form, torch.bfloat16, "cuda") for shape in ((E, 2 * I, D), (E, D, I)))
    x, logits = torch.randn(T, D, device="cuda").bfloat16(), torch.randn(T, E, device="cuda")
    routed = route_triton(logits, E, top_k, 16 if T < 100 else 64)
    got = grouped.experts_triton(grouped.by_planes_triton(x, w13.kind), routed, w13, w2).float()
    want = grouped.experts_torch(x, routed, w13, w2)
    assert ((got - want).square().mean() / want.square().mean()).sqrt() < 1e-2
