import pytest
import torch

from tests.kernels.common import TOLERANCE, assert_close
from vllm.model_executor.layers.ops.silu_and_mul import silu_and_mul, silu_and_mul_torch, silu_and_mul_triton


@pytest.mark.parametrize("shape", [(1, 2), (3, 10), (37, 2 * 512), (2, 5, 2 * 1100), (1, 2 * 3072)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matches_the_reference(device, shape, dtype):
    x = (torch.randn(shape) * 4).to(device, dtype)
    got, want = silu_and_mul_triton(x), silu_and_mul_torch(x)
    assert got.shape == (*shape[:-1], shape[-1] // 2) and got.dtype == dtype
    assert_close(got, want, TOLERANCE[dtype])


def test_rows_that_lie_apart(device):
    x = torch.randn(7, 300, device=device)[:, 20:220]
    assert_close(silu_and_mul_triton(x), silu_and_mul_torch(x), 1e-6)


def test_far_from_zero(device):
    """exp overflows where silu is 0, and silu is the gate itself where it does not."""
    x = torch.tensor([[-200.0, -90.0, 0.0, 90.0, 2.0, 2.0, 2.0, 2.0]], device=device)
    assert silu_and_mul_triton(x).tolist() == [[0.0, 0.0, 0.0, 180.0]]


def test_nothing(device):
    assert silu_and_mul(torch.zeros(0, 8, device=device)).shape == (0, 4)


@pytest.mark.gpu
@pytest.mark.parametrize("T,I", [(1, 12288), (64, 17408), (4099, 3072)])
def test_real_sizes(T, I):
    x = torch.randn(T, 2 * I, device="cuda").bfloat16()
    got, want = silu_and_mul(x), silu_and_mul_torch(x)
    # a sum of one rounding step: exp may round otherwise
    assert (got.float() - want.float()).abs().max() <= 2 * TOLERANCE[x.dtype] * want.abs().max()
    assert (got != want).float().mean() < 1e-2
