import pytest
import torch

from tests.kernels.common import assert_close
from vllm.model_executor.layers.fla.ops.layernorm_guard import (
    rmsnorm_fn,
    rmsnorm_gated,
    rmsnorm_gated_torch,
    rmsnorm_gated_triton,
)


@pytest.mark.parametrize("shape", [(5, 3, 128), (17, 64), (2, 1, 4, 40), (0, 2, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["silu", "sigmoid", None])
def test_matches_the_reference(device, shape, dtype, activation):
    x, z = (torch.randn(shape).to(device, dtype) * 4 for _ in range(2))
    weight = torch.randn(shape[-1], device=device)
    args = (x, weight, None if activation is None else z, 1e-6, activation or "silu")
    got = rmsnorm_gated_triton(*args)
    assert got.dtype == dtype and got.shape == x.shape
    assert_close(got, rmsnorm_gated_torch(*args), 1e-5 if dtype == torch.float32 else 2**-7)


def test_gate_may_be_a_view_of_the_projection(device):
    projected = torch.randn(9, 300, device=device)
    x, z = torch.randn(9, 2, 64, device=device), projected[:, 100:228].unflatten(1, (2, 64))
    assert not z.is_contiguous()
    assert_close(
        rmsnorm_gated_triton(x, torch.ones(64, device=device), z),
        rmsnorm_gated_torch(x, torch.ones(64, device=device), z),
        1e-5,
    )


def test_against_the_formula():
    x, z, w = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8)
    want = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w * torch.nn.functional.silu(z)
    assert_close(rmsnorm_fn(x, w, None, z), want, 1e-6)


def test_refuses_what_it_does_not_do():
    x = torch.randn(3, 8)
    with pytest.raises(ValueError, match="group_size=4"):
        rmsnorm_fn(x, torch.ones(8), group_size=4)
    with pytest.raises(ValueError, match="tanh"):
        rmsnorm_gated(x, torch.ones(8), x, activation="tanh")
    with pytest.raises(ValueError, match=r"\[8\], got \(4,\)"):
        rmsnorm_gated(x, torch.ones(4), x)
