import pytest
import torch

from tests.kernels.common import assert_close
from vllm.model_executor.layers.fla.ops.l2norm import l2norm_fwd, l2norm_fwd_torch, l2norm_fwd_triton


@pytest.mark.parametrize("shape", [(3, 5, 128), (7, 64), (1, 33), (0, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_the_reference(device, shape, dtype):
    x = torch.randn(shape).to(device, dtype) * 3
    got = l2norm_fwd_triton(x)
    assert got.dtype == dtype
    assert_close(got, l2norm_fwd_torch(x), 1e-6 if dtype == torch.float32 else 2**-7)


def test_strided_rows_other_dtypes_and_zeros(device):
    x = torch.randn(6, 200, device=device).bfloat16()[:, 4:68].unflatten(1, (2, 32))
    x[0] = 0
    got = l2norm_fwd_triton(x, output_dtype=torch.float32)
    assert got.dtype == torch.float32 and got[0].abs().max() == 0
    assert_close(got, l2norm_fwd_torch(x, output_dtype=torch.float32), 1e-6)


def test_unit_length():
    y = l2norm_fwd(torch.randn(4, 128))
    assert_close(y.norm(dim=-1), torch.ones(4), 1e-5)
