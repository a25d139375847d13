import pytest
import torch

from tests.kernels.common import TOLERANCE, assert_close, slots
from vllm.model_executor.layers.fla.ops import (
    fused_recurrent_gated_delta_rule_packed_decode,
    fused_sigmoid_gating_delta_rule_update,
)
from vllm.model_executor.layers.fla.ops.packed_decode import (
    fused_recurrent_gated_delta_rule_packed_decode_torch,
    fused_recurrent_gated_delta_rule_packed_decode_triton,
    split_packed,
)


def make(B, Hk, Hv, K, V, dtype, state_dtype, device):
    projected = torch.randn(B, 2 * Hk * K + Hv * V + 2 * Hv + 5).to(device, dtype)
    mixed, b, a = projected[:, : -2 * Hv - 5], projected[:, -2 * Hv : -Hv], projected[:, -Hv:]
    A_log, dt_bias = torch.randn(Hv, device=device), torch.randn(Hv, device=device)
    return (mixed, a, b, A_log, dt_bias, None), torch.randn(B + 3, Hv, V, K).to(device, state_dtype)


@pytest.mark.parametrize("dtype,state_dtype", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("B,Hk,Hv,K,V", [(1, 1, 2, 128, 128), (4, 2, 2, 64, 64), (2, 1, 3, 32, 24)])
def test_matches_the_reference(device, B, Hk, Hv, K, V, dtype, state_dtype):
    args, pool = make(B, Hk, Hv, K, V, dtype, state_dtype, device)
    index = slots(B, B + 3, device, (B - 1,) if B > 1 else ())
    pools = pool.clone(), pool.clone()
    want, _ = fused_recurrent_gated_delta_rule_packed_decode_torch(*args, pools[0], None, index)
    out = torch.empty(B, 1, Hv, V, dtype=dtype, device=device)
    got, state = fused_recurrent_gated_delta_rule_packed_decode_triton(*args, pools[1], out, index)
    assert got is out and state is pools[1]
    assert_close(got, want, TOLERANCE[dtype], "o")
    assert_close(pools[1], pools[0], 1e-5, "pool")
    if B > 1:
        assert got[B - 1].abs().max() == 0


def test_equals_the_unpacked_form_exactly():
    B, Hk, Hv, K, V = 3, 1, 2, 32, 32
    (mixed, a, b, A_log, dt_bias, _), pool = make(B, Hk, Hv, K, V, torch.bfloat16, torch.float32, "cpu")
    index, other = torch.tensor([4, -1, 0]), pool.clone()
    q, k, v = (x[:, None] for x in split_packed(mixed, Hv, K, V))
    want, _ = fused_sigmoid_gating_delta_rule_update(
        A_log, a, b, dt_bias, q, k, v, initial_state=other, ssm_state_indices=index, use_qk_l2norm_in_kernel=True
    )
    got, _ = fused_recurrent_gated_delta_rule_packed_decode(mixed, a, b, A_log, dt_bias, None, pool, None, index)
    assert torch.equal(got, want) and torch.equal(pool, other)


def test_refuses_rows_that_do_not_split():
    with pytest.raises(ValueError, match="rows of 100"):
        split_packed(torch.zeros(2, 100), 2, 16, 16)
