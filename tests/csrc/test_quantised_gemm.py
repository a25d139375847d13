"""csrc/quantised_gemm.cu against PyTorch: on a GPU as it is, without one on the emulator."""

import ctypes
import itertools
from ctypes import c_int, c_int64, c_uint, c_void_p

import pytest
import torch

from tests.csrc.emulated.library import aligned, load, pointer
from tests.kernels.experts import stored
from vllm import _custom_ops as ops
from vllm.model_executor.layers.fused_moe.ops.weights import dense
from vllm.model_executor.layers.ops.skinny_gemm import reads_any_width
from vllm.model_executor.layers.quantization.base import KernelWeight

pytestmark = pytest.mark.xdist_group("quantised_gemm")  # compiled once, not in every process of the tests

SHORT, ANY, ROW, NONE = 0, 1, 2, -1  # Scaling of quantised_gemm.cuh
STAGES, FEW = 8, 4


class Problem(ctypes.Structure):
    _fields_ = [
        *((name, c_int) for name in ("M", "N", "row_bytes", "stages", "late")),
        *((name, c_int64) for name in ("x_row", "y_row")),
        *((name, c_void_p) for name in ("w", "scale", "zero", "row_scale")),
        *((name, c_uint) for name in ("w_row", "scale_row", "zero_row")),
        *((name, c_int) for name in ("scale_rows", "scale_type", "shared_chunks", "inverse", "inverse_shift")),
    ]


def emulated(
    x: torch.Tensor, w: KernelWeight, stages: int = FEW, blocks: int = 2, pad: int = 0
) -> tuple[torch.Tensor, int, int]:
    """y, how the scales came, and the sixteens of rows in a tile. pad: elements that rows of all are longer than wide."""
    (M, K), N = x.shape, w.values.shape[0]
    x, values, scale, zero = (None if t is None else strided(t, pad) for t in (x, w.values, w.scale, w.zero))
    y = aligned(torch.full((M, N + pad), torch.nan, dtype=torch.bfloat16))
    bits, kinds = int(w.kind[-1]), [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn]
    p = Problem(M, N, K * bits // 8, stages, late=1, x_row=x.stride(0), y_row=N + pad, scale_rows=w.scale_rows)
    p.w, p.scale, p.zero = values.data_ptr(), scale.data_ptr(), None if zero is None else zero.data_ptr()
    row_scale = None if w.row_scale is None else aligned(w.row_scale)
    p.row_scale = None if row_scale is None else row_scale.data_ptr()
    p.w_row = values.stride(0) * values.element_size()
    p.scale_row, p.scale_type = scale.stride(0) * scale.element_size(), kinds.index(scale.dtype) % 3
    p.zero_row = 0 if zero is None else zero.stride(0)
    form, tall = ["int4", "int8", "fp8", "fp4"].index(w.kind), c_int()
    way = load("quantised_gemm.cpp").quantised_gemm(
        pointer(y), pointer(x), ctypes.byref(p), form, c_int64(K), c_int64(w.group), blocks, ctypes.byref(tall)
    )
    assert torch.isnan(y[:, N:]).all()
    return y[:, :N], way, tall.value


def strided(rows: torch.Tensor, pad: int) -> torch.Tensor:
    wide = aligned(torch.empty(rows.shape[0], rows.shape[1] + pad, dtype=rows.dtype))
    wide.view(torch.uint8).fill_(0xFF)  # NaN
    return wide[:, : rows.shape[1]].copy_(rows)


def quantised_gemm_reference(x: torch.Tensor, w: KernelWeight) -> torch.Tensor:
    return x.float() @ dense(w).T


def on_gpu(x: torch.Tensor, w: KernelWeight) -> torch.Tensor:
    y = torch.full((x.shape[0], w.values.shape[0]), torch.nan, dtype=torch.bfloat16, device="cuda")
    ops.quantised_gemm(y, x, w.values, w.scale, w.zero, w.row_scale, w.kind, w.group, w.scale_rows, 110_000, 0)
    return y


def check(N: int, K: int, M: int, form: str, way: int, dtype: torch.dtype = torch.bfloat16, **how: int) -> None:
    gpu = torch.cuda.is_available()
    if gpu and (not ops.available("cuda") or torch.cuda.get_device_capability() < (9, 0)):
        pytest.skip("needs csrc/ and sm_90")
    device = "cuda" if gpu else "cpu"
    w = stored((N, K), form, dtype, device)
    x = torch.randn(M, K, device=device).bfloat16()
    if gpu:
        y = on_gpu(x, w)
    else:
        y, came, _ = emulated(x, w, **how)
        assert came == way
    expected = quantised_gemm_reference(x, w)
    assert torch.isfinite(y).all()
    error = (y.float() - expected).abs().max() / expected.abs().max()
    assert error < 5e-3, error.item()


@pytest.mark.parametrize(
    "form,K,way",
    [
        ("int4", 2048, SHORT),
        ("int4 zero", 2048, SHORT),
        ("int4 128", 2048, SHORT),
        ("int4 row", 256, SHORT),
        ("int8 32", 1024, SHORT),
        ("int8 128", 1024, SHORT),
        ("int8 row", 1024, ROW),
        ("fp8 block", 1024, SHORT),
        ("fp8 row", 1024, ROW),
        ("fp4 nv", 2048, SHORT),
    ],
)
def test_formats(form, K, way):
    check(40, K, 3, form, way)


@pytest.mark.parametrize("M", [1, 8, 9, 16, 17, 32])
@pytest.mark.parametrize("form,K", [("int4", 512), ("int8 row", 256), ("fp4 nv", 384)])
def test_rows_of_x(M, form, K):
    check(24, K, M, form, ROW if form == "int8 row" else SHORT)


@pytest.mark.parametrize(
    "form,K",
    [
        ("int4", 128),  # less than a chunk for each warp
        ("int4", 2560),
        ("int4 zero", 5120),  # too many chunks to keep x
        ("int4 128", 9216),
        ("int8 128", 1152),  # an odd number of scales: rows of them begin in the middle of a word
        ("int4 128", 640),
        ("fp8 block", 4352),
        ("int8 32", 2048),
        ("int8 32", 2112),  # an odd number of chunks
        ("fp8 128", 2176),
        ("fp4 nv", 128),
        ("fp4 nv", 1152),
        ("fp4 nv", 2176),
        ("fp4 nv", 5120),
    ],
)
@pytest.mark.parametrize("stages", [FEW, STAGES])
def test_columns(form, K, stages):
    check(16, K, 2, form, SHORT, stages=stages)


@pytest.mark.parametrize("N", [1, 15, 16, 17, 100])
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("form", ["int4", "fp4 nv"])
def test_rows_of_the_weight(form, N, blocks):
    check(N, 512, 2, form, SHORT, blocks=min(blocks, -(-N // 16)))


@pytest.mark.parametrize("stages", [FEW, STAGES])
@pytest.mark.parametrize(
    "form,K", [("int8 row", 2048), ("int4 zero", 2048), ("fp8 block", 1600), ("int4", 2176), ("fp4 nv", 2176)]
)
def test_rings(form, K, stages):
    """More chunks than stages, and tiles than a ring holds, with and without x in registers."""
    check(11 * 16, K, 1, form, ROW if form == "int8 row" else SHORT, stages=stages, blocks=1)


@pytest.mark.parametrize("M", [2, 8, 16, 32])
@pytest.mark.parametrize("N", [32, 90])
@pytest.mark.parametrize(
    "form,K", [("int4 zero", 2560), ("int4 128", 2176), ("int8 32", 2112), ("fp8 row", 2176), ("fp4 nv", 2176)]
)
def test_tall_tiles(form, K, N, M):
    """As soon as x is more than few bytes, if they are no more work."""
    if torch.cuda.is_available():
        return check(N, K, M, form, SHORT)
    w, x = stored((N, K), form, torch.bfloat16, "cpu"), torch.randn(M, K).bfloat16()
    y, _, tall = emulated(x, w, blocks=1)
    expected = quantised_gemm_reference(x, w)
    assert tall == 2 and (y.float() - expected).abs().max() / expected.abs().max() < 5e-3
    assert emulated(x, w, blocks=-(-N // 16))[2] == 1


@pytest.mark.parametrize("M", [1, 8, 9, 16])
@pytest.mark.parametrize("N", [1, 40, pytest.param(2800, marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    "form,K",
    [
        ("int4", 2048),
        ("int4", 640),
        ("int4 zero", 2048),
        ("int4 128", 1152),
        ("int8 32", 2048),
        ("int8 128", 1152),
        ("int8 row", 2048),
        ("fp8 block", 2048),
        ("fp8 block", 1600),
        ("fp8 row", 704),
        ("fp4 nv", 2048),
        ("fp4 nv", 384),
    ],
)
def test_one_tile_a_block_or_many(form, K, N, M):
    """The kernel that has W in registers before x is known, and the one that has all of a warp's x there."""
    if torch.cuda.is_available():
        return check(N, K, M, form, ANY)
    w, x = stored((N, K), form, torch.bfloat16, "cpu"), torch.randn(M, K).bfloat16()
    expected = quantised_gemm_reference(x, w)
    for blocks, stages in ((2 * -(-N // 16), FEW), (1, FEW), (1, STAGES)):
        y, _, tall = emulated(x, w, blocks=blocks, stages=stages)
        assert (tall == 0) == (blocks > 1) and (y.float() - expected).abs().max() / expected.abs().max() < 5e-3


@pytest.mark.parametrize("scale_rows", [1, 2, 3, 7, 45, 100])
def test_rows_that_share_scales(scale_rows):
    w = stored((45, 256), "fp8 128", torch.bfloat16, "cpu")
    w = KernelWeight("fp8", w.values, w.scale[: -(-45 // scale_rows)], None, w.group, scale_rows)
    x = torch.randn(2, 256).bfloat16()
    y = on_gpu(x.cuda(), moved(w)).cpu() if torch.cuda.is_available() else emulated(x, w)[0]
    expected = (
        x.float()
        @ (w.values.float() * w.scale.float().repeat_interleave(scale_rows, 0)[:45].repeat_interleave(128, 1)).T
    )
    assert (y.float() - expected).abs().max() / expected.abs().max() < 5e-3


@pytest.mark.parametrize(
    "form,K", [("int4", 640), ("int4 zero", 640), ("int8 32", 256), ("fp8 block", 640), ("fp4 nv", 640)]
)
def test_rows_in_wider_ones(form, K):
    if not torch.cuda.is_available():
        w, x = stored((40, K), form, torch.bfloat16, "cpu"), torch.randn(3, K).bfloat16()
        expected = quantised_gemm_reference(x, w)
        y, way, _ = emulated(x, w, pad=16)
        assert way == SHORT and (y.float() - expected).abs().max() / expected.abs().max() < 5e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("form", ["int4", "int4 128", "int4 zero", "int8 32", "int8 128", "fp8 block"])
def test_other_scales(form, dtype):
    check(16, 2048, 1, form, ANY, dtype)
    check(40, 640, 9, form, ANY, dtype)


def test_sums_of_one_sign():
    """What 128 in every int4 element adds goes away again."""
    w = stored((16, 1024), "int4", torch.bfloat16, "cpu")
    x = (torch.rand(2, 1024) + 1).bfloat16()
    expected = quantised_gemm_reference(x, w)
    y = on_gpu(x.cuda(), moved(w)).cpu() if (torch.cuda.is_available()) else emulated(x, w)[0]
    assert (y.float() - expected).abs().max() / expected.abs().max() < 5e-3


@pytest.mark.parametrize("form", ["fp8 row", "int8 row"])
def test_every_element(form):
    """Zeros, subnormals and the largest come through exactly, times x of any size."""
    codes = torch.arange(256, dtype=torch.uint8)
    if form == "fp8 row":
        codes[[0x7F, 0xFF]] = 0  # NaN
    values = codes.view(16, 16).repeat(1, 16).view(torch.float8_e4m3fn if form == "fp8 row" else torch.int32)
    w = KernelWeight(form[:-4], values, torch.ones(16, 1).bfloat16(), None, 256)
    for size in (2.0**-60, 1.0, 2.0**40):
        x = (torch.eye(16, 256) * size).bfloat16()
        y = on_gpu(x.cuda(), moved(w)).cpu() if torch.cuda.is_available() else emulated(x, w)[0]
        assert torch.equal(y, quantised_gemm_reference(x, w).bfloat16())


@pytest.mark.parametrize("K", [256, 2304])
def test_every_product_of_four_bits(K):
    """Every element times every scale, which bfloat16 holds, comes through exactly, times x of any size and a row's factor."""
    codes, scales = torch.arange(16, dtype=torch.uint8), torch.arange(256, dtype=torch.uint8)
    scales[[0x7F, 0xFF]] = 0  # NaN
    values = (codes[::2] | codes[1::2] << 4).repeat(16, K // 16)
    scales = scales.view(16, 16).repeat(1, K // 256).view(torch.float8_e4m3fn)
    for factor, sizes in ((None, (2.0**-100, 2.0**100)), (2.0 ** torch.arange(-8, 8), (1.0,))):
        w = KernelWeight("fp4", values, scales, None, 16, row_scale=factor)
        for M, size in itertools.product((8, 16, 32), sizes):
            first = K - 256 if M == 8 else 0  # the last columns too
            for i in range(first, first + 256, M):
                x = (torch.eye(K)[i : i + M] * size).bfloat16()
                y = on_gpu(x.cuda(), moved(w)).cpu() if torch.cuda.is_available() else emulated(x, w)[0]
                assert torch.equal(y, quantised_gemm_reference(x, w).bfloat16())


def moved(w: KernelWeight) -> KernelWeight:
    row_scale = None if w.row_scale is None else w.row_scale.cuda()
    return KernelWeight(w.kind, w.values.cuda(), w.scale.cuda(), None, w.group, w.scale_rows, row_scale)


def test_scales_beside_their_places():
    """Several scales of a row come in one piece, so a view that begins amid one is not read."""
    w = stored((16, 256), "int4", torch.bfloat16, "cpu")
    assert emulated(torch.zeros(1, 256).bfloat16(), w, pad=16)[1] == SHORT
    wide = KernelWeight("int4", w.values, torch.ones(16, 9).bfloat16()[:, :8], None, w.group)
    assert not reads_any_width(wide) and reads_any_width(w)
    w = stored((16, 256), "fp4 nv", torch.bfloat16, "cpu")
    wide = KernelWeight("fp4", w.values, strided(w.scale, 4), None, 16, 1, w.row_scale)
    assert not reads_any_width(wide) and reads_any_width(w)


@pytest.mark.parametrize("form", ["int4 64", "int8 16", "fp8 row"])
def test_groups_that_no_kernel_reads(form):
    w = stored((16, 384 if form == "fp8 row" else 256), form, torch.bfloat16, "cpu")
    if form == "fp8 row":  # groups that are not a power of two of chunks
        w = KernelWeight("fp8", w.values, torch.ones(16, 2).bfloat16(), None, 192)
    assert (
        emulated(
            torch.zeros(1, w.values.shape[1] * (8 if form == "int4 64" else 4 if "int8" in form else 1)).bfloat16(), w
        )[1]
        == NONE
    )
