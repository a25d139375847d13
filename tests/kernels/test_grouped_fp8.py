import dataclasses

import pytest
import torch

from tests.kernels.common import assert_close
from tests.kernels.test_fp8_gemm import need_fp8
from tests.kernels.test_fp8_gemm import stored as stored_rows
from vllm.model_executor.layers.fused_moe.ops import grouped, grouped_fp8
from vllm.model_executor.layers.fused_moe.ops.grouped_fp8 import experts_fp8_torch, experts_fp8_triton, prefers_fp8
from vllm.model_executor.layers.fused_moe.ops.route import Routed, route_torch, route_triton
from vllm.model_executor.layers.quantization.base import KernelWeight

FORMS = ("row", "block")


def stored(E: int, N: int, K: int, form: str, device: str) -> KernelWeight:
    flat = stored_rows(E * N, K, form, device)
    values, scale = flat.values.view(torch.uint8).view(E, N, K).view(torch.float8_e4m3fn), flat.scale
    return dataclasses.replace(flat, values=values, scale=scale.view(E, -1, scale.shape[-1]))


def make(T: int, E: int, D: int, I: int, top_k: int, form: str, dtype: torch.dtype, device: str, block: int):
    x, logits = torch.randn(T, D).to(device, dtype), torch.randn(T, E).to(device)
    route = route_triton if device == "cuda" else route_torch
    return x, route(logits, E, top_k, block), stored(E, 2 * I, D, form, device), stored(E, D, I, form, device)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("T,E,D,I,top_k", [(40, 4, 256, 128, 2), (7, 3, 128, 384, 1)])
def test_matches_reference(device, form, T, E, D, I, top_k):
    case = make(T, E, D, I, top_k, form, torch.float16, device, 16)
    # h is rounded before it is quantised, which takes some to the next number
    assert_close(experts_fp8_triton(*case), experts_fp8_torch(*case), 2e-2)


def test_where_inputs_are_quantised(monkeypatch):
    x, routed, w13, w2 = make(64, 2, 128, 128, 1, "row", torch.bfloat16, "cpu", 32)
    assert not prefers_fp8(x, routed, w13, w2)
    monkeypatch.setattr(grouped_fp8, "multiplies_fp8", lambda device: True)
    assert prefers_fp8(x, routed, w13, w2)
    assert not prefers_fp8(x, dataclasses.replace(routed, block=16), w13, w2)
    assert not prefers_fp8(x, routed, dataclasses.replace(w13, quantize_inputs=False), w2)
    monkeypatch.setattr(grouped, "experts_fp8_triton", lambda *case: case[1])
    assert grouped.experts_triton(x, routed, w13, w2) is routed and isinstance(routed, Routed)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("T,block", [(600, 32), (2100, 64)])
def test_real_sizes(form, T, block):
    need_fp8()
    x, routed, w13, w2 = make(T, 32, 2048, 512, 8, form, torch.bfloat16, "cuda", block)
    got, want = experts_fp8_triton(x, routed, w13, w2).float(), experts_fp8_torch(x, routed, w13, w2)
    assert not got.isnan().any()
    assert ((got - want).norm() / want.norm()) < 3e-2  # h in bfloat16 may be quantised to the next number
    exact = grouped.experts_torch(x, routed, w13, w2)
    assert ((got - exact).norm() / exact.norm()) < 8e-2
