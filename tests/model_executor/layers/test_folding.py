"""Which steps fold norms and adds into projections, decided without the device they run on; and the pieces that folding is made of."""

import pytest
import torch

from vllm.config.checkpoint import load_hf_config, resolve_model
from vllm.model_executor.layers import folding
from vllm.model_executor.layers.folding import INPUT_ROWS, NOTHING, POST_ROWS, Folds, Where, step_folds
from vllm.model_executor.layers.fused_moe.experts import ExpertsFold
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm
from vllm.model_executor.layers.linear import ReplicatedLinear, RowParallelLinear
from vllm.model_executor.layers.ops.rms_norm import Unnormed, normed, rows_of
from vllm.model_executor.layers.ops.skinny_gemm_plan import Product
from vllm.model_executor.layers.quantization.plan import ConfigPlan
from vllm.model_executor.models.qwen3_5 import Qwen3_5ForCausalLM

H200 = Where("NVIDIA H200", csrc=True)
EXPERTS = ExpertsFold(8, 256, kernels=True, tiles=True, kind="int4")
GDN = (Product("plain", 12352, 2048), Product("plain", 2048, 4096, adds=True))
ATTENTION = (Product("plain", 9216, 2048), Product("plain", 2048, 4096, adds=True))
MODEL_35B = (*GDN, *ATTENTION, EXPERTS)


def folds(rows=1, dtype=torch.bfloat16, where=H200, in_proj="fused", parts=MODEL_35B):
    found = step_folds(rows, dtype, where, in_proj, parts)
    assert found.input or not found.post
    return found.input


def test_few_rows_of_the_35b_fold():
    """As many as were measured."""
    both = Folds(input=True, post=True)
    expected = {
        0: NOTHING,
        1: both,
        2: both,
        3: Folds(input=True),
        8: Folds(input=True),
        9: NOTHING,
        16: NOTHING,
        4096: NOTHING,
    }
    assert {rows: step_folds(rows, torch.bfloat16, H200, "fused", MODEL_35B) for rows in expected} == expected
    assert (POST_ROWS, INPUT_ROWS) == (2, 8)


def test_each_norm_has_a_limit_of_its_own(monkeypatch):
    monkeypatch.setattr(folding, "INPUT_ROWS", 8)
    for rows, expected in ((2, Folds(True, True)), (3, Folds(input=True)), (8, Folds(input=True)), (9, NOTHING)):
        assert step_folds(rows, torch.bfloat16, H200, "fused", MODEL_35B) == expected


def test_what_a_step_needs():
    assert not folds(dtype=torch.float16) and not folds(dtype=torch.float32)
    assert not folds(where=Where("NVIDIA H200", csrc=False))
    assert not folds(where=Where("NVIDIA H200", csrc=True, ranks=2))
    assert not folds(in_proj="serial") and not folds(in_proj="dual_stream")
    assert folds(where=Where("a GPU that was not measured", csrc=True))


@pytest.mark.parametrize("kind", ["int4", "int8", "fp8", "fp4", None])
def test_one_quantised_projection_is_enough_to_leave_all(kind):
    assert not folds(parts=(*MODEL_35B, Product(kind, 2048, 4096)))


def test_a_bias_or_another_kernel_is_too():
    assert not folds(parts=(*MODEL_35B, Product("plain", 2048, 4096, bias=True)))
    gate_up, down = Product("plain", 24576, 4096), Product("plain", 4096, 12288, adds=True)
    assert folds(1, parts=(*GDN, gate_up, down)), "the dense 9B: the ring beside a norm, and a kernel that adds"
    assert not folds(2, parts=(*GDN, gate_up, down)), "two rows of 12,288 are cuBLAS's"
    assert not folds(parts=(*GDN, Product("plain", 4096, 12288))), "nothing normalises so many columns"


def test_experts():
    """Any stored form that the kernels for a few tokens read."""
    assert EXPERTS.folds(12, "any") and not EXPERTS.folds(13, "any")
    assert not folds(parts=(*GDN, ExpertsFold(8, 256, kernels=False, tiles=False)))


@pytest.mark.parametrize("preset", ["qwen3.5-35b-a3b", "qwen3.5-9b"])
def test_parts_of_published_models(preset):
    config = load_hf_config(resolve_model(f"preset:{preset}")).text
    with torch.device("meta"):
        model = Qwen3_5ForCausalLM(config, ConfigPlan(None, torch.bfloat16))
    found = {part for layer in model.layers for part in layer.parts()}
    if preset == "qwen3.5-35b-a3b":
        assert {part for part in found if isinstance(part, Product)} == {*GDN, *ATTENTION}
    assert folds(parts=found)
    assert folds(2, parts=found) == (preset == "qwen3.5-35b-a3b")
    assert model.folds(torch.zeros(1, config.hidden_size, device="meta").bfloat16()) == NOTHING, "not on a GPU"


@pytest.mark.parametrize("cls", [RMSNorm, GemmaRMSNorm])
def test_a_norm_without_a_summand_waits(cls, seed):
    norm, residual = cls(16), torch.randn(3, 16)
    norm.weight.normal_()
    waiting, same = norm(None, residual)
    assert isinstance(waiting, Unnormed) and same is residual and rows_of(waiting) is residual
    assert waiting.shape == residual.shape
    assert torch.equal(normed(waiting), norm(residual)) and normed(residual) is residual


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_layers(dtype, seed):
    plan = ConfigPlan(None, dtype)
    norm = GemmaRMSNorm(64, dtype=dtype)
    norm.weight.normal_(std=0.3)
    residual, x = torch.randn(3, 64).to(dtype), torch.randn(3, 32).to(dtype)
    front = ReplicatedLinear(64, 48, prefix="a", plan=plan)
    front.weight.normal_()
    assert torch.equal(front(norm(None, residual)[0], slice(8, 40)), front(norm(residual), slice(8, 40)))
    for bias in (False, True):
        back = RowParallelLinear(32, 64, prefix="b", bias=bias, plan=plan)
        for parameter in back.parameters():
            parameter.normal_()
        total = residual.clone()
        assert back(x, total) is None
        assert torch.equal(total, residual + back(x))
