import pytest
import torch

from tests.kernels.common import TOLERANCE, assert_close, slots, starts
from vllm.model_executor.layers.mamba.ops.causal_conv1d import (
    causal_conv1d_fn,
    causal_conv1d_fn_torch,
    causal_conv1d_fn_triton,
)
from vllm.model_executor.layers.mamba.ops.causal_conv1d_update import (
    causal_conv1d_update,
    causal_conv1d_update_torch,
    causal_conv1d_update_triton,
)


def both(torch_form, triton_form, x, pool, *args, tolerance):
    """Run both forms on copies of the pool; compare outputs, and pools bit for bit."""
    pools = pool.clone(), pool.clone()
    want, got = torch_form(x, pools[0], *args), triton_form(x, pools[1], *args)
    assert got.shape == want.shape and got.dtype == want.dtype
    assert_close(got, want, tolerance, "out")
    assert torch.equal(pools[0], pools[1])
    return got, pools[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "lengths,padding,dim,width",
    [([1], (), 64, 4), ([2, 40, 0, 3, 1, 17], (3,), 70, 4), ([5, 9], (0,), 33, 2), ([0, 0, 4], (), 16, 3)],
)
def test_sequences(device, lengths, padding, dim, width, dtype):
    T = sum(lengths) + 5  # five tokens belong to no sequence
    x = torch.randn(T, dim).to(device, dtype).T
    weight, bias = torch.randn(dim, width).to(device, dtype), torch.randn(dim).to(device, dtype)
    pool = torch.randn(len(lengths) + 3, dim, width - 1).to(device, dtype)
    index = slots(len(lengths), pool.shape[0], device, padding)
    flags = torch.rand(len(lengths), device=device) < 0.6
    run = lambda form: lambda x, pool, *rest: form(x, weight, rest[0], pool, *rest[1:])
    for b, activation in ((bias, "silu"), (None, None)):
        args = (b, starts(lengths, device), index, flags, activation)
        got, after = both(
            run(causal_conv1d_fn_torch), run(causal_conv1d_fn_triton), x, pool, *args, tolerance=TOLERANCE[dtype]
        )
        assert got[:, sum(lengths) :].abs().max() == 0
        untouched = sorted(set(range(pool.shape[0])) - set(index.tolist()))
        assert torch.equal(after[untouched], pool[untouched])


@pytest.mark.parametrize("layout", ["row", "column"])
def test_any_strides_and_no_flags(device, layout):
    x = torch.randn(24, 32, device=device)
    x = x.T if layout == "column" else x.T.contiguous()
    weight, pool = torch.randn(32, 4, device=device), torch.full((1, 32, 3), float("nan"), device=device)
    args = (weight, None, pool, starts([24], device))
    got = causal_conv1d_fn_triton(x, *args)
    assert_close(pool[0], x[:, -3:], 0)
    assert_close(got, causal_conv1d_fn_torch(x, *args), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("B,dim,state_len,tokens", [(1, 128, 3, 1), (5, 70, 3, 1), (3, 33, 6, 1), (4, 48, 3, 3)])
def test_update(device, B, dim, state_len, tokens, dtype):
    x = torch.randn(B, dim + 7, tokens).to(device, dtype)[:, :dim]
    x = x[..., 0] if tokens == 1 else x
    weight, bias = torch.randn(dim, 4).to(device, dtype), torch.randn(dim).to(device, dtype)
    pool = torch.randn(B + 2, state_len, dim).to(device, dtype).transpose(1, 2)
    weight = weight.T.contiguous().T if tokens == 1 else weight
    index = slots(B, B + 2, device, (B - 1,) if B > 1 else ())
    args = (weight, bias, "silu", index)
    got, _ = both(causal_conv1d_update_torch, causal_conv1d_update_triton, x, pool, *args, tolerance=TOLERANCE[dtype])
    if B > 1:
        assert got[B - 1].abs().max() == 0


def test_update_with_drafts(device):
    dim, lengths, state_len = 40, [3, 1, 2, 0], 5
    x = torch.randn(sum(lengths) + 2, dim, device=device)
    weight, pool = torch.randn(dim, 4, device=device), torch.randn(6, dim, state_len, device=device)
    accepted = torch.tensor([2, 3, 1, 1], dtype=torch.int32, device=device)
    args = (weight, None, "silu", slots(4, 6, device), accepted, starts(lengths, device), 3)
    both(causal_conv1d_update_torch, causal_conv1d_update_triton, x, pool, *args, tolerance=1e-5)
    with pytest.raises(ValueError, match="6 inputs of 4 tokens"):
        causal_conv1d_update(x, pool, weight, None, "silu", args[3], accepted, args[5], 4)


def test_rejected_drafts_leave_no_trace():
    """Two steps of three tokens, of which one and then two are kept, give the same as the kept tokens alone."""
    dim = 8
    x, weight, pool = torch.randn(7, dim), torch.randn(dim, 4), torch.zeros(1, dim, 5)
    plain = torch.zeros(1, dim, 3)
    want = torch.cat([causal_conv1d_update(x[i : i + 1], plain, weight, None, "silu") for i in range(4)])
    step = lambda rows, accepted: causal_conv1d_update(
        rows,
        pool,
        weight,
        None,
        "silu",
        torch.zeros(1, dtype=torch.int32),
        torch.tensor([accepted]),
        torch.tensor([0, 3]),
        3,
    )
    first = step(torch.stack([x[0], x[5], x[6]]), 1)
    second = step(torch.stack([x[1], x[2], x[6]]), 1)
    third = step(torch.stack([x[3], x[5], x[5]]), 2)
    assert_close(torch.stack([first[0], second[0], second[1], third[0]]), want, 1e-6)


def test_a_cut_anywhere_continues_exactly():
    x, weight = torch.randn(6, 20), torch.randn(6, 4)
    whole = causal_conv1d_fn(x, weight, None, torch.zeros(1, 6, 3), torch.tensor([0, 20]))
    yes, cu = torch.tensor([True]), lambda n: torch.tensor([0, n])
    for cut in range(1, 20):
        pool = torch.randn(1, 6, 3)
        head = causal_conv1d_fn(x[:, :cut], weight, None, pool, cu(cut))
        decoded = causal_conv1d_update(x[:, cut : cut + 1].T, pool, weight, None, "silu").T
        tail = causal_conv1d_fn(x[:, cut + 1 :], weight, None, pool, cu(19 - cut), None, yes)
        assert_close(torch.cat([head, decoded, tail], 1), whole, 1e-6, f"cut at {cut}")


def test_refuses_what_does_not_fit():
    x, pool = torch.randn(2, 8), torch.zeros(2, 8, 3)
    with pytest.raises(ValueError, match=r"dim 8, got \(7, 4\)"):
        causal_conv1d_update(x, pool, torch.zeros(7, 4))
    with pytest.raises(ValueError, match=r">= 4\], got \(2, 8, 3\)"):
        causal_conv1d_update(x, pool, torch.zeros(8, 5))
    with pytest.raises(ValueError, match="relu"):
        causal_conv1d_update(x, pool, torch.zeros(8, 4), activation="relu")
