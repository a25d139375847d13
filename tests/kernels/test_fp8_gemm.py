from functools import partial

import pytest
import torch

from tests.kernels.common import TOLERANCE, assert_close
from vllm.model_executor.layers.ops.fp8_gemm import (
    fp8_gemm_library,
    fp8_gemm_torch,
    fp8_gemm_triton,
    quantise_torch,
    quantise_triton,
    takes_fp8,
)
from vllm.model_executor.layers.ops.quantised_gemm_plan import TILES, Tile
from vllm.model_executor.layers.quantization.base import KernelWeight

SMALL = Tile(32, 16, 4, 2, 1.0)
FORMS = ("row", "block", "rows of blocks")  # a scale a row; 128 x 128; blocks that do not meet the matrix's rows


def stored(N: int, K: int, form: str, device: str, dtype: torch.dtype = torch.float32) -> KernelWeight:
    values = torch.randn(N, K).to(torch.float8_e4m3fn).to(device)
    group, scale_rows = (K if form == "row" else 128), (128 if form == "block" else 1)
    scale = (torch.rand(-(-N // scale_rows), K // group) + 0.5) * K**-0.5
    return KernelWeight("fp8", values, scale.to(device, dtype), None, group, scale_rows, quantize_inputs=True)


@pytest.mark.parametrize("M,K,group", [(5, 128, 128), (33, 384, 128), (3, 640, 640), (2, 4096, 128)])
def test_inputs_are_quantised(device, M, K, group):
    """To the nearest number of e4m3, the largest of a group to 448; rows of zeros stay zeros."""
    x = (torch.randn(M, K) * torch.rand(M, 1) * 4).to(device, torch.float16)
    x[1] = 0
    (q, scale), (want_q, want_scale) = quantise_triton(x, group), quantise_torch(x, group)
    assert q.dtype == torch.float8_e4m3fn and scale.shape == (K // group, M)
    assert_close(scale / want_scale, torch.ones_like(scale), 1e-6)
    assert (q.float() != want_q.float()).float().mean() < 2e-3  # a quotient between two numbers may fall to either
    every = scale.T.repeat_interleave(group, 1)
    error = (q.float() * every - x.float()).abs()
    assert (error <= torch.maximum(x.float().abs() * 2**-4, every * 2**-10) * 1.001).all()
    assert (q.float()[1] == 0).all() and q.float().abs().max() == 448


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("M,N,K", [(1, 16, 128), (70, 150, 384)])
def test_matches_reference(device, form, dtype, M, N, K):
    weight = stored(N, K, form, device)
    q, scale = quantise_torch(torch.randn(M, K).to(device, dtype), weight.group)
    got = fp8_gemm_triton(q, scale, weight, dtype, SMALL)
    assert_close(got, fp8_gemm_torch(q, scale, weight, dtype), TOLERANCE[dtype])


def test_reference_is_near_the_exact_product():
    weight, x = stored(64, 512, "block", "cpu"), torch.randn(40, 512)
    want = x @ (weight.values.float() * weight.scale.repeat_interleave(128, 1)).T
    got = fp8_gemm_torch(*quantise_torch(x, 128), weight, torch.float32)
    assert ((got - want).norm() / want.norm()) < 4e-2


def test_which_weights_take_it():
    weight = stored(16, 512, "row", "cpu")
    assert takes_fp8(weight, 512) and takes_fp8(stored(16, 512, "block", "cpu"), 512)
    assert not takes_fp8(KernelWeight("fp8", weight.values, weight.scale, None, 512), 512)
    assert not takes_fp8(KernelWeight("fp8", weight.values, weight.scale, None, 64, quantize_inputs=True), 512)
    assert not takes_fp8(KernelWeight("int8", weight.values, weight.scale, None, 512, quantize_inputs=True), 512)


def need_fp8() -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs tensor cores for 8-bit floats")


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("M,N,K", [(129, 1100, 512), (300, 2045, 2048), (1024, 1037, 4096), (300, 12352, 5120)])
def test_real_sizes(form, M, N, K):
    """Beside exact sums of the same 8-bit numbers."""
    need_fp8()
    weight, x = stored(N, K, form, "cuda", torch.bfloat16), torch.randn(M, K, device="cuda").bfloat16()
    q, scale = quantise_triton(x, weight.group)
    want_q, want_scale = quantise_torch(x, weight.group)
    assert_close(scale / want_scale, torch.ones_like(scale), 1e-6)
    assert (q.float() != want_q.float()).float().mean() < 2e-3
    want = fp8_gemm_torch(q, scale, weight, torch.float32)
    tiles = TILES["fp8"][torch.cuda.get_device_capability()[0] in (9, 10)]
    ways = {str(tile): partial(fp8_gemm_triton, tile=tile) for tile in (tiles if K == 512 else tiles[:1])}
    if scale.shape[0] == 1 and N % 16 == 0 and torch.cuda.get_device_capability()[0] in (9, 10):
        ways["library"] = fp8_gemm_library
    for name, way in ways.items():
        y = way(q, scale, weight, x.dtype)
        assert not y.isnan().any()
        error = ((y.double() - want.double()).norm() / want.double().norm()).item()
        assert error < 5e-3, f"{name}: off by {error:.2g}"


@pytest.mark.gpu
def test_a_row_does_not_depend_on_its_neighbours():
    need_fp8()
    weight, x = stored(1100, 2048, "block", "cuda"), torch.randn(300, 2048, device="cuda").bfloat16()
    tile = TILES["fp8"][torch.cuda.get_device_capability()[0] in (9, 10)][0]
    whole = fp8_gemm_triton(*quantise_triton(x, 128), weight, x.dtype, tile)
    part = fp8_gemm_triton(*quantise_triton(x[64:200].contiguous(), 128), weight, x.dtype, tile)
    assert torch.equal(part, whole[64:200])


@pytest.mark.gpu
def test_what_is_no_number_stays_none():
    """Not so in the interpreter, whose conversion knows no NaN."""
    need_fp8()
    x = torch.ones(3, 128, device="cuda").half()
    x[0, 5], x[1, 7] = float("nan"), float("inf")
    q, scale = quantise_triton(x, 128)
    y = q.float() * scale.T
    assert y[0, 5].isnan() and y[1].isnan().any() and not y[2].isnan().any()
