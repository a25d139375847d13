import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.common import assert_close, delta_inputs, starts
from vllm.model_executor.layers.fla.ops import (
    chunk_gated_delta_rule,
    fused_recurrent_gated_delta_rule,
    naive_chunk_gated_delta_rule,
    naive_recurrent_gated_delta_rule,
)


def test_recurrence_by_hand():
    """One head, K = V = 1: S = 0.5 * 2 + k * d with d = beta * (v - k * 0.5 * 2)."""
    one = lambda x: torch.full((1, 1, 1, 1), x)
    gate = lambda x: torch.full((1, 1, 1), x)
    o, state = naive_recurrent_gated_delta_rule(
        one(3.0), one(2.0), one(7.0), gate(0.5).log(), gate(0.25), scale=1.0, initial_state=one(2.0)
    )
    want = 1.0 + 2.0 * 0.25 * (7.0 - 2.0)
    assert_close(state, one(want), 1e-6)
    assert_close(o, one(3.0 * want), 1e-6)


@pytest.mark.parametrize("lengths", [[1], [64, 128], [5, 130, 0, 63, 65], [200]])
@pytest.mark.parametrize("Hk,Hv", [(1, 1), (2, 4), (1, 3)])
def test_chunks_equal_the_recurrence(lengths, Hk, Hv):
    x = delta_inputs(1, sum(lengths) + 2, Hk, Hv, 16, 24, torch.float64, "cpu")
    x |= {"g": x["g"].double(), "beta": x["beta"].double()}
    state = torch.randn(len(lengths), Hv, 24, 16, dtype=torch.float64)
    args = {"initial_state": state, "cu_seqlens": starts(lengths, "cpu"), "use_qk_l2norm_in_kernel": True}
    for got, want in zip(naive_chunk_gated_delta_rule(**x, **args), naive_recurrent_gated_delta_rule(**x, **args)):
        assert_close(got, want, 1e-12)


@settings(deadline=None, max_examples=25)
@given(cut=st.integers(1, 149), decode=st.integers(0, 3))
def test_prefill_cut_anywhere_then_decoding_equals_one_pass(cut, decode):
    torch.manual_seed(cut)
    T = 150
    x = delta_inputs(1, T, 2, 4, 16, 16, torch.float32, "cpu")
    want, final = naive_recurrent_gated_delta_rule(**x, use_qk_l2norm_in_kernel=True)
    pool = torch.randn(3, 4, 16, 16)
    pieces = [(0, cut), (cut, max(cut, T - decode))] + [(t, t + 1) for t in range(max(cut, T - decode), T)]
    outputs = []
    for a, b in pieces:
        piece = {name: value[:, a:b] for name, value in x.items()}
        if a < max(cut, T - decode):
            o, _ = chunk_gated_delta_rule(
                **piece,
                initial_state=pool,
                cu_seqlens=torch.tensor([0, b - a]),
                use_qk_l2norm_in_kernel=True,
                ssm_state_indices=torch.tensor([2]),
                has_initial_state=torch.tensor([a > 0]),
            )
        elif b > a:
            o, _ = fused_recurrent_gated_delta_rule(
                **piece, initial_state=pool, ssm_state_indices=torch.tensor([2]), use_qk_l2norm_in_kernel=True
            )
        outputs.append(o if b > a else o[:, :0])
    assert_close(torch.cat(outputs, 1), want, 1e-5)
    assert_close(pool[2:], final, 1e-5)


def test_equals_transformers():
    modeling = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    x = delta_inputs(2, 100, 2, 2, 32, 32, torch.float32, "cpu")
    for name, form in (
        ("torch_chunk_gated_delta_rule", naive_chunk_gated_delta_rule),
        ("torch_recurrent_gated_delta_rule", naive_recurrent_gated_delta_rule),
    ):
        theirs = getattr(modeling, name)
        want, final = theirs(*x.values(), initial_state=None, output_final_state=True, use_qk_l2norm_in_kernel=True)
        got, state = form(**x, use_qk_l2norm_in_kernel=True)
        assert_close(got, want, 1e-5, name)
        assert_close(state, final.transpose(-1, -2), 1e-5, name)
