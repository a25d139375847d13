"""The sampler against one loop a row, each parameter's effect, and what must not matter: rows, neighbours, batches, preemption."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vllm.sampling_params import SamplingParams
from vllm.v1.sample import sampler as sampler_module
from vllm.v1.sample.rng import gumbel_noise, row_keys
from vllm.v1.sample.sampler import Sampler
from vllm.v1.sample.state import WIDEST_TOP_K, SamplingState

V = 24
NEG_INF = -math.inf
EOS = frozenset({0, 1})


def edited(logits, params, prompt, output):
    """A row's logits before the temperature, token by token."""
    out = list(logits)
    for token in range(V):
        if params.allowed_token_ids and token not in params.allowed_token_ids:
            out[token] = NEG_INF
        for word in params.bad_words_token_ids or ():
            before = word[:-1]
            if word[-1] == token and (not before or output[-len(before) :] == before):
                out[token] = NEG_INF
        out[token] += (params.logit_bias or {}).get(token, 0.0)
        if len(output) < params.min_tokens and token in EOS | set(params.stop_token_ids):
            out[token] = NEG_INF
        if token in prompt or token in output:
            out[token] = (
                out[token] / params.repetition_penalty if out[token] > 0 else out[token] * params.repetition_penalty
            )
        out[token] -= params.frequency_penalty * output.count(token)
        out[token] -= params.presence_penalty * (token in output)
    return out


def survivors(logits, params, check=lambda certain: None):
    """Tokens that min_p, top_k and top_p leave, equals of the last one included. `check` hears of cuts that rounding decides."""
    best = max(logits)
    if best == NEG_INF:
        return set(range(V))
    weights = [math.exp(x - best) for x in logits]
    for weight in weights:
        check(params.min_p == 0 or abs(weight - params.min_p) > 1e-5)
    kept = {t for t in range(V) if weights[t] >= params.min_p}
    if 0 < params.top_k < V:
        kth = sorted(logits, reverse=True)[params.top_k - 1]
        kept = {t for t in kept if logits[t] >= kth}
    if params.top_p < 1:
        limit, before, last = params.top_p * sum(weights[t] for t in kept), 0.0, best
        for token in sorted(kept, key=lambda t: -logits[t]):
            check(abs(before - limit) > 1e-5)
            if before >= limit:
                break
            last = logits[token]
            before += weights[token]
        kept = {t for t in kept if logits[t] >= last}
    return kept


def reference(logits, params, prompt, output):
    """The next token, by loops."""
    logits = edited(logits, params, prompt, output)
    if params.greedy:
        scores = logits
    else:
        scaled = [x / params.temperature for x in logits]
        kept = survivors(scaled, params, assume)
        noise = gumbel_noise(row_keys(torch.tensor([params.seed]), torch.tensor([len(output)])), V)[0].tolist()
        scores = [scaled[t] + noise[t] if t in kept else NEG_INF for t in range(V)]
    first, second = sorted(scores, reverse=True)[:2]
    assume(first > NEG_INF and (params.greedy or first - second > 1e-4))
    return scores.index(first)


tokens = st.integers(0, V - 1)
token_lists = st.lists(tokens, max_size=8)


@st.composite
def rows(draw):
    """(params, prompt, output, logits) of one sequence; each feature is off half of the time."""

    def maybe(strategy, off):
        return draw(strategy) if draw(st.booleans()) else off

    params = SamplingParams(
        temperature=maybe(st.sampled_from([0.25, 0.7, 1.0, 2.0]), 0.0),
        top_k=maybe(st.integers(1, V + 2), 0),
        top_p=maybe(st.sampled_from([0.01, 0.3, 0.8, 0.97]), 1.0),
        min_p=maybe(st.sampled_from([0.05, 0.3, 1.0]), 0.0),
        repetition_penalty=maybe(st.sampled_from([0.5, 1.5]), 1.0),
        presence_penalty=maybe(st.sampled_from([-1.0, 0.75]), 0.0),
        frequency_penalty=maybe(st.sampled_from([-0.5, 1.25]), 0.0),
        allowed_token_ids=maybe(st.lists(tokens, min_size=1, max_size=12), None),
        bad_words_token_ids=maybe(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=4), max_size=5), None),
        logit_bias=maybe(st.dictionaries(tokens, st.sampled_from([-100.0, -1.5, 2.0, 100.0]), max_size=5), None),
        min_tokens=maybe(st.integers(1, 10), 0),
        stop_token_ids=maybe(token_lists, None),
        seed=draw(st.integers(-(2**63), 2**63 - 1)),
    )
    if params.seed is None:
        params.seed = -1
    output = draw(st.one_of(token_lists, st.lists(st.integers(0, 3), max_size=8)))  # short alphabets complete bad words
    logits = draw(st.lists(st.integers(-12, 12).map(lambda x: x / 4), min_size=V, max_size=V))
    return params, draw(token_lists), output, logits


@settings(max_examples=250, deadline=None)
@given(batch=st.lists(rows(), min_size=1, max_size=5), data=st.data())
def test_equals_the_loops(batch, data):
    places = data.draw(st.permutations(range(8)))[: len(batch)]
    state = SamplingState(8, V, "cpu")
    for place, (params, prompt, output, _) in zip(places, batch):
        told = data.draw(st.integers(0, len(output)))  # the rest arrives token by token
        state.add(place, params, prompt, output[:told], EOS)
        for token in output[told:]:
            state.append(torch.tensor([place]), torch.tensor([token]))
    logits = torch.tensor([row[3] for row in batch])
    before = logits.clone()
    chosen = Sampler()(logits, state, torch.tensor(places)).token_ids.tolist()
    assert torch.equal(logits, before)
    assert chosen == [reference(row[3], *row[:3]) for row in batch]


def draws(params, logits, n=4000, prompt=(), output=()):
    """How often each token comes up, over n seeds."""
    state = SamplingState(n, V, "cpu")
    for i in range(n):
        state.add(i, params.clone(seed=i), prompt, output, EOS)
    return torch.bincount(Sampler()(logits.expand(n, V), state, torch.arange(n)).token_ids, minlength=V)


SLOPE = torch.arange(V).float().mul(-0.25)  # token 0 is the likeliest


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"temperature": 0}, {0}),
        ({"top_k": 3}, {0, 1, 2}),
        ({"top_k": 1}, {0}),
        ({"top_p": 0.3}, {0, 1}),
        ({"min_p": 0.6}, {0, 1, 2}),
        ({"allowed_token_ids": [20, 23]}, {20, 23}),
        ({"top_k": 2, "bad_words_token_ids": [[0], [9, 1], [8, 2]]}, {2, 3}),
        ({"top_k": 2, "logit_bias": {17: 100.0, 0: -100.0}}, {17}),
        ({"top_k": 2, "min_tokens": 3, "stop_token_ids": [2]}, {3, 4}),
        ({"top_k": 1, "repetition_penalty": 3.0}, {1}),
        ({"top_k": 2, "presence_penalty": -2.0}, {0, 1, 9}),  # 1 and 9 are equal then
        ({"top_k": 1, "frequency_penalty": -2.0}, {9}),
    ],
)
def test_effect_on_what_can_be_drawn(params, expected):
    """Prompt [0], output [9, 9], over logits from 5 down."""
    counts = draws(SamplingParams(**params), SLOPE + 5, n=400, prompt=[0], output=[9, 9])
    assert set(counts.nonzero().flatten().tolist()) == expected


def test_presence_and_frequency_lower_what_was_generated():
    for name, output, drop in (("presence_penalty", [0, 0, 0], 2.0), ("frequency_penalty", [0, 0, 0], 6.0)):
        counts = draws(SamplingParams(**{name: 2.0}), SLOPE, output=output).double()
        logits = SLOPE.clone()
        logits[0] -= drop
        assert_follows(counts, logits.softmax(0))


@pytest.mark.parametrize(
    "params",
    [{}, {"temperature": 0.5}, {"temperature": 3.0}, {"top_k": 5}, {"top_p": 0.6, "temperature": 2.0}, {"min_p": 0.2}],
)
def test_draws_follow_the_softmax_of_what_is_left(params):
    params = SamplingParams(**params)
    scaled = SLOPE / params.temperature
    kept = survivors(scaled.tolist(), params)
    scaled = torch.tensor([x if t in kept else NEG_INF for t, x in enumerate(scaled.tolist())])
    assert_follows(draws(params, SLOPE, n=8000).double(), scaled.softmax(0))


def assert_follows(counts, probabilities):
    expected = probabilities.double() * counts.sum()
    assert counts[expected == 0].sum() == 0
    counts, expected = counts[expected > 5], expected[expected > 5]
    chi2, df = ((counts - expected) ** 2 / expected).sum().item(), len(counts) - 1
    assert chi2 < df + 5 * math.sqrt(2 * df) + 5, (chi2, df)


MIXED = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.8, top_p=0.9),
    SamplingParams(temperature=1.2, top_k=7, repetition_penalty=1.3),
    SamplingParams(min_p=0.1, frequency_penalty=0.5, logprobs=2),
    SamplingParams(temperature=2.0, bad_words_token_ids=[[3, 4], [5]], logit_bias={3: 4.0}),
    SamplingParams(temperature=0.0, presence_penalty=1.5, allowed_token_ids=list(range(0, V, 2))),
]


def logits_after(token_ids):
    """[V] float32 that depends on all of a sequence's tokens: a model in miniature."""
    generator = torch.Generator().manual_seed(hash(tuple(token_ids)) % 2**31)
    return torch.randn(V, generator=generator) * 3


def generate(state, row, neighbours, params, prompt, length):
    """Decode `length` tokens of one sequence in a batch whose other rows are decoding too."""
    output = []
    for _ in range(length):
        batch = [*neighbours, row] if len(output) % 2 else [row, *neighbours]
        logits = torch.randn(len(batch), V)
        logits[batch.index(row)] = logits_after([*prompt, *output])
        rows_ = torch.tensor(batch)
        sampled = Sampler()(logits, state, rows_)
        state.append(rows_, sampled.token_ids)
        output.append(sampled.token_ids[batch.index(row)].item())
    return output


@pytest.mark.parametrize("which", range(len(MIXED)))
def test_a_seed_gives_the_same_text_whatever_else_runs(which, seed):
    params, prompt = MIXED[which].clone(seed=1234), [2, 3, 5]
    alone = SamplingState(8, V, "cpu")
    alone.add(0, params, prompt, [], EOS)
    text = generate(alone, 0, [], params, prompt, 20)

    crowded = SamplingState(64, V, "cpu")
    for i, neighbour in enumerate(MIXED * 3):
        crowded.add(i, neighbour.clone(seed=i), [i % V], [], EOS)
    crowded.add(50, params, prompt, [], EOS)
    assert generate(crowded, 50, list(range(18)), params, prompt, 20) == text

    preempted = SamplingState(8, V, "cpu")
    preempted.add(3, params, prompt, [], EOS)
    first = generate(preempted, 3, [], params, prompt, 8)
    preempted.remove(3)
    preempted.add(5, params, prompt, first, EOS)
    rest = [generate_one(preempted, 5, prompt, first)]
    assert first + rest == text[:9]


def generate_one(state, row, prompt, output):
    return Sampler()(logits_after([*prompt, *output])[None], state, torch.tensor([row])).token_ids.item()


def test_different_seeds_and_positions_differ():
    state = SamplingState(64, V, "cpu")
    for row in range(64):
        state.add(row, SamplingParams(seed=row), [1], [], EOS)
    index = torch.arange(64)
    flat = torch.zeros(64, V)
    steps = []
    for _ in range(8):
        steps.append(Sampler()(flat, state, index).token_ids)
        state.append(index, steps[-1])
    assert len({tuple(text) for text in torch.stack(steps, 1).tolist()}) == 64
    assert len({tuple(step.tolist()) for step in steps}) == 8


@pytest.mark.parametrize("params", MIXED)
def test_small_pieces_change_nothing(params, monkeypatch, seed):
    state = SamplingState(16, V, "cpu")
    for row in range(16):
        state.add(row, params.clone(seed=row), [row], [row, 3], EOS)
    logits, index = torch.randn(16, V), torch.randperm(16)
    whole = Sampler()(logits, state, index).token_ids
    monkeypatch.setattr(sampler_module, "EDITED_LOGITS", 5 * V)
    assert torch.equal(Sampler()(logits, state, index).token_ids, whole)


def test_partial_selection_equals_a_full_sort(seed):
    """A neighbour without top_k makes the sampler sort whole rows; the others' draws stay."""
    vocab = 5000
    logits = (torch.randn(40, vocab) * 8).round() / 4  # many equals
    results = []
    for last in (SamplingParams(temperature=0.0), SamplingParams(top_p=0.5)):
        state = SamplingState(40, vocab, "cpu")
        for row in range(39):
            state.add(
                row,
                SamplingParams(temperature=1.5, top_k=1 + 5 * row, top_p=0.9 if row % 2 else 1.0, seed=row),
                [0],
                [],
                EOS,
            )
        state.add(39, last, [0], [], EOS)
        results.append((state.plan.num_sorted, Sampler()(logits, state, torch.arange(40)).token_ids[:39].tolist()))
    assert [sorted_ for sorted_, _ in results] == [256, vocab]
    assert results[0][1] == results[1][1]


def test_all_greedy_is_one_argmax(monkeypatch):
    state = SamplingState(4, V, "cpu")
    state.add(2, SamplingParams(temperature=0.0, top_k=5, top_p=0.5, min_p=0.1), [1], [], EOS)
    assert not state.plan.draws and not state.plan.edits
    monkeypatch.setattr(sampler_module, "_choose", None)
    logits = torch.randn(2, V, dtype=torch.bfloat16)
    out = Sampler()(logits, state, torch.tensor([2, state.pad_row]))
    assert torch.equal(out.token_ids, logits.argmax(-1)) and out.logprobs is None


def test_min_tokens_lets_go():
    state = SamplingState(1, V, "cpu")
    state.add(0, SamplingParams(temperature=0.0, min_tokens=2, stop_token_ids=[2]), [1], [], EOS)
    logits = SLOPE[None]
    texts = []
    for _ in range(4):
        token = Sampler()(logits, state, torch.tensor([0])).token_ids
        state.append(torch.tensor([0]), token)
        texts.append(token.item())
    assert texts == [3, 3, 0, 0]


def test_the_pad_row_is_nobodys(seed):
    """Named many times, it is greedy, and what is appended to it reaches no one."""
    state = SamplingState(4, V, "cpu")
    params = SamplingParams(temperature=1.0, frequency_penalty=1.0, bad_words_token_ids=[[1, 2]], seed=3)
    state.add(1, params, [0], [], EOS)
    batch = torch.tensor([state.pad_row, 1, state.pad_row, state.pad_row])
    for _ in range(3):
        logits = torch.randn(4, V)
        chosen = Sampler()(logits, state, batch).token_ids
        assert torch.equal(chosen[[0, 2, 3]], logits[[0, 2, 3]].argmax(-1))
        state.append(batch, chosen)
    marks = state.penalties.table["marks"]
    assert marks[0].sum() == 0 and state.num_generated[1] == 3


def test_rows_of_a_state():
    state = SamplingState(4, V, "cpu")
    state.add(1, SamplingParams(), [0], [], EOS)
    with pytest.raises(ValueError, match="row 1 is in use"):
        state.add(1, SamplingParams(), [0], [], EOS)
    for row in (-1, 4):
        with pytest.raises(ValueError, match="outside"):
            state.add(row, SamplingParams(), [0], [], EOS)
    assert len(state) == 1
    state.remove(1)
    assert len(state) == 0
    with pytest.raises(KeyError):
        state.remove(1)


def test_memory_follows_use():
    """[rows, vocab] tables exist only for the rows that need them, and go when those do."""
    vocab = 1000
    state = SamplingState(512, vocab, "cpu")
    for row in range(512):
        state.add(row, SamplingParams(temperature=0.5, top_k=5), [0], [], EOS)
    assert state.penalties.table["marks"].shape[0] == 1 and not state.plan.edits
    for row in range(3):
        state.remove(row)
        state.add(row, SamplingParams(presence_penalty=1.0, allowed_token_ids=[1]), [0], [], EOS)
    assert state.penalties.table["marks"].shape[0] == 4 and state.allow_lists.table["forbidden"].shape[0] == 4
    assert state.plan.penalties and state.plan.allow_lists
    for row in range(512):
        state.remove(row)
    assert all(table._capacity == 1 for table in state._tables)
    assert state.plan == SamplingState(1, vocab, "cpu").plan


def test_plan_widths():
    vocab = 4 * WIDEST_TOP_K
    for top_k, top_p, expected in ((20, 0.9, 32), (1, 1.0, 1), (WIDEST_TOP_K, 1.0, WIDEST_TOP_K), (WIDEST_TOP_K + 1, 1.0, vocab),
                                   (0, 1.0, 0), (0, 0.9, vocab), (vocab, 1.0, 0), (10**30, 0.5, vocab)):  # fmt: skip
        state = SamplingState(2, vocab, "cpu")
        state.add(0, SamplingParams(top_k=top_k, top_p=top_p), [0], [], EOS)
        assert state.plan.num_sorted == expected, (top_k, top_p)


def test_nothing_left_to_choose_still_gives_a_token():
    state = SamplingState(2, V, "cpu")
    impossible = {"allowed_token_ids": [4], "bad_words_token_ids": [[4]]}
    state.add(0, SamplingParams(top_p=0.5, min_p=0.1, top_k=3, **impossible), [0], [], EOS)
    state.add(1, SamplingParams(temperature=0, **impossible), [0], [], EOS)
    chosen = Sampler()(torch.randn(2, V), state, torch.tensor([0, 1])).token_ids
    assert ((chosen >= 0) & (chosen < V)).all()


def test_an_only_choice_is_taken():
    """However unlikely its noise: a masked token's score is -inf, never equal to it."""
    state = SamplingState(200, V, "cpu")
    for row in range(200):
        state.add(row, SamplingParams(allowed_token_ids=[7], temperature=1e-5, top_p=1e-6, seed=row), [0], [], EOS)
    assert (Sampler()(SLOPE.expand(200, V) * 1000, state, torch.arange(200)).token_ids == 7).all()


def test_empty_batch():
    state = SamplingState(2, V, "cpu")
    state.add(0, SamplingParams(logprobs=1), [0], [], EOS)
    out = Sampler()(torch.empty(0, V), state, torch.empty(0, dtype=torch.int64))
    assert out.to_lists([]) == ([], [])


@pytest.mark.gpu
def test_gpu_agrees_and_never_waits(seed):
    """Every feature on, on both devices; on the GPU any synchronisation in add, call or append is an error."""
    logits = torch.randn(len(MIXED), V)
    index = list(range(len(MIXED)))
    texts = []
    for device in ("cpu", "cuda"):
        state, rows_ = SamplingState(16, V, device), torch.tensor(index, device=device)
        here = logits.to(device)
        torch.cuda.set_sync_debug_mode("error" if device == "cuda" else "default")
        try:
            for i, params in enumerate(MIXED):
                state.add(i, params.clone(seed=i, min_tokens=2), [1, 2, i], [4], EOS)
            steps = []
            for _ in range(6):
                out = Sampler()(here, state, rows_)
                state.append(rows_, out.token_ids)
                steps.append(out.packed())
        finally:
            torch.cuda.set_sync_debug_mode("default")
        texts.append([step[:, 0].tolist() for step in steps])
    assert texts[0] == texts[1]
