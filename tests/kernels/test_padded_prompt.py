"""Prompts padded to a fixed number of tokens, their true lengths on the device alone: every kernel on their way gives the real tokens what the
reference gives the prompts by themselves, though all that is nobody's is NaN.

Attention is in test_attention_prefill.py.
"""

import pytest
import torch

from tests.kernels.common import TOLERANCE, assert_close, delta_inputs, starts
from tests.kernels.experts import layer
from vllm.model_executor.layers.fla.ops import padded_chunk_lists
from vllm.model_executor.layers.fla.ops.chunk import chunk_gated_delta_rule_torch, chunk_gated_delta_rule_triton
from vllm.model_executor.layers.fla.ops.gating import fused_gdn_gating_torch, fused_gdn_gating_triton
from vllm.model_executor.layers.fla.ops.layernorm_guard import rmsnorm_gated_torch, rmsnorm_gated_triton
from vllm.model_executor.layers.fused_moe.ops import grouped
from vllm.model_executor.layers.fused_moe.ops.front import by_planes_torch, front_torch, front_triton
from vllm.model_executor.layers.fused_moe.ops.route import route_torch, route_triton
from vllm.model_executor.layers.fused_moe.ops.weights import PLANES
from vllm.model_executor.layers.mamba.ops.causal_conv1d import causal_conv1d_fn_torch, causal_conv1d_fn_triton

NAN = float("nan")
SIZES = [(1, 16), (15, 16), (16, 16), (17, 64), (63, 64), (64, 128), (65, 128), (127, 192)]
"""(tokens, padded to)"""


def pad(x: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """x with rows of NaN behind it along `dim`."""
    shape = list(x.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([x, x.new_full(shape, NAN)], dim)


def pools_of(state: torch.Tensor, goes_on: bool) -> list[torch.Tensor]:
    """Two pools in which slot 2 is the sequence's; a fresh sequence's state is NaN like everyone else's."""
    pool = torch.full((4, *state.shape), NAN, device=state.device)
    if goes_on:
        pool[2] = state
    return [pool, pool.clone()]


def sequence(device: str, length: int, goes_on: bool) -> dict[str, torch.Tensor]:
    slot, flag = torch.tensor([2], dtype=torch.int32, device=device), torch.tensor([goes_on], device=device)
    return {"slot": slot, "flag": flag, "starts": starts([length], device)}


def chunk_lists(starts: torch.Tensor, size: int) -> dict[str, torch.Tensor]:
    return dict(zip(("chunk_indices", "chunk_offsets"), padded_chunk_lists(starts.diff(), size)))


@pytest.mark.parametrize("goes_on", [False, True])
@pytest.mark.parametrize("length,size", SIZES)
def test_convolution(device, length, size, goes_on):
    dim = 40
    x, weight = torch.randn(length, dim, device=device), torch.randn(4, dim, device=device).T
    pools, s = pools_of(torch.randn(dim, 3, device=device), goes_on), sequence(device, length, goes_on)
    args = s["starts"], s["slot"], s["flag"], "silu"
    want = causal_conv1d_fn_torch(x.T, weight, None, pools[0], *args)
    got = causal_conv1d_fn_triton(pad(x, 0, size).T, weight, None, pools[1], *args)
    assert_close(got[:, :length], want, 1e-5)
    assert got[:, length:].abs().sum() == 0
    assert torch.equal(pools[0][2], pools[1][2]) and pools[1][[0, 1, 3]].isnan().all()


@pytest.mark.parametrize("goes_on", [False, True])
@pytest.mark.parametrize("length,size", SIZES)
def test_delta_rule(device, length, size, goes_on):
    """With as many chunks as the padded prompt may have."""
    Hk, Hv, K, V = 1, 2, 32, 32
    x = delta_inputs(1, length, Hk, Hv, K, V, torch.float32, device)
    pools, s = pools_of(torch.randn(Hv, V, K, device=device), goes_on), sequence(device, length, goes_on)
    args = {
        "cu_seqlens": s["starts"],
        "ssm_state_indices": s["slot"],
        "has_initial_state": s["flag"],
        "use_qk_l2norm_in_kernel": True,
    }
    lists = chunk_lists(s["starts"], size)
    want, _ = chunk_gated_delta_rule_torch(**x, initial_state=pools[0], **args)
    padded = {name: pad(t, 1, size) for name, t in x.items()}
    got, _ = chunk_gated_delta_rule_triton(**padded, initial_state=pools[1], **args, **lists)
    assert_close(got[:, :length], want, 1e-5, "o")
    assert got[:, length:].abs().sum() == 0
    assert_close(pools[1][2], pools[0][2], 1e-5, "state")
    assert pools[1][[0, 1, 3]].isnan().all()


@pytest.mark.parametrize(
    "lengths,size", [([3, 65, 0], 128), ([64, 1, 63, 0, 0], 128), ([1, 1, 1], 16), ([130, 62], 192)]
)
def test_several_prompts(device, lengths, size):
    """Some go on from a state, and there may be room for more than there are, which is nobody's."""
    Hk, Hv, K, V, dim, N, T = 1, 2, 32, 32, 40, len(lengths), sum(lengths)
    own = [i for i, n in enumerate(lengths) if n]
    place = torch.tensor([2 * i + 1 if n else -1 for i, n in enumerate(lengths)], dtype=torch.int32, device=device)
    flags = torch.tensor([n > 1 for n in lengths], device=device)
    used, others = [2 * i + 1 for i in own], [i for i in range(2 * N + 1) if i % 2 == 0 or not lengths[i // 2]]

    def pools(*shape):
        pool = torch.full((2 * N + 1, *shape), NAN, device=device)
        for i in own:
            if lengths[i] > 1:
                pool[2 * i + 1] = torch.randn(shape, device=device)
        return pool, pool.clone()

    def check(got, want, pools, tolerance):
        assert_close(got[:T], want, tolerance)
        assert got[T:].abs().sum() == 0
        assert_close(pools[1][used], pools[0][used], tolerance, "state")
        assert pools[1][others].isnan().all()

    windows, states = pools(dim, 3), pools(Hv, V, K)
    inputs, weight = torch.randn(T, dim, device=device), torch.randn(4, dim, device=device).T
    args = starts(lengths, device), place, flags, "silu"
    want = causal_conv1d_fn_torch(inputs.T, weight, None, windows[0], *args)
    got = causal_conv1d_fn_triton(pad(inputs, 0, size).T, weight, None, windows[1], *args)
    check(got.T, want.T, windows, 1e-5)

    x = delta_inputs(1, T, Hk, Hv, K, V, torch.float32, device)
    args = {
        "cu_seqlens": starts(lengths, device),
        "ssm_state_indices": place,
        "has_initial_state": flags,
        "use_qk_l2norm_in_kernel": True,
    }
    want, _ = chunk_gated_delta_rule_torch(**x, initial_state=states[0], **args)
    padded = {name: pad(t, 1, size) for name, t in x.items()}
    lists = chunk_lists(args["cu_seqlens"], size)
    got, _ = chunk_gated_delta_rule_triton(**padded, initial_state=states[1], **args, **lists)
    check(got[0], want[0], states, 1e-5)


def test_nobodys_prompt(device):
    """What a graph is captured over: no tokens, no slot. Nothing is read or written."""
    Hk, Hv, K, V, size = 1, 2, 32, 32, 64
    x = {n: pad(t[:, :0], 1, size) for n, t in delta_inputs(1, 1, Hk, Hv, K, V, torch.float32, device).items()}
    states, windows = (torch.full(shape, NAN, device=device) for shape in ((3, Hv, V, K), (3, 8, 3)))
    slot, flag = torch.tensor([-1], dtype=torch.int32, device=device), torch.tensor([False], device=device)
    args = {"cu_seqlens": starts([0], device), "ssm_state_indices": slot, "has_initial_state": flag}
    lists = chunk_lists(args["cu_seqlens"], size)
    got, _ = chunk_gated_delta_rule_triton(**x, initial_state=states, **args, **lists)
    assert got.abs().sum() == 0 and states.isnan().all()
    rows, weight = torch.full((8, size), NAN, device=device), torch.randn(8, 4, device=device)
    got = causal_conv1d_fn_triton(rows, weight, None, windows, args["cu_seqlens"], slot, flag)
    assert got.abs().sum() == 0 and windows.isnan().all()


@pytest.mark.parametrize("length,size", SIZES)
def test_gates_and_norm(device, length, size):
    vector = torch.randn(3, device=device)
    a, b = (torch.randn(length, 3, device=device) for _ in "ab")
    want = fused_gdn_gating_torch(vector, a, b, vector)
    got = fused_gdn_gating_triton(vector, pad(a, 0, size), pad(b, 0, size), vector)
    for mine, reference in zip(got, want):
        assert_close(mine[:, :length], reference, 1e-5)
    x, z = (torch.randn(length, 2, 32, device=device) for _ in "xz")
    got = rmsnorm_gated_triton(pad(x, 0, size), torch.ones(32, device=device), pad(z, 0, size))
    assert_close(got[:length], rmsnorm_gated_torch(x, torch.ones(32, device=device), z), 1e-5)


@pytest.mark.parametrize("form", ["plain", "int4"])
@pytest.mark.parametrize("length,size", [(1, 16), (13, 16), (17, 32), (33, 64)])
def test_experts(device, form, length, size):
    """Router, shared expert, blocks of choices and their sum. The padding's choices take places, but nobody else's."""
    E, D, I, top_k, dtype = 6, 256, 128, 2, torch.float16
    weights = layer(E, D, I, I, form, dtype, device)
    x = torch.randn(length, D).to(device, dtype)
    logits, hs, xp = front_triton(pad(x, 0, size), weights, hs_planes=1, xp_planes=PLANES[form])
    routed = route_triton(logits, E, top_k, 16)
    y = grouped.experts_triton(xp, routed, weights.w13, weights.w2)
    down = weights.s2.values.T
    got = grouped.combine_triton(y, routed.shares, hs @ down, logits[:, E:])
    reference, want_hs, _ = front_torch(x, weights, hs_planes=1, xp_planes=1)
    assert_close(logits[:length], reference, 4e-3, "logits")
    # choices are made by the kernel's own logits: two that are almost equal may change places
    alone = route_torch(logits[:length], E, top_k, 16)
    assert_close(routed.shares[:length], alone.shares, 1e-5, "shares")
    want_y = grouped.experts_torch(x, alone, weights.w13, weights.w2)
    want = grouped.combine_torch(want_y, alone.shares, want_hs.to(dtype) @ down, logits[:length, E:])
    assert_close(got[:length], want.to(dtype), 2 * TOLERANCE[dtype], "sum")
    by_planes = grouped.by_planes_triton(pad(x, 0, size), form)[:length]
    assert torch.equal(by_planes, by_planes_torch(x, PLANES[form]))
