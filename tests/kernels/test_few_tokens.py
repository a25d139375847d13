import dataclasses

import pytest
import torch

from tests.kernels.common import TOLERANCE, assert_close
from tests.kernels.experts import FORMS, layer, stored
from vllm.model_executor.layers.fused_moe.ops.few_tokens import (
    moe_few_tokens_torch,
    moe_few_tokens_triton,
    plan_few_tokens,
)
from vllm.model_executor.layers.fused_moe.ops.weights import fits
from vllm.model_executor.layers.ops.rms_norm import Unnormed


def spread(T, D, device, dtype):
    return torch.randn(T, D).to(device, dtype)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("T", [1, 3])
def test_every_stored_form(device, form, T):
    weights = layer(8, 128, 64, 64, form, torch.float16, device)
    x = spread(T, 128, device, torch.float16)
    assert fits(x, weights)
    assert_close(moe_few_tokens_triton(x, weights, 2), moe_few_tokens_torch(x, weights, 2), TOLERANCE[x.dtype])


@pytest.mark.parametrize("shared", ["int4", "int4 zero", "fp8 block", "int8 row", "fp4", "fp4 nv"])
def test_a_stored_shared_expert(device, shared):
    weights = layer(8, 128, 64, 64, "int4", torch.float16, device, shared)
    x = spread(2, 128, device, torch.float16)
    assert_close(moe_few_tokens_triton(x, weights, 2), moe_few_tokens_torch(x, weights, 2), TOLERANCE[x.dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "E,D,I,S,top_k",
    [
        (5, 192, 96, 32, 3),  # nothing a power of two
        (16, 64, 32, 0, 4),  # no shared expert
        (8, 128, 32, 96, 1),
        (4, 64, 64, 64, 4),  # every expert
    ],
)
def test_shapes(device, E, D, I, S, top_k, dtype):
    weights = layer(E, D, I, S, "int4", dtype, device)
    x = spread(3, D, device, dtype)
    assert_close(moe_few_tokens_triton(x, weights, top_k), moe_few_tokens_torch(x, weights, top_k), TOLERANCE[dtype])


def test_all_tokens_to_one_expert_and_negative_logits(device):
    weights = layer(8, 128, 64, 64, "int4", torch.float16, device)
    x = spread(4, 128, device, torch.float16).abs()
    router = -torch.rand(8, 128) / 128
    router[5] = -1e-3
    weights = dataclasses.replace(weights, router=router.to(device, torch.float16))
    assert (x.float() @ weights.router.float().T).argmax(-1).tolist() == [5] * 4
    for top_k in (1, 3):
        got = moe_few_tokens_triton(x, weights, top_k)
        assert_close(got, moe_few_tokens_torch(x, weights, top_k), TOLERANCE[x.dtype])


def test_equal_logits_go_to_the_lowest_experts(device):
    """One that the reference cannot say: torch.topk promises no order among equals."""
    weights = layer(8, 64, 32, 0, "plain", torch.float16, device)
    x = spread(2, 64, device, torch.float16)
    tied = dataclasses.replace(weights, router=torch.zeros_like(weights.router))
    first = torch.zeros(8, 64)
    first[:3] = 1
    first = first.to(device, torch.float16) * x.sign()[0] * 0.25
    chosen = dataclasses.replace(weights, router=first)
    assert torch.equal(moe_few_tokens_triton(x[:1], tied, 3), moe_few_tokens_triton(x[:1], tied, 3))
    assert_close(moe_few_tokens_triton(x[:1], tied, 3), moe_few_tokens_torch(x[:1], chosen, 3), 2e-3)


@pytest.mark.parametrize("form", ["plain", "int4", "int4 zero", "fp8"])
@pytest.mark.parametrize("T", [1, 3])
def test_between_residual_and_residual(device, form, T):
    """A norm in front and an add behind, in place: the rows that are normalised are those that are added to."""
    weights = layer(8, 256, 64, 64, form, torch.bfloat16, device)
    residual = torch.randn(T, 256).to(device, torch.bfloat16)
    weight = (torch.randn(256) * 0.3).to(device, torch.bfloat16)
    want, got = residual.clone(), residual.clone()
    assert moe_few_tokens_torch(Unnormed(want, weight, 1e-6, True), weights, 2, want) is None
    assert moe_few_tokens_triton(Unnormed(got, weight, 1e-6, True), weights, 2, got) is None
    assert_close(got, want, 2 * TOLERANCE[got.dtype])  # two more roundings than without
    assert (want - residual).abs().max() > 0.3


@pytest.mark.parametrize("T", [1, 3])
def test_adding_rounds_the_result_first(device, T):
    weights = layer(8, 128, 64, 64, "int4", torch.bfloat16, device)
    x, before = spread(T, 128, device, torch.bfloat16), spread(T, 128, device, torch.bfloat16)
    total = before.clone()
    moe_few_tokens_triton(x, weights, 2, total)
    want = moe_few_tokens_triton(x, weights, 2) + before
    # the interpreter truncates where hardware rounds
    assert_close(total, want, 0.0 if device == "cuda" else 2**-7)


def test_what_does_not_fit():
    weights = layer(8, 128, 64, 64, "int4", torch.bfloat16, "cpu")
    x = torch.randn(2, 128)
    assert fits(x.bfloat16(), weights)
    assert not fits(x, weights) and not fits(x.half(), weights)
    odd = stored((8, 128, 192), "int4 96", torch.bfloat16, "cpu")  # twelve words a group
    assert not fits(x.bfloat16(), dataclasses.replace(weights, w2=odd))
    assert not fits(x.bfloat16(), dataclasses.replace(weights, gate=weights.gate.float()))
    blocks = stored((8, 128, 64), "fp8 block", torch.bfloat16, "cpu")
    assert fits(x.bfloat16(), dataclasses.replace(weights, w2=blocks))
    cut = dataclasses.replace(blocks, values=blocks.values[:, :100].contiguous())  # a block that spans two experts
    assert not fits(x.bfloat16(), dataclasses.replace(weights, w2=cut))
    eighth = dataclasses.replace(blocks, scale=blocks.scale.to(torch.float8_e4m3fn))
    assert not fits(x.bfloat16(), dataclasses.replace(weights, w2=eighth))


@pytest.mark.parametrize("T", [1, 2, 16])
@pytest.mark.parametrize("top_k,w13,w2", [(8, 256, 64), (8, 2048, 512), (8, 384, 128), (10, 1024, 256), (2, 16, 8)])
def test_plan(T, top_k, w13, w2):
    plan = plan_few_tokens(T, top_k, w13, w2)
    gate_up, down = plan["gate_up"], plan["down"]
    assert w13 % gate_up["BW"] == 0
    assert 2 * gate_up["BN"] * gate_up["BW"] <= 64 * 128, "words a thread"
    assert top_k * down["BN"] * down["BW"] <= 64 * 64, "words a thread"
    assert all(value & (value - 1) == 0 for tile in plan.values() for value in tile.values())
    assert down["EARLY"] == (T == 1)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("T", [1, 2, 7, 16])
def test_real_sizes_in_a_chain(form, T):
    """Three layers captured behind a kernel that makes x: every early launch must wait for what it reads."""
    torch.manual_seed(0)
    layers = [layer(32, 2048, 512, 512, form, torch.bfloat16, "cuda") for _ in range(3)]
    start = torch.randn(T, 2048, device="cuda").bfloat16()

    def step(moe):
        x, steps = start * 1.25, []
        for weights in layers:
            steps.append((x, moe(x, weights, 8)))
            x = x + steps[-1][1]
        return steps

    step(moe_few_tokens_triton)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        steps = step(moe_few_tokens_triton)
    first = None
    for _ in range(10):
        for _, y in steps:
            y.fill_(float("nan"))
        graph.replay()
        for (x, y), weights in zip(steps, layers):
            want = moe_few_tokens_torch(x, weights, 8).float()
            error = ((y.float() - want).square().mean() / want.square().mean()).sqrt().item()
            assert error < 1e-2, (form, T, error)
        last = steps[-1][1].clone()
        assert first is None or torch.equal(first, last), "not the same bits twice"
        first = last
