"""Experts: three ways to compute them against a formula that loops over tokens."""

import pytest
import torch
import torch.nn.functional as F

from vllm.config.checkpoint import load_hf_config, resolve_model
from vllm.distributed import parallel_state
from vllm.distributed.parallel_state import TensorParallelGroup, use_group
from vllm.model_executor.layers.fused_moe import FusedMoE, experts, topk_softmax
from vllm.model_executor.layers.fused_moe.experts import ExpertsPlan, plan_experts
from vllm.model_executor.layers.ops.stored_weight import PLANES
from vllm.model_executor.layers.quantization.plan import ConfigPlan
from vllm.model_executor.models.qwen3_5 import SparseMoE

E, D, I, K = 8, 32, 16, 3


@pytest.fixture
def stacks(seed):
    return torch.randn(E, 2 * I, D) * 0.2, torch.randn(E, D, I) * 0.2


def choices(T, seed=0, only=None):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(T, E, generator=generator)
    if only is not None:
        scores[:, [e for e in range(E) if e not in only]] -= 1
    return torch.randn(T, D, generator=generator), scores.topk(K).indices


def formula(x, chosen, w13, w2):
    rows = []
    for t in range(x.shape[0]):
        for e in chosen[t].tolist():
            gate, up = w13[e, :I] @ x[t], w13[e, I:] @ x[t]
            rows.append(w2[e] @ (gate * gate.sigmoid() * up))
    return torch.stack(rows)


@pytest.mark.parametrize("T", [1, 2, 7, 33, 200])
@pytest.mark.parametrize("only", [None, (0, 3, 7)])
@pytest.mark.parametrize("way", ["loop", "grouped", "blocks 1", "blocks 2", "blocks 16"])
def test_every_way_is_the_formula(stacks, T, only, way):
    w13, w2 = stacks
    x, chosen = choices(T, only=only)
    if way == "loop":
        got = experts.experts_loop(x, chosen, lambda e: w13[e], lambda e: w2[e])
    elif way == "grouped":
        got = experts.experts_grouped(x, chosen, E, lambda: w13, lambda: w2)
    else:
        block = int(way.split()[1])
        got = experts.experts_blocks(x, chosen, E, block, lambda e: w13[e], lambda e: w2[e], w13[0].numel())
    torch.testing.assert_close(got, formula(x, chosen, w13, w2), atol=1e-5, rtol=1e-4)


def test_blocks_in_pieces(stacks, monkeypatch):
    w13, w2 = stacks
    x, chosen = choices(40)
    sizes = []
    monkeypatch.setattr(experts, "MAX_BYTES", 3 * w13[0].numel() * 4)

    def select(e):
        sizes.append(len(e))
        return w13[e]

    got = experts.experts_blocks(x, chosen, E, 4, select, lambda e: w2[e], w13[0].numel())
    assert max(sizes) == 3 and sum(sizes) == 120 // 4 + E
    torch.testing.assert_close(got, formula(x, chosen, w13, w2), atol=1e-5, rtol=1e-4)


def test_router(seed):
    logits = torch.randn(4, E)
    weights, chosen = topk_softmax(logits, K)
    probabilities = logits.exp() / logits.exp().sum(-1, keepdim=True)
    for t in range(4):
        best = sorted(range(E), key=lambda e: -probabilities[t, e])[:K]
        assert chosen[t].tolist() == best
        torch.testing.assert_close(weights[t], probabilities[t, best] / probabilities[t, best].sum())
    plain, _ = topk_softmax(logits, K, renormalise=False)
    torch.testing.assert_close(plain, probabilities.gather(1, chosen))
    assert topk_softmax(logits.bfloat16(), K)[0].dtype == torch.bfloat16


def test_plan_is_a_pure_function_of_the_problem():
    gpu = {"device": "cuda", "kernels": False, "tiles": False, "grouped_matmul": True, "dense_is_free": True}
    assert plan_experts(1, 8, 256, **gpu | {"device": "cpu", "kernels": True}) == ExpertsPlan("loop")
    assert plan_experts(1, 8, 256, **gpu).way == plan_experts(7500, 8, 256, **gpu).way == "grouped"
    ours = gpu | {"kernels": True, "tiles": True}
    assert plan_experts(1, 8, 256, **ours).way == plan_experts(8, 8, 256, **ours).way == "few"
    assert plan_experts(9, 8, 256, **ours) == plan_experts(256, 8, 256, **ours) == ExpertsPlan("tiles", 16)
    stored = ours | {"dense_is_free": False}
    most = {
        kind: max(T for T in range(1, 40) if plan_experts(T, 8, 256, **stored, kind=kind).way == "few")
        for kind in PLANES
    }
    assert most == {"plain": 8, "int4": 12, "int8": 12, "fp8": 16, "fp4": 16}
    assert plan_experts(1024, 8, 256, **ours) == ExpertsPlan("tiles", 32)
    assert plan_experts(8192, 8, 256, **ours) == ExpertsPlan("tiles", 64)
    assert plan_experts(8192, 8, 256, **ours | {"dense_is_free": False}) == ExpertsPlan("tiles", 32)
    assert plan_experts(16, 8, 256, **ours | {"tiles": False}).way == "few"
    assert plan_experts(17, 8, 256, **ours | {"tiles": False}).way == "grouped"
    assert plan_experts(0, 8, 256, **ours).way == "grouped"
    w4 = ours | {"dense_is_free": False, "w4_tokens": 64, "kind": "int4"}
    assert [plan_experts(T, 8, 256, **w4).way for T in (3, 4, 24, 25)] == ["few", "w4", "w4", "tiles"]
    assert plan_experts(20, 8, 256, **w4 | {"w4_tokens": 16}).way == "tiles"
    w4["kind"] = "fp4"
    assert [plan_experts(T, 8, 256, **w4).way for T in (1, 2, 64, 65)] == ["few", "w4", "w4", "tiles"]
    packed = {**gpu, "dense_is_free": False}
    assert plan_experts(1, 8, 256, **packed) == ExpertsPlan("blocks", 1)
    assert plan_experts(512, 8, 256, **packed).way == "grouped"
    old = {**gpu, "grouped_matmul": False}
    assert plan_experts(32, 8, 256, **old) == ExpertsPlan("blocks", 1)
    assert plan_experts(33, 8, 256, **old) == ExpertsPlan("blocks", 16)
    assert plan_experts(8 * 160, 8, 256, **old) == ExpertsPlan("blocks", 64)
    assert plan_experts(8 * 16000, 8, 256, **old) == ExpertsPlan("blocks", 128)


def build(stacks, size=1, rank=0):
    w13, w2 = stacks
    tensors = {"m.gate_up_proj": w13, "m.down_proj": w2}
    with use_group(TensorParallelGroup(rank, size)):
        layer = FusedMoE(E, K, D, I, prefix="m")
    for slot in layer.checkpoint_slots():
        if slot.name in tensors:
            slot.param[slot.region].copy_(slot.transform(tensors[slot.name]))
    return layer


@pytest.mark.parametrize("size", [1, 2])
def test_layer(stacks, size, monkeypatch):
    monkeypatch.setattr(parallel_state, "_require_one", lambda operation: None)
    x, logits = torch.randn(9, D), torch.randn(9, E)
    weights, chosen = topk_softmax(logits, K)
    want = (formula(x, chosen, *stacks).view(9, K, D) * weights[..., None]).sum(1)
    got = sum(build(stacks, size, rank)(x, lambda _: logits) for rank in range(size))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 5, 64, 700])
@pytest.mark.parametrize("way", ["grouped", "blocks 1", "blocks 16", "auto"])
def test_gpu(T, way):
    generator = torch.Generator().manual_seed(0)
    w13 = (torch.randn(16, 256, 128, generator=generator) * 0.1).bfloat16()
    w2 = (torch.randn(16, 128, 128, generator=generator) * 0.1).bfloat16()
    x = torch.randn(T, 128, generator=generator).bfloat16()
    chosen = torch.rand(T, 16, generator=generator).topk(4).indices
    want = experts.experts_loop(x.float(), chosen, lambda e: w13[e].float(), lambda e: w2[e].float())
    w13, w2, x, chosen = (t.cuda() for t in (w13, w2, x, chosen))
    grouped = experts.has_grouped_matmul(x.device, x.dtype, 128)
    plan = plan_experts(T, 4, 16, device="cuda", kernels=False, tiles=False, grouped_matmul=grouped, dense_is_free=True)
    if way != "auto":
        plan = ExpertsPlan(way.split()[0], int(way.split()[1]) if " " in way else 0)
    if plan.way == "grouped" and not grouped:
        pytest.skip("no grouped kernel on this device")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        if plan.way == "grouped":
            got = experts.experts_grouped(x, chosen, 16, lambda: w13, lambda: w2)
        else:
            got = experts.experts_blocks(x, chosen, 16, plan.block, lambda e: w13[e], lambda e: w2[e], w13[0].numel())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    scale = F.mse_loss(want, torch.zeros_like(want)).sqrt()
    assert (got.float().cpu() - want).abs().max() < 0.05 * scale


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("T", [1, 5, 12, 40, 300])
def test_whole_layer(device, T):
    """Router, experts and shared expert in bfloat16, each size by its own way, against float32."""
    config = load_hf_config(resolve_model("preset:tiny")).text
    exact = SparseMoE(config, "m", ConfigPlan(None, torch.float32))
    generator = torch.Generator().manual_seed(0)
    for part in exact.modules():
        if hasattr(part, "fill_dummy"):
            part.fill_dummy(generator)
    rounded = SparseMoE(config, "m", ConfigPlan(None, torch.bfloat16))
    for mine, theirs in zip(rounded.parameters(), exact.parameters()):
        mine.data.copy_(theirs)
        theirs.data.copy_(mine.data)
    x = torch.randn(T, config.hidden_size, generator=generator).bfloat16()
    with torch.no_grad():
        want, got = exact(x.float()), rounded.to(device)(x.to(device)).float().cpu()
    # of the median token: a rounded logit may choose another expert where two are all but equal
    error = ((got - want).norm(dim=1) / want.norm(dim=1)).median()
    assert error < 2e-2
