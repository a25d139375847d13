"""Norms and residual adds as parts of the projections around them: the same numbers as by themselves, whoever shares the step."""

import pytest
import torch

from tests.kernels.conftest import _poison_uninitialised_memory  # noqa: F401 (every test here)
from tests.models.driver import Driver
from vllm.model_executor.layers.fused_moe import FusedMoE
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.model_executor.layers.mamba.gdn_linear_attn import IN_PROJ
from vllm.model_executor.layers.ops.rms_norm import Unnormed
from vllm.model_executor.models.qwen3_5 import DecoderLayer, Qwen3_5ForCausalLM


@pytest.fixture
def folding(monkeypatch):
    """Every step folds, on any device, whose projections then take their PyTorch forms."""
    return lambda on=True: monkeypatch.setattr(Qwen3_5ForCausalLM, "folds", lambda self, hidden: on)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_numbers(family, prompt, folding, dtype):
    """Bit for bit, since PyTorch's forms round where the steps by themselves do."""
    model = family.load(dtype)
    want = steps(Driver(model), prompt)
    folding()
    for got, expected in zip(steps(Driver(model), prompt), want, strict=True):
        assert torch.equal(got, expected)


def test_the_same_tokens(family, prompt, folding):
    model, found = family.load(), []
    for on in (False, True):
        folding(on)
        driver = Driver(model)
        found.append(driver.greedy(driver.add(prompt[:30]), 24))
    assert found[0] == found[1] and len(set(found[0])) > 10


@pytest.mark.parametrize("in_proj", [name for name in IN_PROJ if name != "fused"])
def test_a_projection_that_cannot_normalises_first(families, prompt, folding, in_proj):
    model = families["moe"].load(gdn_in_proj=in_proj)
    want = steps(Driver(model), prompt)
    folding()
    for got, expected in zip(steps(Driver(model), prompt), want, strict=True):
        assert torch.equal(got, expected)


def test_nothing_is_left_to_add_or_normalise(families, prompt, folding, monkeypatch):
    """Every projection behind a norm gets rows that are still to be normalised, and every summand goes to the one residual."""
    model = families["moe"].load(gdn_in_proj="fused")
    residuals, behind = set(), []

    def watch(cls, at):
        original = cls.forward

        def forward(self, x, *args):
            y = original(self, x, *args)
            if len(args) > at and args[at] is not None:
                residuals.add(args[at].data_ptr())
                behind.append(y)
            return y

        monkeypatch.setattr(cls, "forward", forward)

    def layer(self, hidden, residual, cos_sin, add_to):
        assert hidden is None and residual is add_to
        normed, same = self.input_layernorm(hidden, residual)
        assert isinstance(normed, Unnormed) and same is residual and normed.rows is residual
        return layer_forward(self, hidden, residual, cos_sin, add_to)

    layer_forward = DecoderLayer.forward
    watch(RowParallelLinear, 0), watch(FusedMoE, 2)
    monkeypatch.setattr(DecoderLayer, "forward", layer)
    folding()
    driver = Driver(model)
    driver.prefill(driver.add(prompt[:5]))
    assert len(residuals) == 1 and behind == [None] * (2 * len(model.layers))
