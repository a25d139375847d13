import itertools

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.common import TOLERANCE, assert_close
from vllm import _custom_ops
from vllm.model_executor.layers.fused_moe.ops.weights import dense
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.ops import skinny_gemm as module
from vllm.model_executor.layers.ops import skinny_gemm_plan as plan_module
from vllm.model_executor.layers.ops.rms_norm import Unnormed, normed
from vllm.model_executor.layers.ops.skinny_gemm import (
    few_rows,
    plan_of,
    quantised_gemm,
    quantised_gemm_cuda,
    reads,
    reads_any_width,
    skinny_gemm,
    skinny_gemm_add,
    skinny_gemm_add_cuda,
    skinny_gemm_add_torch,
    skinny_gemm_add_triton,
    skinny_gemm_cuda,
    skinny_gemm_torch,
    skinny_gemm_triton,
    triton_tile,
)
from vllm.model_executor.layers.ops.skinny_gemm_plan import (
    DENSE,
    MAX_ROWS,
    Plan,
    plan_skinny_gemm,
    quantised_fits,
    ring_fits,
)
from vllm.model_executor.layers.quantization.base import KernelWeight

H200 = "NVIDIA H200"
SHAPES_35B = [(12352, 2048), (2048, 4096), (9216, 2048), (256, 2048), (1024, 2048), (2048, 512), (248320, 2048)]


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
    monkeypatch.setattr(module, "triton_tile", lambda *_: {"BN": 4, "BK": 64, "num_warps": 1})
    x, weight = torch.randn(1, 200, device=device), torch.randn(9, 200, device=device)
    assert_close(skinny_gemm_triton(x, weight), skinny_gemm_torch(x, weight), 1e-5)


def test_what_no_kernel_takes_is_left_to_linear():
    x, weight = torch.randn(40, 64), torch.randn(8, 64)
    assert plan_of(x, weight) == DENSE and not few_rows(x[:1])  # not on a GPU
    assert torch.equal(skinny_gemm(x, weight), skinny_gemm_torch(x, weight))
    assert quantised_gemm(x, KernelWeight("plain", weight)) is None
    with pytest.raises(ValueError, match="1 to 32 rows"):
        skinny_gemm_triton(x, weight)


@pytest.mark.parametrize("M", [1, 2, 8, 9, 16, 32])
@pytest.mark.parametrize("D", [2048, 4096, 64, 192])
def test_triton_tile(M, D):
    tile = triton_tile(M, D)
    assert D % tile["BK"] == 0 or M == 1
    assert M == 1 or M <= tile["BM"] <= max(8, 2 * M)
    assert triton_tile(MAX_ROWS + 1, D) is None and triton_tile(M, 100) is None


@pytest.mark.parametrize("N,K", [*SHAPES_35B, (12352, 4096), (4096, 12288), (7, 2560), (5, 100)])
@pytest.mark.parametrize("gpu", [H200, "another"])
def test_every_plan_can_run(gpu, N, K):
    for M, csrc in itertools.product((1, 2, 3, 8, 16, 17, 32), (False, True)):
        plan = plan_skinny_gemm(gpu, M, N, K, csrc=csrc)
        if plan.form == "ring":
            assert csrc and ring_fits(M, K, "plain") and plan.ring > 0 and plan.late >= 0
        elif plan.form != "dense":
            assert plan.form == ("vector" if M == 1 else "rows") and triton_tile(M, K) is not None
    assert plan_skinny_gemm(gpu, 0, N, K) == plan_skinny_gemm(gpu, MAX_ROWS + 1, N, K) == DENSE


TABLE = {
    H200: {
        "plain": {
            "1000x2048": {"1": {"form": "vector"}, "8": {"form": "ring", "ring": 110, "late": 2, "otherwise": "rows"}},
            "9000x2048": {
                "1": {"form": "ring", "ring": 220, "late": 0, "otherwise": "vector"},
                "32": {"form": "dense"},
            },
        },
        "int4": {"1000x2048": {"16": {"form": "ring", "ring": 110, "late": 0, "otherwise": "dense"}}},
    }
}


def test_the_most_alike_measured_shape_decides(monkeypatch):
    monkeypatch.setattr(plan_module, "_table", lambda: TABLE)
    plan_module._measured.cache_clear()
    try:
        ring = Plan("ring", 110, 2)
        assert plan_skinny_gemm(H200, 2, 1000, 2048) == plan_skinny_gemm("another", 8, 2500, 2048) == ring
        assert plan_skinny_gemm(H200, 8, 1000, 2048, csrc=False) == Plan("rows")
        assert plan_skinny_gemm(H200, 1, 1000, 2048) == Plan("vector")
        assert plan_skinny_gemm(H200, 9, 1000, 2048) == DENSE  # more than measured
        assert plan_skinny_gemm(H200, 8, 4000, 2048) == DENSE
        assert plan_skinny_gemm(H200, 1, 4000, 2048) == Plan("ring", 220, 0)
        assert plan_skinny_gemm(H200, 1, 4000, 2048, csrc=False) == Plan("vector")
        int4 = lambda *sizes, **more: plan_skinny_gemm(H200, *sizes, "int4", 32, **more)
        assert int4(16, 1000, 2048) == Plan("ring", 110, 0)
        assert int4(17, 1000, 2048) == int4(1, 1000, 4096) == int4(8, 1000, 5120) == Plan("quantised")  # not measured
        assert int4(16, 1000, 2048, csrc=False) == int4(1, 1000, 5120, csrc=False) == int4(33, 1000, 2048) == DENSE
        assert plan_skinny_gemm(H200, 1, 1000, 2048, "int4", 48) == DENSE  # no code for this group
        assert plan_skinny_gemm(H200, 1, 1000, 5120, "fp4", 16) == Plan("quantised")
        assert plan_skinny_gemm(H200, 1, 1000, 5120, "fp4", 32) == DENSE
        assert plan_skinny_gemm(H200, 1, 5, 192) == Plan("vector") and plan_skinny_gemm(H200, 1, 5, 100) == DENSE
        assert plan_skinny_gemm(H200, 2, 20000, 192) == Plan("rows") and plan_skinny_gemm(H200, 2, 64, 192) == DENSE
    finally:
        plan_module._measured.cache_clear()


def test_ring_fits():
    assert ring_fits(32, 2048, "plain") and ring_fits(16, 4096, "plain")
    assert not ring_fits(17, 4096, "plain") and not ring_fits(33, 2048, "plain") and not ring_fits(1, 2560, "plain")
    assert not ring_fits(1, 512, "int4", 32) and ring_fits(1, 512, "fp8", 128)
    assert ring_fits(1, 2048, "int8", 2048) and not ring_fits(1, 2048, "int4", 2048)
    assert not ring_fits(1, 2048, "int4", 48) and not ring_fits(1, 2048, "int4", 16) and ring_fits(1, 2048, "fp4", 16)
    assert not ring_fits(1, 2048, "unknown", 32)


def test_quantised_fits():
    assert all(quantised_fits(32, K, "int4", 32) for K in (128, 2048, 2560, 5120, 17408))
    assert (
        quantised_fits(1, 5120, "int4", 128)
        and quantised_fits(1, 5120, "int4", 512)
        and quantised_fits(1, 640, "int4", 640)
    )
    assert not quantised_fits(1, 5120, "int4", 64) and not quantised_fits(1, 5120, "int4", 640)
    assert not quantised_fits(1, 5152, "int4", 32) and not quantised_fits(33, 2048, "int4", 32)
    assert (
        quantised_fits(1, 192, "int8", 32)
        and quantised_fits(1, 192, "int8", 192)
        and not quantised_fits(1, 192, "int8", 16)
    )
    assert quantised_fits(1, 384, "fp8", 128) and not quantised_fits(1, 384, "fp8", 32)
    assert all(quantised_fits(32, K, "fp4", 16) for K in (128, 512, 5120, 17408)) and not quantised_fits(
        1, 192, "fp4", 16
    )
    assert not quantised_fits(1, 2048, "fp4", 32) and not quantised_fits(1, 16, "fp4", 16)
    assert not quantised_fits(1, 2048, "plain", 0)


def test_reads_what_comes_in_pieces_of_16_bytes():
    values = torch.zeros(24, 256, dtype=torch.int32)  # int4 [24, 2048]
    weight = lambda groups, dtype=torch.bfloat16, zero=False: KernelWeight(
        "int4",
        values,
        torch.ones(24, groups, dtype=dtype),
        torch.zeros(24, groups, dtype=torch.uint8) if zero else None,
        2048 // groups,
    )
    assert reads(weight(64), 2048) and reads(weight(16, zero=True), 2048) and reads(weight(8), 2048)
    assert not reads(weight(4), 2048) and not reads(weight(8, zero=True), 2048)
    assert not reads(weight(16, torch.float8_e4m3fn), 2048)
    assert not reads(KernelWeight("int4", values[:, 1:-3], weight(64).scale, group=32), 2016)
    assert (
        reads_any_width(weight(4))
        and reads_any_width(weight(8, zero=True))
        and reads_any_width(weight(4, torch.float16))
    )
    assert not reads_any_width(weight(16, torch.float8_e4m3fn))
    assert not reads_any_width(KernelWeight("int4", values[:, 1:-3], weight(64).scale, group=32))
    assert not reads_any_width(KernelWeight("int4", values, weight(64).scale, None, 32, 1, torch.ones(24)))
    codes, scale = torch.zeros(24, 512, dtype=torch.uint8), torch.ones(24, 64)
    assert not reads_any_width(KernelWeight("fp4", codes, scale, None, 16))
    for row_scale in (None, torch.ones(24)):
        assert reads_any_width(KernelWeight("fp4", codes, scale.to(torch.float8_e4m3fn), None, 16, 1, row_scale))


def test_many_rows_are_cut_in_slices(monkeypatch):
    """Of a size that the kernels take, the last one shorter; x may have any shape."""
    weight = KernelWeight("int4", torch.zeros(24, 32, dtype=torch.int32), torch.ones(24, 8).bfloat16(), None, 32)
    taken = []

    def product(x, w, out, plan):
        taken.append(x.shape[0])
        out.copy_(x[:, :24] * 2)

    monkeypatch.setattr(module, "few_rows", lambda x, most=MAX_ROWS: x.shape[:-1].numel() <= most)
    monkeypatch.setattr(module, "_plan", lambda *_: Plan("quantised"))
    monkeypatch.setattr(module, "quantised_gemm_cuda", product)
    for shape, sizes in (((5,), [5]), ((2, 35), [32, 32, 6]), ((128,), [32] * 4)):
        x = torch.randn(*shape, 256).bfloat16()
        assert torch.equal(quantised_gemm(x, weight), x[..., :24] * 2) and taken == sizes
        taken.clear()
    assert quantised_gemm(torch.randn(129, 256).bfloat16(), weight) is None


# On a GPU


def need_csrc() -> None:
    if not _custom_ops.available("cuda") or torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs csrc/ and a GPU with a copy engine")


def test_the_ring_is_chosen_where_it_is_as_fast():
    from benchmarks.kernels.skinny_gemm import chosen

    ring, wide, vector = Plan("ring", 110, 0), Plan("ring", 220, 99), Plan("vector")
    assert chosen({vector: 5.60, ring: 6.0, wide: 5.63}) == wide
    assert chosen({vector: 5.60, ring: 5.9}) == vector and chosen({vector: 1.0}) == vector
    assert chosen({vector: 6.0, ring: 5.0, Plan("quantised"): 4.0}) == Plan("quantised")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("K", [512, 2048, 4096])
def test_ring_matches_linear(K, dtype):
    need_csrc()
    for N, M in itertools.product((1, 8, 45, 1056, 12352), (1, 3, 8, 9, 16, 17, 32)):
        if not ring_fits(M, K, "plain"):
            continue
        x = torch.randn(M, K + 64, device="cuda").to(dtype)[:, 64:]
        weight = (torch.randn(N, K, device="cuda") * K**-0.5).to(dtype)
        for plan in (Plan("ring"), Plan("ring", 220, 99), Plan("ring", 99, 2)):
            out = torch.full((M, N), float("nan"), device="cuda", dtype=dtype)
            assert skinny_gemm_cuda(x, weight, out, plan) is out
            assert_close(out, skinny_gemm_torch(x, weight), TOLERANCE[dtype], f"{M} x {N}")
    odd = torch.randn(3, K + 1, device="cuda").to(dtype)[:, 1:]  # not aligned
    assert_close(skinny_gemm_cuda(odd, weight), skinny_gemm_torch(odd, weight), TOLERANCE[dtype])


def behind_norm(x: torch.Tensor) -> Unnormed:
    return Unnormed(x, (torch.randn(x.shape[-1]) * 0.3).to(x), 1e-6, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_in_front_and_an_add_behind(dtype):
    """In PyTorch: bit for bit what they are as steps of their own."""
    x, weight, total = torch.randn(2, 3, 64).to(dtype), torch.randn(8, 64).to(dtype), torch.randn(2, 3, 8).to(dtype)
    rows = behind_norm(x)
    y = skinny_gemm(normed(rows), weight)
    assert torch.equal(skinny_gemm(rows, weight), y) and torch.equal(skinny_gemm_torch(rows, weight), y)
    want = total + skinny_gemm(x, weight)
    skinny_gemm_add(x, weight, total)
    assert torch.equal(total, want)


@pytest.mark.parametrize("N,K", [(8, 64), (45, 320), (1030, 2048), (6, 12288)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_one_row_is_added_where_it_belongs(device, N, K, dtype):
    """Rounded before, so that it is what two kernels leave; and nothing beside it is touched."""
    x, weight = torch.randn(1, 1, K).to(device, dtype), (torch.randn(N, K) * K**-0.5).to(device, dtype)
    around = torch.randn(3, N).to(device, dtype)
    before, total = around.clone(), around[1:2].view(1, 1, N)
    skinny_gemm_add_triton(x, weight, total)
    want = before[1:2].view(1, 1, N).clone()
    skinny_gemm_add_torch(x, weight, want)
    assert_close(total, want, TOLERANCE[dtype])
    if dtype == torch.float16 or device == "cuda":  # the interpreter rounds to bfloat16 in its own way
        assert torch.equal(total, before[1:2].view(1, 1, N) + skinny_gemm_triton(x, weight))
    assert torch.equal(around[::2], before[::2])


def test_more_rows_are_not_added_in_one_kernel():
    with pytest.raises(ValueError, match="one row"):
        skinny_gemm_add_triton(torch.zeros(2, 64), torch.zeros(8, 64), torch.zeros(2, 8))


@pytest.mark.gpu
@pytest.mark.parametrize("K", [512, 2048, 4096])
def test_ring_folds(K):
    """The add is exact; a norm's scale may differ in its last bit, which turns few roundings of x."""
    need_csrc()
    for N, M in itertools.product((1, 8, 45, 1056, 12352), (1, 3, 8, 9, 16, 17, 32)):
        if not ring_fits(M, K, "plain"):
            continue
        x = (torch.randn(M, K + 64, device="cuda") * 3).bfloat16()[:, 64:]
        weight = (torch.randn(N, K, device="cuda") * K**-0.5).bfloat16()
        rows, before = behind_norm(x), torch.randn(M, N, device="cuda").bfloat16()
        for plan in (Plan("ring"), Plan("ring", 220, 99), Plan("ring", 99, 2)):
            out = torch.full((M, N), float("nan"), device="cuda", dtype=x.dtype)
            assert skinny_gemm_cuda(rows, weight, out, plan) is out
            alone = skinny_gemm_cuda(normed(rows), weight, plan=plan)
            assert_close(out, alone, 2**-7, f"norm, {M} x {N}")
            assert (out != alone).double().mean() <= max(0.02, 2 / out.numel()), f"norm, {M} x {N}"
            total = before.clone()
            skinny_gemm_add_cuda(x, weight, total, plan)
            assert torch.equal(total, before + skinny_gemm_cuda(x, weight, plan=plan)), f"add, {M} x {N}"


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 2, 8, 16])
def test_one_residual_in_a_chain(M):
    """Captured: each kernel reads the residual that the one before it has added to, and may start before that one ends."""
    need_csrc()
    wide = (torch.randn(12352, 2048, device="cuda") * 2048**-0.5).bfloat16()
    back = (torch.randn(2048, 4096, device="cuda") * 4096**-0.5).bfloat16()
    start, norm = torch.randn(M, 2048, device="cuda").bfloat16(), torch.randn(2048, device="cuda").bfloat16() * 0.3

    def step(settle=lambda: None):
        residual = start * 1.0
        for _ in range(6):
            settle()
            y = skinny_gemm_cuda(Unnormed(residual, norm, 1e-6, True), wide, plan=Plan("ring", 220, 99))
            settle()
            skinny_gemm_add_cuda(y[:, :4096], back, residual, Plan("ring", 220, 99))
        settle()
        return residual

    alone = step(torch.cuda.synchronize)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        residual = step()
    for _ in range(20):
        residual.fill_(float("nan"))
        graph.replay()
        assert torch.equal(residual, alone)


@pytest.mark.gpu
def test_what_folding_needs():
    need_csrc()
    x, weight = torch.randn(2, 2048, device="cuda").bfloat16(), torch.randn(8, 2048, device="cuda").bfloat16()
    with pytest.raises(RuntimeError, match="side by side"):
        skinny_gemm_cuda(Unnormed(x, torch.zeros(2048, device="cuda"), 1e-6, True), weight)
    with pytest.raises(RuntimeError, match="must be bfloat16"):
        skinny_gemm_add_cuda(x.half(), weight.half(), torch.zeros(2, 8, device="cuda").half())
    with pytest.raises(RuntimeError, match="out must be"):
        skinny_gemm_add_cuda(x, weight, torch.zeros(3, 8, device="cuda").bfloat16())


@pytest.mark.gpu
def test_a_row_does_not_depend_on_its_neighbours():
    need_csrc()
    x = torch.randn(16, 2048, device="cuda").bfloat16()
    weight = (torch.randn(12352, 2048, device="cuda") * 2048**-0.5).bfloat16()
    all_rows = skinny_gemm_cuda(x, weight)
    for M in (9, 12, 16):
        assert torch.equal(skinny_gemm_cuda(x[:M], weight), all_rows[:M])
    eight = skinny_gemm_cuda(x[:8], weight)
    for M in (1, 2, 5):
        assert torch.equal(skinny_gemm_cuda(x[:M], weight), eight[:M])
    assert_close(eight, all_rows[:8], 2**-7)


QUANTISED = ["int4", "int4 128", "int4 zero", "int8 row", "int8 32", "fp8 row", "fp8 128", "fp8 block", "fp4"]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "form", ["int4", "int4 128", "int4 zero", "int8 row", "int8 32", "int8 128", "fp8 row", "fp8 block", "fp4 nv"]
)
@pytest.mark.parametrize("K", [512, 2048, 5120])
def test_quantised_matches_its_definition(form, K):
    need_csrc()
    for N, M in itertools.product((1, 45, 12352), (1, 3, 8, 9, 17, 32)):
        weight = quantised(form, N, K)
        if not quantised_fits(M, K, weight.kind, weight.group) or weight.values.shape[0] != N:
            continue
        x = torch.randn(M, K, device="cuda").bfloat16()
        want = x.float() @ dense(weight).T
        for plan in (Plan("quantised"), Plan("quantised", 220, 99), Plan("quantised", 99, 2)):
            assert_close(quantised_gemm_cuda(x, weight, plan=plan), want, TOLERANCE[x.dtype], f"{M} x {N}")
    x = torch.randn(70, K, device="cuda").bfloat16()
    y = quantised_gemm(x, weight)
    assert y is None or assert_close(y, x.float() @ dense(weight).T, TOLERANCE[x.dtype]) is None


def quantised(form: str, N: int, K: int, scales: torch.dtype = torch.bfloat16) -> KernelWeight:
    from tests.kernels.experts import stored

    if form != "fp4":
        return stored((N, K), form, scales, "cuda")
    weight = stored((N, K), form, scales, "cpu")
    row_scale = weight.scale.amax(1) / 256
    scale = (weight.scale / row_scale[:, None]).to(torch.float8_e4m3fn)
    return KernelWeight("fp4", weight.values.cuda(), scale.cuda(), group=16, row_scale=row_scale.cuda())


def quantised_reference(weight: KernelWeight) -> torch.Tensor:
    from tests.quantised import kernel_weight_reference

    on_cpu = {n: t.cpu() for n, t in vars(weight).items() if isinstance(t, torch.Tensor)}
    return kernel_weight_reference(KernelWeight(**(vars(weight) | on_cpu))).cuda()


@pytest.mark.gpu
@pytest.mark.parametrize("scales", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("form", QUANTISED)
def test_quantised_matches_its_dense_weight(form, scales):
    need_csrc()
    for N, K in ((45, 2048), (264, 4096), (1024, 512), (128, 2048)):
        weight = quantised(form, N, K, scales)
        dense = quantised_reference(weight)
        for M in (1, 5, 8, 16, 20, 32):
            x = torch.randn(M, K, device="cuda").bfloat16()
            ring = ring_fits(M, K, weight.kind, weight.group) and reads(weight, K)
            want = x.double() @ dense.double().T
            for y in (skinny_gemm_cuda(x, weight) if ring else None, quantised_gemm(x, weight)):
                error = 0.0 if y is None else ((y.double() - want).norm() / want.norm()).item()
                assert error < 5e-3, f"{M} rows of [{N}, {K}]: off by {error:.2g}"


@pytest.mark.gpu
def test_fp8_and_fp4_read_every_number():
    """All bit patterns that are numbers, subnormal ones among them, come through exactly."""
    need_csrc()
    codes = torch.arange(256, dtype=torch.uint8, device="cuda")
    codes[[0x7F, 0xFF]] = 0  # NaN
    eye = torch.eye(16, 2048, device="cuda").bfloat16()
    fp8 = codes.view(16, 16).repeat(1, 128).view(torch.float8_e4m3fn)  # [16, 2048]
    weight = KernelWeight("fp8", fp8, torch.ones(16, 1, device="cuda"), group=2048)
    for form in (skinny_gemm_cuda, quantised_gemm_cuda):
        assert torch.equal(form(eye, weight).T, fp8[:, :16].bfloat16())
    ones = torch.ones(16, 128, device="cuda").to(torch.float8_e4m3fn)
    fp4 = KernelWeight("fp4", codes.view(16, 16).repeat(1, 64), ones, group=16)
    for form in (skinny_gemm_cuda, quantised_gemm_cuda):
        assert torch.equal(form(eye, fp4).T, quantised_reference(fp4)[:, :16].bfloat16())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_linear_layer(dtype):
    """Slices of rows, a bias, any number of rows and any shape of x."""
    with torch.device("cuda"):
        torch.set_default_dtype(dtype)
        try:
            layer = ReplicatedLinear(2048, 320, prefix="x", bias=True)
        finally:
            torch.set_default_dtype(torch.float32)
    layer.cuda()
    torch.nn.init.normal_(layer.weight, std=2048**-0.5)
    torch.nn.init.normal_(layer.bias)
    for shape in ((1,), (2, 3), (16,), (40,), (0,)):
        x = torch.randn(*shape, 2048, device="cuda").to(dtype)
        for rows in (slice(None), slice(64, 96), slice(1, 300)):
            want = F.linear(x.double(), layer.weight[rows].double(), layer.bias[rows].double())
            # rounded twice: the product, and with the bias
            assert_close(layer(x, rows), want, 2 * TOLERANCE[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 2, 5, 8, 16, 17, 32])
@pytest.mark.parametrize("form", ["planned", "triton", "ring"])
def test_real_sizes_in_a_chain(M, form):
    """Captured behind the kernels that make x, and before one that reads y: early launches must wait for both."""
    if form == "ring":
        need_csrc()
    forms = {"triton": skinny_gemm_triton, "ring": skinny_gemm_cuda}
    linear = forms.get(form, skinny_gemm)
    weight = (torch.randn(6144, 2048, device="cuda") * 2048**-0.5).bfloat16()
    back = (torch.randn(2048, 2048, device="cuda") * 2048**-0.5).bfloat16()
    start = torch.randn(M, 2048, device="cuda").bfloat16()

    def step(linear, settle=lambda: None):
        x = start * 2
        for _ in range(4):
            settle()
            wide = linear(x, weight)
            settle()
            x = linear(wide[:, :2048] * torch.sigmoid(wide[:, 2048:4096]) + wide[:, 4096:], back)
            settle()
            x = linear(x, back)
            settle()
            x = linear(x, back) + start
        return x

    alone = step(linear, torch.cuda.synchronize)
    want = step(F.linear)
    error = ((alone.float() - want.float()).norm() / want.float().norm()).item()
    assert error < 3e-2
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step(linear)
    for _ in range(20):
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, alone)
