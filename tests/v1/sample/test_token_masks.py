"""Masks on the device: what they forbid is never chosen, and other rows do not notice."""

import numpy as np
import pytest
import torch

from vllm.sampling_params import SamplingParams
from vllm.v1.sample import sampler as sampler_module
from vllm.v1.sample.sampler import Sampler
from vllm.v1.sample.state import SamplingState
from vllm.v1.sample.token_masks import DeviceMasks
from vllm.v1.structured_output.masks import num_words, pack_tokens

CPU = torch.device("cpu")


def masks_of(allowed: dict[int, list[int]], vocab_size: int) -> DeviceMasks:
    """Place -> tokens, in any order."""
    words = np.stack([pack_tokens(tokens, vocab_size, allowed=True) for tokens in allowed.values()])
    assert words.shape == (len(allowed), num_words(vocab_size))
    return DeviceMasks(words, list(allowed), CPU)


@pytest.mark.parametrize("vocab_size", [1, 8, 31, 32, 33, 100, 1024])
def test_forbidden_tokens_become_minus_infinity(seed, vocab_size):
    logits = torch.randn(5, vocab_size)
    allowed = {3: sorted({0, vocab_size // 2, vocab_size - 1}), 1: [vocab_size - 1]}
    edited = logits.clone()
    masks_of(allowed, vocab_size).apply(edited, logits)
    for row in range(5):
        keep = allowed.get(row, range(vocab_size))
        for token in range(vocab_size):
            assert edited[row, token] == (logits[row, token] if token in keep else -torch.inf)


def test_edits_that_leave_nothing_do_not_count(seed):
    raw = torch.randn(2, 40).to(torch.bfloat16)
    edited = raw.float()
    edited[0, [3, 7]] = -torch.inf
    edited[1, [3]] = -torch.inf
    masks_of({0: [3, 7], 1: [3, 7]}, 40).apply(edited, raw)
    assert torch.equal(edited[0, [3, 7]], raw[0, [3, 7]].float()) and edited[0].isneginf().sum() == 38
    assert edited[1, 3] == -torch.inf and edited[1, 7] == raw[1, 7].float()


@pytest.mark.parametrize("piece", [1, 90, 1 << 24])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_the_sampler_chooses_what_may_come(seed, monkeypatch, piece, temperature):
    monkeypatch.setattr(sampler_module, "EDITED_LOGITS", piece)
    vocab_size, logits = 45, torch.randn(6, 45)
    state = SamplingState(6, vocab_size, CPU)
    for row in range(6):
        state.add(row, SamplingParams(temperature=temperature, seed=row, top_p=0.9, min_p=0.01), [1], [], [])
    rows = torch.arange(6)
    plain = Sampler()(logits, state, rows).token_ids
    allowed = {4: [2], 0: [44, 3], 5: list(range(20, 30))}
    masked = Sampler()(logits, state, rows, masks_of(allowed, vocab_size)).token_ids
    for row in range(6):
        if row in allowed:
            assert masked[row].item() in allowed[row]
        else:
            assert masked[row] == plain[row]
    if temperature == 0:
        assert masked[5] == 20 + logits[5, 20:30].argmax()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_form_wins_over_everything_else(temperature):
    params = SamplingParams(
        temperature=temperature,
        seed=1,
        allowed_token_ids=[1, 2],
        logit_bias={9: -100.0},
        bad_words=["x"],
        bad_words_token_ids=[[9]],
        min_tokens=5,
        stop_token_ids=[9],
        repetition_penalty=1.5,
        top_k=1,
    )
    state = SamplingState(1, 64, CPU)
    state.add(0, params, [1], [], [9])
    logits = torch.zeros(1, 64)
    assert Sampler()(logits, state, torch.tensor([0]), masks_of({0: [9]}, 64)).token_ids.item() == 9
    assert Sampler()(logits, state, torch.tensor([0]), masks_of({0: [2, 9]}, 64)).token_ids.item() == 2
