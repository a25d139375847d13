"""csrc/quantised_gemm.cu against PyTorch: on a GPU as it is, without one on the emulator."""

import ctypes
from ctypes import c_int, c_int64, c_void_p

import pytest
import torch

from tests.csrc.emulated.library import aligned, load, pointer
from tests.kernels.experts import stored
from vllm import _custom_ops as ops
from vllm.model_executor.layers.fused_moe.ops.weights import dense
from vllm.model_executor.layers.quantization.base import KernelWeight

SHORT, FLOAT, IN_PLACE, ROW, NONE = 0, 1, 2, 3, -1  # Scaling of quantised_gemm.cuh


class Problem(ctypes.Structure):
    _fields_ = [
        *((name, c_int) for name in ("M", "N", "row_bytes", "stages", "stage_bytes", "late")),
        *((name, c_int64) for name in ("x_row", "y_row")),
        *((name, c_void_p) for name in ("w", "scale", "zero")),
        *((name, c_int64) for name in ("w_row", "scale_row", "zero_row")),
        *((name, c_int) for name in ("scale_rows", "scale_type", "shared_chunks", "scale_pitch", "zero_pitch")),
    ]


def emulated(x: torch.Tensor, w: KernelWeight, stages: int = 3, blocks: int = 2) -> tuple[torch.Tensor, int]:
    """y and how the scales came."""
    (M, K), N = x.shape, w.values.shape[0]
    x, values, scale = aligned(x), aligned(w.values), aligned(w.scale)
    zero = None if w.zero is None else aligned(w.zero)
    y = aligned(torch.full((M, N), torch.nan, dtype=torch.bfloat16))
    bits, kinds = {"int4": 4, "int8": 8, "fp8": 8}[w.kind], [torch.bfloat16, torch.float16, torch.float32]
    p = Problem(M, N, K * bits // 8, late=1, x_row=K, y_row=N, w_row=K * bits // 8, scale_rows=w.scale_rows)
    p.w, p.scale, p.zero = values.data_ptr(), scale.data_ptr(), None if zero is None else zero.data_ptr()
    p.scale_row, p.scale_type = scale.stride(0) * scale.element_size(), kinds.index(scale.dtype)
    p.zero_row = 0 if zero is None else zero.stride(0)
    form = ["int4", "int8", "fp8"].index(w.kind)
    columns, group = c_int64(K), c_int64(w.group)
    way = load("quantised_gemm.cpp").quantised_gemm(
        pointer(y), pointer(x), ctypes.byref(p), form, columns, group, stages, blocks
    )
    return y, way


def quantised_gemm_reference(x: torch.Tensor, w: KernelWeight) -> torch.Tensor:
    return x.float() @ dense(w).T


def on_gpu(x: torch.Tensor, w: KernelWeight) -> torch.Tensor:
    y = torch.full((x.shape[0], w.values.shape[0]), torch.nan, dtype=torch.bfloat16, device="cuda")
    ops.quantised_gemm(y, x, w.values, w.scale, w.zero, w.kind, w.group, w.scale_rows, 110_000, 0)
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
        y, came = emulated(x, w, **how)
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
        ("int4 row", 256, IN_PLACE),
        ("int8 32", 1024, IN_PLACE),
        ("int8 128", 1024, SHORT),
        ("int8 row", 1024, ROW),
        ("fp8 block", 1024, SHORT),
        ("fp8 row", 1024, ROW),
    ],
)
def test_formats(form, K, way):
    check(40, K, 3, form, way)


@pytest.mark.parametrize("M", [1, 8, 9, 16, 17, 32])
@pytest.mark.parametrize("form,K", [("int4", 512), ("int8 row", 256)])
def test_rows_of_x(M, form, K):
    check(24, K, M, form, SHORT if form == "int4" else ROW)


@pytest.mark.parametrize(
    "form,K,way",
    [
        ("int4", 128, IN_PLACE),  # less than a warp each; four scales are no piece of 16 bytes
        ("int4", 2560, SHORT),
        ("int4 128", 2560, IN_PLACE),
        ("int4 zero", 5120, SHORT),  # too many chunks to keep x
        ("int4 128", 9216, SHORT),
        ("int8 128", 1152, IN_PLACE),  # a panel of one scale
        ("fp8 block", 4352, IN_PLACE),
        ("int8 32", 2048, IN_PLACE),
    ],
)
def test_columns(form, K, way):
    check(16, K, 2, form, way)


@pytest.mark.parametrize("N", [1, 15, 16, 17, 100])
@pytest.mark.parametrize("blocks", [1, 3])
def test_rows_of_the_weight(N, blocks):
    check(N, 512, 2, "int4", SHORT, blocks=min(blocks, -(-N // 16)))


@pytest.mark.parametrize("stages", [2, 5])
def test_stages(stages):
    check(80, 2048, 1, "int8 row", ROW, stages=stages)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("form", ["int4", "int4 128", "int8 128", "fp8 block"])
def test_other_scales(form, dtype):
    check(16, 2048, 1, form, FLOAT if dtype == torch.float32 and "int4" not in form else IN_PLACE, dtype)


def test_sums_of_one_sign():
    """What 128 in every int4 element adds goes away again."""
    w = stored((16, 1024), "int4", torch.bfloat16, "cpu")
    x = (torch.rand(2, 1024) + 1).bfloat16()
    expected = quantised_gemm_reference(x, w)
    y = (
        on_gpu(x.cuda(), KernelWeight("int4", w.values.cuda(), w.scale.cuda(), None, w.group)).cpu()
        if (torch.cuda.is_available())
        else emulated(x, w)[0]
    )
    assert (y.float() - expected).abs().max() / expected.abs().max() < 5e-3


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
