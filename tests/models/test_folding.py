"""Norms and residual adds as parts of the projections around them: the same numbers as by themselves, whoever shares the step."""

from dataclasses import replace

import pytest
import torch

from tests.kernels.conftest import _poison_uninitialised_memory  # noqa: F401 (every test here)
from tests.models.driver import Driver
from vllm import _custom_ops
from vllm.config.checkpoint import load_hf_config, resolve_model
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.folding import INPUT_ROWS, NOTHING, POST_ROWS, Folds
from vllm.model_executor.layers.layernorm import GemmaRMSNorm
from vllm.model_executor.layers.mamba.gdn_linear_attn import IN_PROJ, GatedDeltaNet
from vllm.model_executor.layers.ops.rms_norm import Unnormed, rms_norm_torch
from vllm.model_executor.layers.quantization.plan import ConfigPlan
from vllm.model_executor.models.qwen3_5 import DecoderLayer, GatedAttention, Qwen3_5ForCausalLM, SparseMoE

FOLDS = [Folds(input=True, post=True), Folds(input=True), Folds(post=True)]
each_folds = pytest.mark.parametrize("folds", FOLDS, ids=["both", "input", "post"])


@pytest.fixture
def folding(monkeypatch):
    """Steps of few rows fold as they are told, on any device; on a CPU projections then take their PyTorch forms."""

    def fold(folds, most=1000):
        choose = lambda self, hidden: folds if len(hidden) <= most else NOTHING
        monkeypatch.setattr(Qwen3_5ForCausalLM, "folds", choose)

    return fold


def steps(driver: Driver, prompt: list[int]) -> list[torch.Tensor]:
    """Logits of a prompt in two chunks, of another sequence's prompt beside the first one's token, and of both beside padding."""
    first, second = driver.add(prompt[:40]), driver.add(prompt[50:70])
    out = [driver.prefill(first, (17,))]
    first.tokens += prompt[100:103]
    out += driver.step([(first, 1), (second, 20)], pad_tokens=3)
    second.tokens += prompt[110:113]
    for _ in range(2):
        out += driver.step([(first, 1), (second, 1)], pad_decodes=2)
    return out


@each_folds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_numbers(family, prompt, folding, dtype, folds):
    """Bit for bit, since PyTorch's forms round where the steps by themselves do."""
    model = family.load(dtype)
    want = steps(Driver(model), prompt)
    folding(folds)
    for got, expected in zip(steps(Driver(model), prompt), want, strict=True):
        assert torch.equal(got, expected)


@each_folds
def test_the_same_numbers_in_place(families, prompt, folding, monkeypatch, folds):
    """As on a GPU, where norms overwrite the summand and the residual that they get."""

    def add_norm(x, residual, weight, eps, plus_one):
        residual += x
        x.copy_(rms_norm_torch(residual, weight, eps, plus_one))

    model = families["moe"].load(torch.bfloat16)
    want = steps(Driver(model), prompt)
    monkeypatch.setattr(_custom_ops, "fused_add_rms_norm", add_norm)
    for module in model.modules():
        if isinstance(module, GemmaRMSNorm):
            module.use_kernels = True
    folding(folds)
    for got, expected in zip(steps(Driver(model), prompt), want, strict=True):
        assert torch.equal(got, expected)


def test_the_same_tokens(family, prompt, folding):
    model, found = family.load(), []
    for folds in (NOTHING, *FOLDS):
        folding(folds)
        driver = Driver(model)
        found.append(driver.greedy(driver.add(prompt[:30]), 24))
    assert all(tokens == found[0] for tokens in found) and len(set(found[0])) > 10


@pytest.mark.parametrize("in_proj", [name for name in IN_PROJ if name != "fused"])
def test_a_projection_that_cannot_normalises_first(families, prompt, folding, in_proj):
    model = families["moe"].load(gdn_in_proj=in_proj)
    want = steps(Driver(model), prompt)
    folding(FOLDS[0])
    for got, expected in zip(steps(Driver(model), prompt), want, strict=True):
        assert torch.equal(got, expected)


@each_folds
def test_nothing_is_left_to_add_or_normalise(families, prompt, folding, monkeypatch, folds):
    """Behind a norm that is folded rows are still to be normalised, and the summand in front of it went to the residual."""
    model = families["moe"].load(gdn_in_proj="fused")
    calls, layers, layer_forward = [], [], DecoderLayer.forward

    def watch(cls, at):
        original = cls.forward

        def forward(self, x, *args):
            y = original(self, x, *args)
            calls.append((x, args[at], y))
            return y

        monkeypatch.setattr(cls, "forward", forward)

    def layer(self, hidden, residual, *args):
        calls.clear()
        hidden, after = layer_forward(self, hidden, residual, *args)
        for (x, add_to, y), norm, summand in zip(
            calls, (folds.input, folds.post), (folds.post, folds.input), strict=True
        ):
            assert isinstance(x, Unnormed) == norm and (add_to is after) == (y is None) == summand
        assert (hidden is None) == folds.input
        assert not folds.input or calls[0][0].rows is residual
        assert not folds.post or calls[1][0].rows is after
        layers.append(self)
        return hidden, after

    watch(GatedDeltaNet, 0), watch(GatedAttention, 1), watch(SparseMoE, 0)
    monkeypatch.setattr(DecoderLayer, "forward", layer)
    folding(folds)
    driver = Driver(model)
    driver.prefill(driver.add(prompt[:5]))
    assert layers == list(model.layers)


@pytest.fixture
def four_layers():
    """Of the 35B model's widths on the GPU, with few experts and words, and random weights."""
    if not _custom_ops.available("cuda") or torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs csrc/ and sm_90")
    text = load_hf_config(resolve_model("preset:qwen3.5-35b-a3b")).text
    few = {"num_hidden_layers": 4, "layer_types": text.layer_types[:4], "sparse_layers": text.sparse_layers[:4]}
    config = replace(text, **few, num_experts=32, vocab_size=512)
    generator = torch.Generator("cuda").manual_seed(0)
    with torch.device("cuda"):
        model = Qwen3_5ForCausalLM(config, ConfigPlan(None, torch.bfloat16)).requires_grad_(False).cuda()
    for module in model.modules():
        if hasattr(module, "fill_dummy"):
            module.fill_dummy(generator)
    for module in model.modules():
        if hasattr(module, "process_weights_after_loading"):
            module.process_weights_after_loading()
    return model


@pytest.mark.gpu
@pytest.mark.parametrize("sequences", [1, 2, 3, 8, 12, 16])
def test_gpu(four_layers, prompt, folding, sequences):
    """Decode steps of the real widths by the kernels, folded and not, from the same states."""
    model = four_layers
    hidden = torch.zeros(sequences, 2048, dtype=torch.bfloat16, device="cuda")
    chosen = Folds(input=sequences <= INPUT_ROWS, post=sequences <= POST_ROWS)
    assert model.folds(hidden) == chosen and model.folds(hidden.float()) == model.folds(hidden.repeat(40, 1)) == NOTHING
    found = []
    for folds in (NOTHING, *FOLDS):
        folding(folds, most=16)
        driver = Driver(model, num_slots=20)
        seqs = [driver.add(prompt[i : i + 30]) for i in range(sequences)]
        driver.step([(seq, 30) for seq in seqs])
        logits = []
        for token in range(4):
            for seq in seqs:
                seq.tokens.append(prompt[100 + token])
            logits.append(torch.cat(driver.step([(seq, 1) for seq in seqs])))
        found.append(torch.stack(logits))
    # of the median row: one that a rounding sends to another expert is far off, either way
    want = found[0].norm(dim=-1)
    for got in found[1:]:
        assert ((got - found[0]).norm(dim=-1) / want).median() < 2e-2


@pytest.mark.gpu
@pytest.mark.parametrize("sequences", [1, 3])
def test_gpu_graph(four_layers, prompt, sequences):
    """A captured step gives what it gives kernel by kernel, again and again: nothing is read before it is written."""
    driver = Driver(four_layers)
    seqs = [driver.add(prompt[i : i + 20]) for i in range(sequences)]
    for seq in seqs:
        driver.prefill(seq)
        seq.tokens.append(5)
    ids, positions, context = driver.context([(seq, 1) for seq in seqs])
    states = [t for layer in four_layers.stateful_layers().gdn for t in (layer.conv_state, layer.ssm_state)]
    before = [state.clone() for state in states]

    def step():
        for state, saved in zip(states, before):
            state.copy_(saved)
        return four_layers(ids, positions)

    with torch.inference_mode(), set_forward_context(context):
        want = step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            hidden = step()
        for _ in range(20):
            hidden.fill_(float("nan"))
            graph.replay()
            assert torch.equal(hidden, want)
