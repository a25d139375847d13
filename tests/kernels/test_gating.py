import pytest
import torch

from tests.kernels.common import assert_close
from vllm.model_executor.layers.fla.ops.gating import fused_gdn_gating, fused_gdn_gating_torch, fused_gdn_gating_triton


@pytest.mark.parametrize("T,H", [(1, 32), (37, 12), (65, 1), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_the_reference(device, T, H, dtype):
    # a and b are views of one projection, as in the layer; values on both sides of softplus's threshold
    both = (torch.randn(T, 2 * H + 3) * 15).to(device, dtype)
    a, b = both[:, :H], both[:, H : 2 * H]
    A_log, dt_bias = torch.randn(H, device=device), torch.randn(H, device=device).to(dtype)
    got, want = fused_gdn_gating_triton(A_log, a, b, dt_bias), fused_gdn_gating_torch(A_log, a, b, dt_bias)
    for x, y, name in zip(got, want, ("g", "beta")):
        assert x.shape == (1, T, H) and x.dtype == torch.float32
        assert_close(x, y, 1e-5, name)


def test_softplus_is_linear_above_its_threshold():
    one = torch.ones(1)
    g, beta = fused_gdn_gating(torch.zeros(1), torch.tensor([[60.0]]), torch.tensor([[0.0]]), one)
    assert g.item() == -61.0 and beta.item() == 0.5


def test_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        fused_gdn_gating(torch.zeros(3), torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(3))
