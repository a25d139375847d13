"""Reported log-probabilities: of the raw logits, by loops, in pieces, and after the trip to the host."""

import math

import pytest
import torch

from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logprobs import prompt_logprobs, token_logprobs
from vllm.v1.sample.sampler import Sampler
from vllm.v1.sample.state import SamplingState


def reference(logits, token, k):
    """(ids, values, rank) of one position."""
    total = math.log(math.fsum(math.exp(x) for x in logits))
    order = sorted(range(len(logits)), key=lambda t: -logits[t])[:k]
    ids = [token, *order]
    return ids, [logits[t] - total for t in ids], 1 + sum(x > logits[token] for x in logits)


@pytest.mark.parametrize("k", [0, 1, 5, 40, 1000])
@pytest.mark.parametrize("rows", [0, 1, 7, 300])
def test_equals_the_loops(k, rows, seed):
    logits, tokens = torch.randn(rows, 40) * 4, torch.randint(40, (rows,))
    found = token_logprobs(logits, tokens, k).to_lists([k] * rows)
    assert len(found) == rows
    for item, row, token in zip(found, logits.tolist(), tokens.tolist()):
        ids, values, rank = reference(row, token, k)
        assert item.token_ids == ids and item.rank == rank
        assert item.logprobs == pytest.approx(values, abs=1e-5)


def test_equals_share_the_better_rank():
    found = token_logprobs(torch.tensor([[1.0, 3.0, 3.0, 2.0]]), torch.tensor([2]), 0).to_lists([0])
    assert found[0].rank == 1 and found[0].token_ids == [2]
    assert token_logprobs(torch.tensor([[1.0, 3.0, 3.0, 2.0]]), torch.tensor([3]), 0).ranks.tolist() == [3]


def test_half_precision_logits_are_normalised_in_float32(seed):
    logits, tokens = torch.randn(3, 5000).bfloat16(), torch.tensor([1, 2, 3])
    half, full = token_logprobs(logits, tokens, 4), token_logprobs(logits.float(), tokens, 4)
    assert torch.equal(half.logprobs, full.logprobs)
    assert full.logprobs.dtype == torch.float32


@pytest.mark.parametrize("piece", [1, 4, 256])
def test_prompt_pieces(piece, seed):
    hidden, weight, tokens = torch.randn(11, 8), torch.randn(30, 8), torch.randint(30, (11,))
    sizes = []

    def compute_logits(rows):
        sizes.append(rows.shape[0])
        return rows @ weight.T

    found = prompt_logprobs(hidden, compute_logits, tokens, 3, piece)
    whole = token_logprobs(hidden @ weight.T, tokens, 3)
    torch.testing.assert_close(found.logprobs, whole.logprobs, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.token_ids, whole.token_ids) and torch.equal(found.ranks, whole.ranks)
    assert sum(sizes) == 11 and max(sizes) <= piece


def test_each_row_gets_what_it_asked_for(seed):
    """Raw logits count: bias, penalties and temperature change the choice and not the report."""
    state = SamplingState(8, 12, "cpu")
    wanted = [3, None, 0, -1]
    for row, k in enumerate(wanted):
        params = SamplingParams(temperature=0.0, logprobs=k, logit_bias={row: 100.0}, repetition_penalty=2.0)
        state.add(row, params, [1], [], [])
    logits = torch.randn(4, 12)
    out = Sampler()(logits, state, torch.arange(4))
    token_ids, logprobs = out.to_lists([state.num_logprobs.get(row) for row in range(4)])
    assert token_ids == [0, 1, 2, 3]
    assert logprobs[1] is None
    for row, k in ((0, 3), (2, 0), (3, 12)):
        ids, values, rank = reference(logits[row].tolist(), row, k)
        assert logprobs[row].token_ids == ids and logprobs[row].rank == rank
        assert logprobs[row].logprobs == pytest.approx(values, abs=1e-5)
    assert out.packed().shape == (4, 2 + 2 * 13)


def test_no_logprobs_no_columns():
    state = SamplingState(2, 12, "cpu")
    state.add(0, SamplingParams(temperature=0.0), [1], [], [])
    out = Sampler()(torch.randn(1, 12), state, torch.tensor([0]))
    assert out.packed().shape == (1, 1) and out.to_lists([None])[1] == [None]
    state.add(1, SamplingParams(logprobs=2), [1], [], [])
    assert state.plan.num_logprobs == 2
    state.remove(1)
    assert state.plan.num_logprobs is None and state.num_logprobs == {}
