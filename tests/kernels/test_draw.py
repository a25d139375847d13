"""The sampler's kernels against PyTorch: the same tokens from the same hash, whatever cuts the row."""

import math

import pytest
import torch

from vllm.sampling_params import SamplingParams
from vllm.v1.sample import draw as module
from vllm.v1.sample.draw import draw_torch, draw_triton, lowest_kept
from vllm.v1.sample.rng import gumbel_noise, row_keys
from vllm.v1.sample.state import SamplingState

PARAMS = {
    "temperature": {"temperature": 0.7},
    "top_k": {"temperature": 1.0, "top_k": 20},
    "top_k 1": {"temperature": 1.3, "top_k": 1},
    "top_p": {"temperature": 0.9, "top_p": 0.8},
    "top_p alone, almost all": {"temperature": 2.0, "top_p": 0.999},
    "both": {"temperature": 0.6, "top_k": 40, "top_p": 0.95},
    "min_p": {"temperature": 1.0, "min_p": 0.05},
    "all three": {"temperature": 1.1, "top_k": 7, "top_p": 0.5, "min_p": 0.01},
    "greedy": {"temperature": 0.0},
}


def make(params, V, device):
    """One row of the state for each of the parameters, in a shuffled order, and their rows."""
    order = torch.randperm(len(params)).tolist()
    state = SamplingState(len(params), V, device)
    for i, (row, values) in enumerate(zip(order, params)):
        state.add(row, SamplingParams(seed=1000 + i, **values), [], [5] * (i % 4), ())
    return state, torch.tensor(order, device=device)


def scores(logits, state, rows, plan):
    """What the PyTorch form takes the largest of."""
    x = logits.float() / state.temperature[rows, None]
    lowest = lowest_kept(x, state.log_min_p[rows], state.top_k[rows], state.top_p[rows], plan)
    noise = gumbel_noise(row_keys(state.seeds[rows], state.num_generated[rows]), x.shape[1])
    return (x + noise * state.noise[rows, None]).masked_fill_(x < lowest[:, None], -math.inf)


def check(logits, state, rows):
    """The same tokens, or ones whose scores differ by less than rounding does."""
    before = logits.clone()
    want, got = (
        draw_torch(logits, state, rows, state.plan),
        draw_triton(logits, state, rows, state.plan, search=True),
    )
    assert torch.equal(logits, before) and got.dtype == torch.int64
    reference = scores(logits, state, rows, state.plan)
    lost = reference.gather(1, want[:, None]) - reference.gather(1, got[:, None])
    assert lost.max() <= 1e-4, lost
    assert (want == got).float().mean() > 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*PARAMS, "mixed"])
@pytest.mark.parametrize("V", [300, 9001])
def test_the_same_tokens(device, name, V, dtype):
    params = list(PARAMS.values()) if name == "mixed" else [PARAMS[name]] * 3
    state, rows = make(params, V, device)
    logits = (torch.randn(len(params), V, device=device) * 3).to(dtype)
    for _ in range(2):
        check(logits, state, rows)
        logits = logits.roll(7, dims=1)


@pytest.mark.parametrize("search", [True, False])
def test_the_cut(device, monkeypatch, search):
    """Rows of another stride, ties around the cut, few finite logits, none, one: the set that is left is PyTorch's."""
    params = [PARAMS[name] for name in ("top_k", "top_p", "both", "all three", "top_k 1")] * 2
    state, rows = make(params, 200, device)
    wide = torch.randn(10, 260, device=device)
    logits = wide[:, 30:230]
    logits[:5] = (logits[:5] * 2).round()  # ties
    logits[5, 10:] = -math.inf
    logits[6, 1:] = -math.inf
    logits[7] = -math.inf
    logits[8] = 3.0
    scaled = logits / state.temperature[rows, None]
    columns = (column[rows] for column in (state.log_min_p, state.top_k, state.top_p))
    want = scaled >= lowest_kept(scaled, *columns, state.plan)[:, None]
    seen = []
    best = module._best_kernel

    class Spy:
        def __getitem__(self, grid):
            def launch(*args, **kwargs):
                seen.append(args[6].clone())
                return best[grid](*args, **kwargs)

            return launch

    monkeypatch.setattr(module, "_best_kernel", Spy())
    tokens = draw_triton(logits, state, rows, state.plan, search=search)
    finite = scaled > -math.inf  # what is not can never be drawn
    assert torch.equal((scaled >= seen[0][:, None]) & finite, want & finite)
    assert want.gather(1, tokens[:, None]).squeeze(1)[finite.any(1)].all() and tokens[7] == 0


@pytest.mark.parametrize("V", [1, 5, 4096, 4097, 20000])
def test_greedy_takes_the_lowest_of_equals(device, V):
    state, rows = make([PARAMS["greedy"]] * 4, V, device)
    logits = torch.randn(4, V, device=device).bfloat16()
    logits[1] = 2.0
    logits[2, V // 2 :] = 9.0
    logits[3] = -math.inf
    got = draw_triton(logits, state, rows, state.plan)
    assert torch.equal(got, torch.tensor([draw_torch(logits[:1], state, rows, state.plan)[0], 0, V // 2, 0]).to(device))


def test_no_rows(device):
    state, rows = make([PARAMS["both"]], 50, device)
    assert draw_triton(torch.randn(0, 50, device=device), state, rows[:0], state.plan).shape == (0,)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*PARAMS, "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_vocabulary(name, dtype):
    params = list(PARAMS.values()) * 8 if name == "mixed" else [PARAMS[name]] * 64
    state, rows = make(params, 248320, "cuda")
    check((torch.randn(len(params), 248320, device="cuda") * 3).to(dtype), state, rows)
