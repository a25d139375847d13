"""csrc/layernorm.cu against a plain-PyTorch reference."""

import itertools

import pytest
import torch

from vllm import _custom_ops as ops

pytestmark = pytest.mark.gpu

EPS = 1e-6
# Tiny, q/k head, odd (tail path), one warp's worth and one more, real hidden sizes, longer than the registers hold.
HIDDEN = [1, 7, 64, 128, 256, 264, 1000, 2048, 2049, 4096, 5120, 16384, 33280]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 2e-6}


@pytest.fixture(scope="module", autouse=True)
def _library():
    if not ops.available("cuda"):
        pytest.skip("csrc/ is not built: pip install --no-build-isolation -e .")


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, plus_one: bool) -> torch.Tensor:
    wide = x.double()
    scale = weight.double() + (1.0 if plus_one else 0.0)
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS) * scale


def make(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").mul(3).to(dtype)


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.isfinite(actual).all()
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(hidden, dtype, seed):
    for rows, plus_one, wide in itertools.product([1, 3, 130], [False, True], [False, True]):
        x = make(rows, hidden, dtype=dtype)
        weight = make(hidden, dtype=torch.float32 if wide else dtype)
        out = torch.full_like(x, float("nan"))
        ops.rms_norm(out, x, weight, EPS, plus_one)
        assert_near(out, rms_norm_reference(x, weight, plus_one))


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_add_rms_norm(hidden, dtype, seed):
    for rows, plus_one, wide in itertools.product([1, 3, 130], [False, True], [False, True]):
        x, residual = make(rows, hidden, dtype=dtype), make(rows, hidden, dtype=dtype)
        weight = make(hidden, dtype=torch.float32 if wide else dtype)
        total = x + residual
        expected = rms_norm_reference(total, weight, plus_one)
        ops.fused_add_rms_norm(x, residual, weight, EPS, plus_one)
        assert torch.equal(residual, total)
        assert_near(x, expected)


def test_fused_equals_two_steps(seed):
    x, residual = make(9, 2048, dtype=torch.bfloat16), make(9, 2048, dtype=torch.bfloat16)
    weight = make(2048, dtype=torch.bfloat16)
    two_steps = torch.empty_like(x)
    ops.rms_norm(two_steps, x + residual, weight, EPS, True)
    ops.fused_add_rms_norm(x, residual, weight, EPS, True)
    assert torch.equal(x, two_steps)


def test_out_may_be_x(seed):
    for hidden in (128, 2048, 2049):
        x = make(5, hidden, dtype=torch.bfloat16)
        weight = make(hidden, dtype=torch.bfloat16)
        expected = rms_norm_reference(x, weight, False)
        ops.rms_norm(x, x, weight, EPS)
        assert_near(x, expected)


def test_views(seed):
    qkv = make(6, 12, 256, dtype=torch.bfloat16)
    weight = make(256, dtype=torch.bfloat16)
    shifted = make(6, 1032, dtype=torch.bfloat16)
    for x, w in [
        (qkv[:, 2:7], weight),  # heads inside a projection
        (qkv[:, 3], weight),
        (qkv[2:3, 1:4], weight),
        (shifted[:, 4:260], weight),  # 8 bytes off: the scalar kernel
        (shifted[:, 8:264], weight),
    ]:
        assert not x.is_contiguous() or x.shape[0] == 1
        out = torch.full(x.shape, float("nan"), device="cuda", dtype=x.dtype)
        ops.rms_norm(out, x, w, EPS)
        assert_near(out, rms_norm_reference(x, w, False))


def test_no_rows():
    x = torch.empty(0, 256, device="cuda")
    ops.rms_norm(torch.empty_like(x), x, torch.ones(256, device="cuda"), EPS)
    ops.fused_add_rms_norm(x, torch.empty_like(x), torch.ones(256, device="cuda"), EPS)
    torch.cuda.synchronize()


def test_graph_and_stream(seed):
    """Captured on a side stream, behind the kernels that make its inputs: programmatic launches must still wait for them."""
    x = make(64, 2048, dtype=torch.bfloat16)
    weight = make(2048, dtype=torch.bfloat16)
    h, residual = torch.empty_like(x), torch.empty_like(x)

    def step():
        h.copy_(x * 2)
        residual.copy_(x)
        for _ in range(8):
            ops.fused_add_rms_norm(h, residual, weight, EPS, False)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    stream.synchronize()
    eager = h.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(20):
        h.fill_(float("nan"))
        graph.replay()
        assert torch.equal(h, eager)


def test_compile(seed):
    @torch.compile(fullgraph=True)
    def normed(x, residual, weight):
        x = x * 2
        residual = residual + 1
        ops.fused_add_rms_norm(x, residual, weight, EPS, True)
        return x * 1, residual

    x, residual = make(4, 256, dtype=torch.float32), make(4, 256, dtype=torch.float32)
    weight = make(256, dtype=torch.float32)
    out, total = normed(x, residual, weight)
    torch.testing.assert_close(total, x * 2 + residual + 1)
    assert_near(out, rms_norm_reference(x * 2 + residual + 1, weight, True))


def test_bad_arguments_are_named():
    x = torch.zeros(2, 256, device="cuda")
    weight = torch.ones(256, device="cuda")
    for message, call in {
        "weight must be one contiguous vector of 256": lambda: ops.rms_norm(x.clone(), x, weight[:128], EPS),
        "weight must be on the device": lambda: ops.rms_norm(x.clone(), x, weight.cpu(), EPS),
        "weight must have the dtype": lambda: ops.rms_norm(x.clone(), x, weight.half(), EPS),
        "out must be contiguous": lambda: ops.rms_norm(x.half(), x, weight, EPS),
        "residual must be contiguous": lambda: ops.fused_add_rms_norm(x, x[:1].clone(), weight, EPS),
        "x must be bfloat16": lambda: ops.rms_norm(x.double(), x.double(), weight, EPS),
        "x must be contiguous, or": lambda: ops.rms_norm(
            torch.zeros(256, 2, device="cuda"), x.t(), torch.ones(2, device="cuda"), EPS
        ),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call()
