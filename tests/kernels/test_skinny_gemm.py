import pytest
import torch

from tests.kernels.common import TOLERANCE, assert_close
from vllm.model_executor.layers.ops import skinny_gemm as module
from vllm.model_executor.layers.ops.skinny_gemm import (
    MAX_ROWS,
    fits_skinny_gemm,
    plan_skinny_gemm,
    skinny_gemm,
    skinny_gemm_torch,
    skinny_gemm_triton,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("M,N,D", [(1, 1, 64), (1, 45, 192), (2, 33, 128), (7, 70, 192), (17, 40, 64), (32, 64, 256)])
def test_matches_linear(device, M, N, D, dtype):
    x, weight = torch.randn(M, D).to(device, dtype), torch.randn(N, D).to(device, dtype) * D**-0.5
    assert_close(skinny_gemm_triton(x, weight), skinny_gemm_torch(x, weight), TOLERANCE[dtype])


def test_views_and_out(device):
    """x inside wider rows, weight rows inside a wider matrix, three dimensions, and a buffer to write to."""
    x = torch.randn(2, 3, 160, device=device)[..., 16:144]
    weight = torch.randn(20, 192, device=device)[4:, 64:]
    want = skinny_gemm_torch(x, weight)
    out = torch.full_like(want, float("nan"))
    assert skinny_gemm_triton(x, weight, out) is out
    assert_close(out, want, 1e-5)
    assert_close(skinny_gemm_triton(x[0, 1], weight), want[0, 1], 1e-5)


def test_several_tiles_along_a_vector(device, monkeypatch):
    monkeypatch.setattr(module, "plan_skinny_gemm", lambda *_: {"BN": 4, "BK": 64, "num_warps": 1})
    x, weight = torch.randn(1, 200, device=device), torch.randn(9, 200, device=device)
    assert_close(skinny_gemm_triton(x, weight), skinny_gemm_torch(x, weight), 1e-5)


def test_what_does_not_fit_is_left_to_linear():
    weight = torch.randn(8, 64)
    assert not fits_skinny_gemm(torch.randn(1, 64), weight)  # float32
    half = weight.bfloat16()
    assert fits_skinny_gemm(torch.randn(MAX_ROWS, 64).bfloat16(), half)
    assert not fits_skinny_gemm(torch.randn(MAX_ROWS + 1, 64).bfloat16(), half)
    assert not fits_skinny_gemm(torch.randn(0, 64).bfloat16(), half)
    assert not fits_skinny_gemm(torch.randn(1, 8).bfloat16(), half.T)
    x = torch.randn(40, 64)
    assert torch.equal(skinny_gemm(x, weight), skinny_gemm_torch(x, weight))
    with pytest.raises(ValueError, match="1 to 32 rows"):
        skinny_gemm_triton(x, weight)


@pytest.mark.parametrize("M", [1, 2, 8, 9, 16, 32])
@pytest.mark.parametrize("N,D", [(12352, 2048), (64, 2048), (9216, 4096), (5, 64), (256, 192)])
def test_plan(M, N, D):
    plan = plan_skinny_gemm(M, N, D, 132)
    assert D % plan["BK"] == 0 or M == 1
    assert M == 1 or M <= plan["BM"] <= max(8, 2 * M)
    assert plan_skinny_gemm(MAX_ROWS + 1, N, D, 132) is None and plan_skinny_gemm(M, N, 100, 132) is None


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 2, 5, 8, 16, 17, 32])
def test_real_sizes_in_a_chain(M):
    """Captured behind the kernels that make x, and before one that reads y: early launches must wait for both."""
    weight = (torch.randn(12352, 2048, device="cuda") * 2048**-0.5).bfloat16()
    back = (torch.randn(2048, 12352, device="cuda") * 12352**-0.5).bfloat16()
    start = torch.randn(M, 2048, device="cuda").bfloat16()

    def step(linear):
        x = start * 2
        for _ in range(3):
            x = linear(linear(x, weight), back) + start
        return x

    want = step(torch.nn.functional.linear)
    step(skinny_gemm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step(skinny_gemm)
    for _ in range(20):
        y.fill_(float("nan"))
        graph.replay()
        error = ((y.float() - want.float()).square().mean() / want.float().square().mean()).sqrt().item()
        assert error < 1e-2
