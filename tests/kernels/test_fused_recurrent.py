import pytest
import torch

from tests.kernels.common import TOLERANCE, assert_close, delta_inputs, slots, starts
from vllm.model_executor.layers.fla.ops import naive_recurrent_gated_delta_rule
from vllm.model_executor.layers.fla.ops.fused_recurrent import (
    fused_recurrent_gated_delta_rule,
    fused_recurrent_gated_delta_rule_torch,
    fused_recurrent_gated_delta_rule_triton,
    plan_recurrent,
)
from vllm.model_executor.layers.fla.ops.fused_sigmoid_gating import (
    fused_sigmoid_gating_delta_rule_update_torch,
    fused_sigmoid_gating_delta_rule_update_triton,
)

# a bfloat16 state carries its own rounding, once a step
STATE_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-8}


def compare(torch_form, triton_form, pool, dtype, *args):
    pools = pool.clone(), pool.clone()
    want, kept = torch_form(*args[0], pools[0], *args[1:])
    got, written = triton_form(*args[0], pools[1], *args[1:])
    assert_close(got, want, TOLERANCE[dtype], "o")
    assert_close(written, kept, STATE_TOLERANCE[pool.dtype], "states")
    assert_close(pools[1], pools[0], STATE_TOLERANCE[pool.dtype], "pool")
    return got, written, pools[1]


@pytest.mark.parametrize("ratio", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype,state_dtype", [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_one_token_a_row(device, ratio, dtype, state_dtype):
    B, Hk, K, V = 3, 2 if ratio < 3 else 1, 64, 64
    x = delta_inputs(B, 1, Hk, Hk * ratio, K, V, dtype, device)
    pool = torch.randn(B + 2, Hk * ratio, V, K).to(device, state_dtype)
    index = slots(B, B + 2, device, (1,))
    inputs = (*x.values(), None)
    forms = fused_recurrent_gated_delta_rule_torch, fused_recurrent_gated_delta_rule_triton
    got, _, after = compare(*forms, pool, dtype, inputs, True, None, index, None, True)
    assert got[1].abs().max() == 0
    untouched = sorted(set(range(B + 2)) - set(index.tolist()))
    assert torch.equal(after[untouched], pool[untouched])


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("K,V", [(128, 128), (32, 48)])
def test_sequences_of_several_tokens(device, inplace, K, V):
    lengths = [3, 0, 1, 4]
    x = delta_inputs(1, sum(lengths) + 2, 1, 2, K, V, torch.float32, device)
    pool = torch.randn(6, 2, V, K, device=device)
    args = (inplace, starts(lengths, device), slots(4, 6, device, (2,)), None, False)
    forms = fused_recurrent_gated_delta_rule_torch, fused_recurrent_gated_delta_rule_triton
    got, states, after = compare(*forms, pool, torch.float32, (*x.values(), 0.3), *args)
    assert got[:, sum(lengths) :].abs().max() == 0
    assert states.shape[0] == (6 if inplace else 4)
    if not inplace:
        assert torch.equal(after, pool)


def test_without_a_state(device):
    x = delta_inputs(2, 3, 1, 1, 64, 64, torch.float32, device)
    want, final = naive_recurrent_gated_delta_rule(**x, use_qk_l2norm_in_kernel=True)
    for form in (fused_recurrent_gated_delta_rule_triton, fused_recurrent_gated_delta_rule_torch):
        got, states = form(**x, use_qk_l2norm_in_kernel=True)
        assert_close(got, want, 1e-5, "o")
        assert_close(states, final, 1e-5, "states")


def test_a_state_for_every_draft_token(device):
    """Sequence n starts at the slot of its last accepted token and leaves one state a token."""
    lengths, accepted = [3, 2, 3], torch.tensor([2, 1, 3], dtype=torch.int32, device=device)
    x = delta_inputs(1, 8, 1, 2, 64, 64, torch.float32, device)
    pool = torch.randn(10, 2, 64, 64, device=device)
    table = torch.randperm(10)[:9].view(3, 3).to(torch.int32).to(device)
    table[1, :] = -1
    args = (True, starts(lengths, device), table, accepted, True)
    forms = fused_recurrent_gated_delta_rule_torch, fused_recurrent_gated_delta_rule_triton
    got, _, after = compare(*forms, pool, torch.float32, (*x.values(), None), *args)
    assert got[:, 3:5].abs().max() == 0
    for n, rows in ((0, slice(0, 3)), (2, slice(5, 8))):
        state = pool[table[n, accepted[n] - 1].item()][None]
        for t in range(3):
            piece = {name: value[:, rows][:, : t + 1] for name, value in x.items()}
            _, want = naive_recurrent_gated_delta_rule(**piece, initial_state=state, use_qk_l2norm_in_kernel=True)
            assert_close(after[table[n, t].item()], want[0], 1e-5, f"sequence {n} after token {t}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gating_in_the_kernel(device, dtype):
    lengths, Hk, Hv, K, V = [1, 2, 1], 1, 2, 64, 64
    x = delta_inputs(1, 4, Hk, Hv, K, V, dtype, device)
    a, b = (torch.randn(4, Hv).to(device, dtype) * 10 for _ in range(2))
    A_log, dt_bias = torch.randn(Hv, device=device), torch.randn(Hv, device=device).to(dtype)
    pool = torch.randn(5, Hv, V, K, device=device)
    inputs = (A_log, a, b, dt_bias, x["q"], x["k"], x["v"], 1.0, 20.0, None)
    args = (True, starts(lengths, device), slots(3, 5, device, (2,)), None, True)
    forms = fused_sigmoid_gating_delta_rule_update_torch, fused_sigmoid_gating_delta_rule_update_triton
    compare(*forms, pool, dtype, inputs, *args)


def test_refuses_what_does_not_fit():
    x = delta_inputs(1, 2, 2, 2, 16, 16, torch.float32, "cpu")
    with pytest.raises(ValueError, match="Hv=2, V=16, K=16"):
        fused_recurrent_gated_delta_rule(**x, initial_state=torch.zeros(2, 2, 16, 8))
    with pytest.raises(ValueError, match="float16"):
        fused_recurrent_gated_delta_rule(**x, initial_state=torch.zeros(2, 2, 16, 16).half())
    with pytest.raises(ValueError, match=r"multiple of 2, got \(1, 2, 3, 16\)"):
        fused_recurrent_gated_delta_rule(**x | {"v": torch.zeros(1, 2, 3, 16)})
    with pytest.raises(ValueError, match=r"\[0, 2, 9\]"):
        fused_recurrent_gated_delta_rule(**x, cu_seqlens=torch.tensor([0, 2, 9]))


@pytest.mark.parametrize("heads", [1, 32, 1000, 100_000])
@pytest.mark.parametrize("K,V", [(128, 128), (64, 64), (32, 48), (16, 4)])
def test_plan(heads, K, V):
    plan = plan_recurrent(heads, K, V, 132)
    assert plan["BK"] >= K and plan["BV"] & (plan["BV"] - 1) == 0
