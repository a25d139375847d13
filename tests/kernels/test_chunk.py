import pytest
import torch

from tests.kernels.common import assert_close, delta_inputs, slots, starts
from vllm.model_executor.layers.fla.ops import (
    CHUNK_SIZE,
    chunk_gated_delta_rule,
    naive_recurrent_gated_delta_rule,
    padded_chunk_lists,
    prepare_chunk_indices,
    prepare_chunk_offsets,
)
from vllm.model_executor.layers.fla.ops.chunk import (
    chunk_gated_delta_rule_torch,
    chunk_gated_delta_rule_triton,
    plan_chunk,
)

# bfloat16 products of up to 128 terms, rounded between the launches: measured below a third of this
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "lengths,Hk,Hv,K,V",
    [([1], 1, 1, 64, 64), ([5, 130, 0, 64, 1], 1, 2, 64, 64), ([70, 65], 1, 3, 32, 24), ([100], 1, 1, 128, 128)],
)
def test_matches_the_recurrence(device, lengths, Hk, Hv, K, V, dtype):
    T = sum(lengths) + 3  # three tokens belong to no sequence
    x = delta_inputs(1, T, Hk, Hv, K, V, dtype, device)
    state = torch.randn(len(lengths), Hv, V, K, device=device)
    args = {"initial_state": state, "cu_seqlens": starts(lengths, device), "use_qk_l2norm_in_kernel": True}
    before = state.clone()
    want, final = naive_recurrent_gated_delta_rule(**x, **args)
    got, states = chunk_gated_delta_rule_triton(**x, **args)
    assert got.dtype == dtype and states.dtype == torch.float32
    assert_close(got, want, TOLERANCE[dtype], "o")
    assert_close(states, final, TOLERANCE[dtype], "states")
    assert torch.equal(state, before) and got[:, T - 3 :].abs().max() == 0


def test_batch_rows_without_l2norm_or_state(device):
    x = delta_inputs(2, 66, 1, 2, 32, 32, torch.float32, device)
    x["k"] = torch.nn.functional.normalize(x["k"], dim=-1)
    want, final = naive_recurrent_gated_delta_rule(**x, scale=0.7)
    got, states = chunk_gated_delta_rule_triton(**x, scale=0.7)
    assert_close(got, want, 1e-5, "o")
    assert_close(states, final, 1e-5, "states")
    assert chunk_gated_delta_rule_triton(**x, output_final_state=False)[1] is None


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_states_in_a_pool(device, state_dtype):
    """Slots in random order, sequences that begin afresh, one of padding, one without tokens; views of packed rows as inputs."""
    lengths, Hk, Hv, K, V = [65, 3, 0, 70], 1, 2, 64, 64
    T = sum(lengths)
    x = delta_inputs(1, T, Hk, Hv, K, V, torch.float32, device)
    packed = torch.cat([x[name].flatten(2) for name in ("q", "k", "v")], dim=-1)
    q, k, v = packed.split([Hk * K, Hk * K, Hv * V], dim=-1)
    x |= {"q": q.unflatten(2, (Hk, K)), "k": k.unflatten(2, (Hk, K)), "v": v.unflatten(2, (Hv, V))}
    pool = torch.randn(7, Hv, V, K).to(device, state_dtype)
    index = slots(4, 7, device, (1,))
    args = {
        "cu_seqlens": starts(lengths, device),
        "use_qk_l2norm_in_kernel": True,
        "ssm_state_indices": index,
        "has_initial_state": torch.tensor([True, True, False, False], device=device),
    }
    pools = pool.clone(), pool.clone()
    want, _ = chunk_gated_delta_rule_torch(**x, initial_state=pools[0], **args)
    lists = {
        "chunk_indices": prepare_chunk_indices(args["cu_seqlens"]),
        "chunk_offsets": prepare_chunk_offsets(args["cu_seqlens"]),
    }
    got, written = chunk_gated_delta_rule_triton(**x, initial_state=pools[1], **lists, **args)
    assert written is pools[1] and got[:, 65:68].abs().max() == 0
    assert_close(got, want, 1e-5, "o")
    assert_close(pools[1], pools[0], 1e-5 if state_dtype == torch.float32 else 2**-8, "pool")
    idle = sorted(set(range(7)) - {index[0].item(), index[3].item()})
    assert torch.equal(pools[1][idle], pool[idle]) and torch.equal(pools[0][idle], pool[idle])


@pytest.mark.parametrize("same_keys", [True, False])
def test_hard_decays_and_repeated_keys(device, same_keys):
    """Equal keys, full writes and no decay make the triangular system as ill-conditioned as it gets; huge decays overflow exp(-G).

    With huge decays the exponents are differences of sums near -2500, where float32 values lie 2.4e-4 apart.
    """
    tolerance = 1e-5 if same_keys else 1e-4
    x = delta_inputs(1, 64, 1, 1, 32, 32, torch.float32, device)
    if same_keys:
        x["k"] = x["k"][:, :1].expand_as(x["k"]).contiguous()
        x["g"], x["beta"] = torch.zeros_like(x["g"]), torch.ones_like(x["beta"])
    else:
        x["g"] = x["g"] * 40
    want, final = naive_recurrent_gated_delta_rule(**x, use_qk_l2norm_in_kernel=True)
    for form in (chunk_gated_delta_rule_triton, chunk_gated_delta_rule_torch):
        got, states = form(**x, use_qk_l2norm_in_kernel=True)
        assert_close(got, want, tolerance, "o")
        assert_close(states, final, tolerance, "states")


def test_chunk_lists():
    cu = [0, 5, 135, 135, 199]
    assert prepare_chunk_indices(cu).tolist() == [[0, 0], [1, 0], [1, 1], [1, 2], [3, 0]]
    assert prepare_chunk_offsets(torch.tensor(cu)).tolist() == [0, 1, 4, 4, 5]
    assert prepare_chunk_indices([0]).shape == (0, 2)


@pytest.mark.parametrize("size", [16, 199, 256])
@pytest.mark.parametrize("lengths", [[0], [1], [16], [5, 130, 0, 64], [64, 64, 64], [65, 65, 65], [1] * 16, [0, 0, 0]])
def test_chunk_lists_of_lengths_that_only_the_device_knows(lengths, size):
    """The same, and behind them chunks without tokens, with room for the worst that as many sequences and tokens can be."""
    size = max(size, sum(lengths))
    cu = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    want = prepare_chunk_indices(cu).tolist()
    indices, offsets = padded_chunk_lists(torch.tensor(lengths), size)
    assert indices.dtype == offsets.dtype == torch.int32
    assert indices[: len(want)].tolist() == want and offsets.tolist() == prepare_chunk_offsets(cu).tolist()
    assert all(64 * chunk >= lengths[sequence] for sequence, chunk in indices[len(want) :].tolist())
    spread = min(len(lengths), size)  # each with one token in its last chunk
    assert len(indices) >= spread + (size - spread) // 64


def test_refuses_what_does_not_fit(device):
    x = delta_inputs(1, 4, 1, 1, 16, 16, torch.float32, device)
    with pytest.raises(ValueError, match=r"\[0, 9\]"):
        chunk_gated_delta_rule(**x, cu_seqlens=torch.tensor([0, 9]))
    with pytest.raises(ValueError, match="got 2 rows"):
        chunk_gated_delta_rule(
            **delta_inputs(2, 4, 1, 1, 16, 16, torch.float32, device), cu_seqlens=torch.tensor([0, 4])
        )
    with pytest.raises(ValueError, match="bfloat16"):
        chunk_gated_delta_rule_triton(**x | {"v": x["v"].bfloat16()})
    with pytest.raises(ValueError, match="pool they point into"):
        chunk_gated_delta_rule_triton(**x, ssm_state_indices=torch.zeros(1, dtype=torch.int32))


@pytest.mark.parametrize("heads", [1, 32, 4096])
@pytest.mark.parametrize("exact", [True, False])
def test_plan(heads, exact):
    for name, tile in plan_chunk(128, 96, heads, exact, 132).items():
        assert tile["BT"] == CHUNK_SIZE and tile["BK"] == 128 and 128 % tile["BV"] == 0, name


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[8192], [1, 63, 64, 65, 1000, 3000], [17] * 100])
def test_real_sizes(lengths):
    """bfloat16 against the same inputs in float32 on the GPU, by root mean square: outliers of one element say little here."""
    T = sum(lengths)
    x = delta_inputs(1, T, 16, 32, 128, 128, torch.bfloat16, "cuda")
    state = torch.randn(len(lengths), 32, 128, 128, device="cuda") * 0.1
    args = {"initial_state": state, "cu_seqlens": starts(lengths, "cuda"), "use_qk_l2norm_in_kernel": True}
    want, final = chunk_gated_delta_rule_torch(**{n: t.float() for n, t in x.items()}, **args)
    for dtype, bound in ((torch.bfloat16, 1e-2), (torch.float32, 1e-5)):
        typed = {n: t.to(dtype) if n in "qkv" else t for n, t in x.items()}
        got, states = chunk_gated_delta_rule_triton(**typed, **args)
        for a, b in ((got, want), (states, final)):
            error = ((a.float() - b).square().mean() / b.square().mean()).sqrt().item()
            assert error < bound, (dtype, error)
