import dataclasses

import pytest
import torch

from tests.kernels.common import TOLERANCE, assert_close
from tests.kernels.experts import FORMS, stored
from vllm.model_executor.layers.ops import quantised_gemm as module
from vllm.model_executor.layers.ops.fp8_gemm import fp8_gemm_torch, quantise_torch
from vllm.model_executor.layers.ops.quantised_gemm import (
    by_tiles_torch,
    by_tiles_triton,
    dequantise_triton,
    fits,
    quantised_gemm_torch,
    quantised_gemm_triton,
    quantised_linear,
)
from vllm.model_executor.layers.ops.quantised_gemm_plan import (
    MOST_IN_REGISTERS,
    TILES,
    Gpu,
    Tile,
    plan_quantised_gemm,
)
from vllm.model_executor.layers.ops.stored_weight import dense
from vllm.model_executor.layers.quantization.base import KernelWeight
from vllm.v1.worker.warm_up import _LENGTHS

KINDS = [form for form in FORMS if form != "plain"] + ["int4 row", "int8 zero", "int8 128", "fp8 row"]
SMALL = Tile(32, 16, 4, 2, 1.0)
ROUGH = {torch.bfloat16: 2e-2, torch.float16: 4e-3}  # elements of W are rounded to 16 bits
H200, CONSUMER = Gpu((9, 0), 132), Gpu((12, 0), 84)


def random_x(M: int, K: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    return torch.randn(M, K).to(device, dtype)


@pytest.mark.parametrize("form", KINDS)
def test_every_stored_form(device, form):
    """N no multiple of a tile, two tiles of rows and a part of one."""
    weight, x = stored((50, 384), form, torch.float16, device), random_x(70, 384, torch.float16, device)
    assert fits(x, weight)
    assert_close(quantised_gemm_triton(x, weight, SMALL), quantised_gemm_torch(x, weight), ROUGH[x.dtype])


@pytest.mark.parametrize("form", ["int4 zero", "int4 128", "int8 row", "fp8 block", "fp4 nv"])
@pytest.mark.parametrize("M,N,K", [(1, 16, 128), (33, 17, 256), (300, 33, 128)])
def test_shapes(device, form, M, N, K):
    weight, x = stored((N, K), form, torch.bfloat16, device), random_x(M, K, torch.bfloat16, device)
    assert_close(quantised_gemm_triton(x, weight, SMALL), quantised_gemm_torch(x, weight), ROUGH[x.dtype])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", KINDS)
def test_dense_copies(device, form, dtype):
    """Elements differ by their rounding, and by int4's rounded scale, where that has another type."""
    weight = stored((21, 256), form, dtype, device)
    got, want = dequantise_triton(weight, dtype), dense(weight)
    assert got.dtype == dtype and (got.float() - want).abs().max() <= 2 * TOLERANCE[dtype] * want.abs().max()


def test_rows_that_begin_inside_a_matrix(device):
    whole, x = stored((192, 128), "fp8 block", torch.float16, device), random_x(40, 128, torch.float16, device)
    part = dataclasses.replace(whole, values=whole.values[64:130], scale=whole.scale[1:3])
    assert_close(quantised_gemm_triton(x, part, SMALL), quantised_gemm_torch(x, whole)[:, 64:130], ROUGH[x.dtype])


@pytest.mark.parametrize("planes", [1, 2, 4, 8])
def test_order_of_x(device, planes):
    x = torch.randn(9, 384, device=device)
    assert torch.equal(by_tiles_triton(x, planes), by_tiles_torch(x, planes))
    assert by_tiles_torch(x, planes)[0, :: 128 // planes][:planes].tolist() == x[0, :planes].tolist()


def test_what_does_not_fit():
    weight = stored((16, 256), "int4", torch.bfloat16, "cpu")
    x = torch.zeros(200, 256).bfloat16()
    assert fits(x, weight) and not fits(x.float(), weight)
    assert not fits(x[:, :192], stored((16, 192), "int8", torch.bfloat16, "cpu"))  # half a step
    cut = dataclasses.replace(weight, values=weight.values[:, :16])  # a view
    assert not fits(x[:, :128], cut)
    assert quantised_linear(x[:, :192], stored((16, 192), "int8", torch.bfloat16, "cpu")) is None


@pytest.mark.parametrize("gpu", [H200, CONSUMER])
@pytest.mark.parametrize("N,K", [(12352, 2048), (2048, 4096), (34816, 5120), (5120, 17408), (45, 128)])
def test_plan(gpu, N, K):
    """Few programs take small tiles, many rows a large one, and the largest a dense copy."""
    most = MOST_IN_REGISTERS[gpu is H200]
    plans = [plan_quantised_gemm(gpu, M, N, K) for M in (33, 64, most // 2, most, most + 1, 9000)]
    assert [plan.form for plan in plans] == ["registers"] * 4 + ["copy"] * 2
    assert all(plan.tile in TILES["registers"][gpu is H200] for plan in plans[:4])
    assert plans[0].tile.BM == 64 and plans[3].tile.BM >= plans[0].tile.BM
    assert plan_quantised_gemm(gpu, 9000, N, K, K).tile in TILES["fp8"][gpu is H200]


def test_gpus_without_the_instructions():
    assert plan_quantised_gemm(Gpu((8, 0), 108), 300, 4096, 4096, 4096) is None
    assert plan_quantised_gemm(Gpu((8, 9), 142), 300, 4096, 4096, 128).form == "fp8"
    assert plan_quantised_gemm(Gpu((8, 9), 142), 300, 4096, 4096) is None
    assert plan_quantised_gemm(H200, 300, 4096, 4096 + 64) is None


def test_when_x_is_quantised():
    """Not for few rows; on an H200 not for many either, where sums have to be scaled block by block."""
    rows = 128, 129, 1024, 1025, 9000
    forms = {
        (gpu.capability, group): [plan_quantised_gemm(gpu, M, 4096, 4096, group).form for M in rows]
        for gpu in (H200, CONSUMER)
        for group in (128, 4096)
    }
    assert forms[(9, 0), 128] == ["registers", "fp8", "fp8", "copy", "copy"]
    library = [plan_quantised_gemm(H200, M, 4096, 4096, 4096, library=True).form for M in (128, 129, 256, 257, 9000)]
    assert library == ["registers", "fp8", "fp8", "library", "library"]
    assert plan_quantised_gemm(CONSUMER, 9000, 4096, 4096, 4096, library=True).form == "fp8", "not measured there"
    assert all(found == ["registers"] + ["fp8"] * 4 for key, found in forms.items() if key != ((9, 0), 128))


@pytest.mark.parametrize("gpu", [H200, CONSUMER])
@pytest.mark.parametrize("longest", [700, 2048, 8192])
def test_the_warm_up_meets_every_plan(gpu, longest):
    """Or a prompt would wait for a compiler."""
    warm = [n for n in (*_LENGTHS, longest) if n <= longest]
    for N, K in ((12352, 2048), (2048, 4096), (5120, 17408)):
        for group in (0, 128, K):
            plans = [plan_quantised_gemm(gpu, M, N, K, group) for M in range(1, longest + 1)]
            assert set(plans) == {plans[n - 1] for n in warm}


def test_dispatch(monkeypatch):
    """Few rows go to csrc's kernels where these take them; the rest as planned. x may have any shape."""
    weight = stored((24, 256), "fp8 row", torch.float32, "cpu")
    made = dataclasses.replace(weight, quantize_inputs=True)
    x = torch.randn(2, 90, 256).bfloat16()
    want = x.float() @ dense(weight).T
    calls = []

    def note(name, of):
        return lambda *args: calls.append(name) or of(*args)

    monkeypatch.setattr(module, "gpu_of", lambda device: CONSUMER)
    monkeypatch.setattr(
        module, "quantised_gemm_triton", note("registers", lambda x, w, tile: quantised_gemm_torch(x, w))
    )
    monkeypatch.setattr(module, "dequantise_triton", note("copy", dense))
    monkeypatch.setattr(module, "quantise_triton", note("quantise", quantise_torch))
    monkeypatch.setattr(module, "fp8_gemm_triton", note("fp8", lambda *args: fp8_gemm_torch(*args[:-1])))
    assert_close(quantised_linear(x, weight), want, 2e-2)
    assert_close(quantised_linear(x, made), want, 6e-2)
    long = x.repeat(10, 1, 1)
    assert_close(quantised_linear(long, weight), want.repeat(10, 1, 1), 2e-2)
    assert calls == ["registers", "quantise", "fp8", "copy"]
    monkeypatch.setattr(module, "few_rows", lambda x, most: x.shape[:-1].numel() <= most)
    monkeypatch.setattr(module, "quantised_gemm", lambda x, w: calls.append("few"))
    assert_close(quantised_linear(x[:1], made), want[:1], 2e-2)
    assert calls[4:] == ["few", "registers"]


def test_many_rows_of_fp8_go_to_the_library_where_it_takes_them(monkeypatch):
    """Its results are bfloat16, its sizes multiples of 16."""
    calls = []
    monkeypatch.setattr(module, "gpu_of", lambda device: H200)
    monkeypatch.setattr(module, "quantise_triton", quantise_torch)
    monkeypatch.setattr(module, "fp8_gemm_library", lambda *args: calls.append("library") or fp8_gemm_torch(*args))
    monkeypatch.setattr(module, "fp8_gemm_triton", lambda *args: calls.append("ours") or fp8_gemm_torch(*args[:-1]))
    for N, form, dtype in ((48, "fp8 row", "bfloat16"), (40, "fp8 row", "bfloat16"), (48, "fp8 row", "float16")):
        weight = dataclasses.replace(stored((N, 256), form, torch.float32, "cpu"), quantize_inputs=True)
        x = torch.randn(300, 256).to(getattr(torch, dtype))
        assert_close(quantised_linear(x, weight), x.float() @ dense(weight).T, 6e-2)
    assert calls == ["library", "ours", "ours"]


# On a GPU


def off_by(y: torch.Tensor, want: torch.Tensor) -> float:
    return ((y.double() - want.double()).norm() / want.double().norm()).item()


def need(capability: tuple[int, int]) -> Gpu:
    gpu = module.gpu_of(torch.device("cuda"))
    if gpu.capability < capability:
        pytest.skip(f"needs a GPU of capability {capability}")
    return gpu


@pytest.mark.gpu
@pytest.mark.parametrize("form", KINDS)
@pytest.mark.parametrize("M,N,K", [(129, 1100, 512), (300, 2045, 2048), (1024, 1037, 4096), (300, 12352, 5120)])
def test_real_sizes(form, M, N, K):
    gpu = need((9, 0))
    weight, x = stored((N, K), form, torch.bfloat16, "cuda"), random_x(M, K, torch.bfloat16, "cuda")
    want = x.float() @ dense(weight).T
    large = gpu.capability[0] in (9, 10)
    found = {
        f"registers {tile.BM}x{tile.BN}": quantised_gemm_triton(x, weight, tile) for tile in TILES["registers"][large]
    }
    for name, y in (found | {"copy": x @ dequantise_triton(weight, x.dtype).T}).items():
        assert not y.isnan().any()
        assert off_by(y, want) < 5e-3, f"{name}: off by {off_by(y, want):.2g}"


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["int4", "int8 row", "fp4 nv"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_tile(form, dtype):
    gpu = need((9, 0))
    weight, x = stored((1100, 512), form, dtype, "cuda"), random_x(300, 512, dtype, "cuda")
    want = x.float() @ dense(weight).T
    for tile in TILES["registers"][gpu.capability[0] in (9, 10)]:
        assert off_by(quantised_gemm_triton(x, weight, tile), want) < 5e-3, tile


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["int4", "int8 row", "fp8 block", "fp4 nv"])
def test_the_same_every_time(form):
    """Registers are filled again while tensor cores work: many programs, long rows, and nothing may come too early."""
    gpu = need((9, 0))
    weight, x = stored((4096, 4096), form, torch.bfloat16, "cuda"), random_x(1024, 4096, torch.bfloat16, "cuda")
    for tile in TILES["registers"][gpu.capability[0] in (9, 10)]:
        first = quantised_gemm_triton(x, weight, tile)
        assert off_by(first, x.float() @ dense(weight).T) < 5e-3
        for _ in range(30):
            assert torch.equal(quantised_gemm_triton(x, weight, tile), first)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_code_is_read_exactly(dtype):
    """All patterns of a byte as two elements of four bits, or as one of eight, in every place of a word."""
    need((9, 0))
    codes = torch.arange(256, dtype=torch.int32, device="cuda").repeat(64, 1)  # [64, 256]
    codes = torch.stack([row.roll(i) for i, row in enumerate(codes)]).to(torch.uint8)
    ones, tile = torch.ones(64, 1, device="cuda", dtype=dtype), Tile(64, 64, 4, 2, 1.0)
    words, numbers = codes.view(torch.int32), codes.clone()
    numbers[(codes & 0x7F) == 0x7F] = 0  # e4m3's NaN
    for kind, values in (("int4", words), ("int8", words), ("fp4", codes), ("fp8", numbers.view(torch.float8_e4m3fn))):
        K = {"int4": 512, "fp4": 512}.get(kind, 256)
        one_byte = torch.ones(64, K // 16, device="cuda").to(torch.float8_e4m3fn)
        for scale, group in (
            (ones, K),
            (one_byte if kind == "fp4" else ones.repeat(1, K // 32), 16 if kind == "fp4" else 32),
        ):
            weight = KernelWeight(kind, values, scale, None, group)
            assert torch.equal(dequantise_triton(weight, dtype).float(), dense(weight)), kind
            eye = torch.eye(K, device="cuda", dtype=dtype)
            assert torch.equal(quantised_gemm_triton(eye, weight, tile).float(), dense(weight).T), kind


@pytest.mark.gpu
@pytest.mark.parametrize("form,native", [("int4", False), ("fp4 nv", False), ("fp8 row", True)])
@pytest.mark.parametrize("M", [200, 1500])
def test_in_a_graph(form, native, M):
    """Captured behind the kernel that makes x and before one that reads y."""
    need((9, 0))
    weight = dataclasses.replace(stored((2048, 2048), form, torch.bfloat16, "cuda"), quantize_inputs=native)
    start = random_x(M, 2048, torch.bfloat16, "cuda")

    def step():
        x = start * 2
        for _ in range(3):
            x = quantised_linear(x, weight).tanh()
        return x

    want = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    for _ in range(5):
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, want)
