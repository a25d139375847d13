"""Prompts in a padded batch whose lengths only tensors know: the same tokens and logits as without, and nothing of the padding anywhere.

A CPU runs here, kernel by kernel, what a GPU captures in graphs; test_cudagraph.py has the graphs themselves.
"""

import itertools
import random
from contextlib import contextmanager

import pytest
import torch
import triton

from tests.v1.worker.static_prompts import (
    GREEDY,
    ByHand,
    assert_same_logits,
    poisoned_pools,
    pools_of,
    recorded_logits,
    runner_of,
    static_prompts,
)
from vllm import LLM, SamplingParams
from vllm.config.compilation import PROMPT_SIZES, prompt_sizes
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.worker.cudagraph import padded_size

NAN = float("nan")
SIZES = PROMPT_SIZES[:8]
"""Those that a CPU computes in seconds; test_cudagraph.py has all."""


@pytest.fixture(scope="module")
def llm(tiny_model) -> LLM:
    return LLM(str(tiny_model), max_model_len=640, max_num_seqs=8, device="cpu", use_tqdm_on_load=False)


def tokens(n: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(5, 800) for _ in range(n)]


def both_ways(llm, prompts, params=GREEDY, sizes=SIZES) -> list[tuple]:
    """Generate without and with the padded batch; tokens must be equal, and logits almost. Returns what graphs were asked for."""
    runner = runner_of(llm)
    with recorded_logits(runner) as want:
        expected = [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]
    with recorded_logits(runner) as got, static_prompts(runner, sizes) as asked:
        found = [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]
    assert found == expected
    assert_same_logits(got, want)
    return asked


# Sizes


@pytest.mark.parametrize("longest", [1, 9, 16, 17, 200, 512, 513, 2000, 2048, 4096])
def test_sizes_hold_every_short_chunk(longest):
    sizes = prompt_sizes(longest)
    assert list(sizes) == sorted(set(sizes)) and sizes[-1] == min(longest, 2048)
    for n in range(1, sizes[-1] + 1):
        assert n <= padded_size(sizes, n) <= max(16, 2 * n)
    assert padded_size(sizes, sizes[-1] + 1) is None
    assert set(sizes) <= {*PROMPT_SIZES, longest}


# The same answers


@pytest.mark.parametrize("size", SIZES)
def test_lengths_around_a_size(llm, size):
    """And the tokens after, which go on from the state and the pages that the prompt left."""
    for n in (size - 1, size, size + 1):
        asked = both_ways(llm, [tokens(n, n)])
        assert asked == ([("prompt", padded_size(SIZES, n))] if n <= 512 else [])


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_the_shortest(llm, n):
    assert both_ways(llm, [tokens(n)]) == [("prompt", 16)]


def test_chunks_that_go_on(tiny_model):
    """Chunks that end inside a page, at a page's end and at the end of 64 tokens."""
    for budget in (33, 64, 80):
        llm = LLM(
            str(tiny_model),
            max_model_len=640,
            max_num_seqs=4,
            max_num_batched_tokens=budget,
            device="cpu",
            use_tqdm_on_load=False,
        )
        for n in (budget + 2, 2 * budget, 3 * budget + 17):
            sizes = prompt_sizes(budget)
            asked = both_ways(llm, [tokens(n)], sizes=sizes)
            rest = n % budget or budget
            assert asked == [("prompt", padded_size(sizes, k)) for k in [budget] * ((n - 1) // budget) + [rest]]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.8, top_p=0.9, seed=5, max_tokens=6, ignore_eos=True),
        SamplingParams(temperature=0.0, max_tokens=6, logprobs=3, frequency_penalty=0.3, repetition_penalty=1.2),
        SamplingParams(temperature=0.0, max_tokens=6, min_tokens=4, bad_words=["1"], logit_bias={7: 2.0}),
    ],
    ids=["drawn", "penalties", "edits"],
)
def test_whatever_sampling_needs(llm, params):
    """A seeded draw depends on the number of tokens generated, and penalties on which they are: both must be noted."""
    assert both_ways(llm, [tokens(20)], params) == [("prompt", 32)]


def test_text_that_must_have_a_form(llm):
    form = StructuredOutputsParams(regex="[0-9]{3} [a-z]{2}")
    params = SamplingParams(temperature=0.0, max_tokens=12, structured_outputs=form)
    assert both_ways(llm, [tokens(20)], params) == [("prompt", 32)]


def test_texts_that_must_have_a_form_beside_others(llm):
    """Each has the mask of its own row, whether its grammar is there in time for the first step or not."""
    choice = StructuredOutputsParams(choice=["north", "south"])
    params = [FORMED, GREEDY, FORMED.clone(structured_outputs=choice), GREEDY]
    prompts = [tokens(20 + i, i) for i in range(4)]
    alone = [llm.generate([p], one, use_tqdm=False)[0].outputs[0].token_ids for p, one in zip(prompts, params)]
    with static_prompts(runner_of(llm), SIZES) as asked:
        together = [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]
    assert together == alone
    assert "prompts" in {name for name, _ in asked}


@pytest.mark.parametrize("at_once", [1, 3])
def test_sequences_that_come_and_go_with_steps_ahead_of_their_results(tiny_model, at_once):
    """Few pages, so that of three some are sent back and computed again."""
    limits = {
        "max_model_len": 128,
        "max_num_seqs": at_once,
        "max_num_batched_tokens": 40,
        "num_gpu_blocks_override": 14,
    }
    llm = LLM(str(tiny_model), device="cpu", async_scheduling=True, use_tqdm_on_load=False, **limits)
    prompts = [tokens(5 + 9 * i, i) for i in range(7)]
    asked = both_ways(llm, prompts, GREEDY.clone(max_tokens=40), sizes=prompt_sizes(40))
    # a prompt's last token by itself is decoding
    assert len(asked) == sum(-(-(len(prompt) - 1) // 40) for prompt in prompts) if at_once == 1 else asked


@pytest.mark.parametrize("count", [2, 3, 8])
def test_prompts_of_a_step_are_one_batch(llm, count):
    """With those whose log-probabilities are asked for, and those that end at once."""
    prompts = [tokens(20 + 7 * i, i) for i in range(count)]
    params = [GREEDY, GREEDY.clone(max_tokens=1), GREEDY.clone(logprobs=1), *[GREEDY] * 5][:count]
    with static_prompts(runner_of(llm), SIZES) as asked:
        found = llm.generate(prompts, params, use_tqdm=False)
    assert asked == [("prompts", padded_size(SIZES, sum(map(len, prompts))))]
    for prompt, one, output in zip(prompts, params, found):
        alone = llm.generate([prompt], one, use_tqdm=False)[0].outputs[0]
        assert output.outputs[0].token_ids == alone.token_ids
        assert (output.outputs[0].logprobs is None) == (alone.logprobs is None)


@pytest.mark.parametrize(
    "lengths,asked",
    [([256, 256], [("prompts", 512)]), ([256, 257], []), ([2, 3], [("prompts", 16)]), ([1, 1, 30], [("prompts", 32)])],
)
def test_several_prompts_around_a_size(llm, lengths, asked):
    """Prompts of a token are chunks like others. Too many tokens for the largest size are computed without one."""
    assert both_ways(llm, [tokens(n, i) for i, n in enumerate(lengths)]) == asked


def test_more_prompts_than_there_is_room_for(llm, monkeypatch):
    monkeypatch.setattr(runner_of(llm).prompts, "most", 3)
    prompts = [tokens(5 + i, i) for i in range(4)]
    assert both_ways(llm, prompts) == []
    assert both_ways(llm, prompts[:3]) == [("prompts", 32)]


def test_a_step_that_cuts_a_prompt_draws_for_the_others(tiny_model):
    """The one that is cut, here the first, is behind them in the batch, and gets no token."""
    limits = {"max_model_len": 128, "max_num_seqs": 4, "max_num_batched_tokens": 64}
    llm = LLM(str(tiny_model), device="cpu", use_tqdm_on_load=False, **limits)
    runner, prompts = runner_of(llm), {"a": tokens(50, 1), "b": tokens(9, 2), "c": tokens(11, 3)}
    alone = {name: llm.generate([p], GREEDY, use_tqdm=False)[0].outputs[0].token_ids for name, p in prompts.items()}
    llm.llm_engine.core.step()
    new = [
        NewRequestData(name, prompt, len(prompt), GREEDY, [4 * i + j for j in range(1, 5)], i + 1, 0)
        for i, (name, prompt) in enumerate(prompts.items())
    ]
    with static_prompts(runner, SIZES) as asked:
        first = runner.execute(SchedulerOutput({"a": 30, "b": 9, "c": 11}, new)).result().sampled_token_ids
        second = runner.execute(SchedulerOutput({"b": 1, "c": 1, "a": 20})).result().sampled_token_ids
    assert asked == [("prompts", 64), ("prompt", 32)]
    assert first == {name: alone[name][:1] for name in ("b", "c")}
    assert second == {"a": alone["a"][:1], "b": alone["b"][1:2], "c": alone["c"][1:2]}
    runner.execute(SchedulerOutput(finished_request_ids=list(prompts)))


FORM = StructuredOutputsParams(regex="[0-9]{3} [a-z]{2}")
FORMED = SamplingParams(temperature=0.0, max_tokens=12, structured_outputs=FORM)
DRAWN = SamplingParams(temperature=0.8, top_p=0.9, seed=5, max_tokens=5, ignore_eos=True)


@pytest.mark.parametrize("newer,name", [([FORMED], "prompt"), ([DRAWN, GREEDY.clone(logprobs=2)], "prompts")])
def test_prompts_beside_sequences_that_decode(llm, newer, name):
    """Which are a batch of their own: constrained ones, penalised ones, and those that end in this very step."""
    older = [
        GREEDY.clone(max_tokens=9),
        FORMED,
        SamplingParams(temperature=0.9, seed=7, max_tokens=9, frequency_penalty=0.5, ignore_eos=True),
        GREEDY.clone(max_tokens=3),
    ]
    asks = [(tokens(12 + 7 * i, i), params) for i, params in enumerate([*older, *newer])]
    alone = [llm.generate([prompt], params, use_tqdm=False)[0].outputs[0].token_ids for prompt, params in asks]
    engine, found = llm.llm_engine, {}

    def step():
        for output in engine.step():
            if output.finished:
                found[output.request_id] = output.outputs[0].token_ids

    def add(first, last):
        for i in range(first, last):
            engine.add_request(str(i), {"prompt_token_ids": asks[i][0]}, asks[i][1])

    add(0, 4)
    step()
    step()
    with static_prompts(runner_of(llm), SIZES) as asked:
        add(4, len(asks))
        step()
        step()
        assert [name for name, _ in asked] == [name]
        while engine.has_unfinished_requests:
            step()
    assert [found[str(i)] for i in range(len(asks))] == alone


def test_a_prompt_whose_tokens_are_scored_is_left_alone(llm):
    scored = GREEDY.clone(prompt_logprobs=1)
    assert both_ways(llm, [tokens(20)], scored) == []
    assert both_ways(llm, [tokens(20), tokens(30)], [scored, GREEDY]) == []


def test_graphs_of_decoding_go_on_from_it(llm):
    """The sampler's batch of one is the one that decoding looks at next, padded or not."""
    runner = runner_of(llm)
    expected = llm.generate([tokens(40)], GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    for sizes in ((1, 2, 4), (2, 4)):
        with static_prompts(runner, SIZES) as asked:
            runner._graph_sizes = sizes
            try:
                got = llm.generate([tokens(40)], GREEDY, use_tqdm=False)[0].outputs[0].token_ids
            finally:
                runner._graph_sizes = ()
        assert got == expected
        batch = [("forward", sizes[0]), ("sample", sizes[0])]
        assert asked == [("prompt", 64), ("sample", sizes[0]), *batch * 3]


@pytest.mark.parametrize("chunks", [[30], [20, 10], [29, 1]])
def test_after_a_preemption(llm, chunks):
    """What was generated is computed again with the prompt, in other pages and another slot; the next token has the next index."""
    runner, prompt = runner_of(llm), tokens(26)
    generated = llm.generate([prompt], GREEDY.clone(max_tokens=6), use_tqdm=False)[0].outputs[0].token_ids
    llm.llm_engine.core.step()
    for static in (False, True):
        sequence = ByHand(runner, prompt + generated[:4], [9, 4], 3, num_prompt_tokens=26)
        if static:
            with static_prompts(runner, SIZES) as asked:
                sampled = [sequence.step(n) for n in chunks]
            assert len(asked) == len(chunks) - (chunks[-1] == 1)  # the last known token by itself is decoding
        else:
            sampled = [sequence.step(n) for n in chunks]
        assert sampled == [None] * (len(chunks) - 1) + [generated[4]]
        row = runner.batch.sequences["r"].row
        state = runner.batch.tables
        assert (state.num_computed[row], state.num_generated[row], state.last_token[row]) == (30, 5, generated[4])
        assert sequence.step(1) == generated[5]
        sequence.finish()


# Nothing of the padding anywhere


@contextmanager
def poisoned_padding(runner, batch):
    """The network's input of padding is NaN, and with it all that layers make of it."""
    embedding = runner.model.embed_tokens
    embed = embedding.forward

    def forward(ids):
        hidden = embed(ids).clone()
        hidden[int(batch._lengths.sum()) :] = NAN
        return hidden

    embedding.forward = forward
    try:
        yield
    finally:
        del embedding.forward


@pytest.mark.parametrize(
    ("prefill", "chunks"),
    [
        ("torch", [1]),
        ("torch", [15]),
        ("torch", [16]),
        ("torch", [17]),
        ("torch", [65]),
        ("torch", [300]),
        ("torch", [20, 40, 13]),
        ("torch", [1, 16, 1, 2]),
        ("torch", [64, 64, 65]),
        ("triton", [5]),
        ("triton", [40, 30]),
    ],
)
def test_poison_reaches_nobody(llm, prefill, chunks):
    """All pages, all slots and all rows of padding are NaN, the sequence's own as well before it writes them."""
    if prefill == "triton" and not triton.knobs.runtime.interpret:
        pytest.skip("needs Triton's interpreter; test_cudagraph.py has this for a GPU")
    runner, n = runner_of(llm), sum(chunks)
    llm.llm_engine.core.step()
    pages, slot = random.Random(1).sample(range(1, 60), -(-n // 16)), 5

    def compute():
        sequence = ByHand(runner, tokens(n), pages, slot)
        with recorded_logits(runner) as logits:
            sampled = [sequence.step(k) for k in chunks]
        assert runner.batch.num_computed[runner.batch.sequences["r"].row] == n
        sequence.finish()
        return sampled, logits

    expected, want = compute()
    variants = llm.llm_engine.set_gdn_variants
    variants(prefill=prefill)
    try:
        with (
            poisoned_pools(runner) as pools,
            static_prompts(runner, SIZES) as asked,
            poisoned_padding(runner, runner.prompt),
        ):
            sampled, got = compute()
            assert asked == [("prompt", padded_size(SIZES, k)) for k in chunks]
            own = torch.zeros(pools["pages"][0].shape[:2], dtype=torch.bool)
            for p in range(n):
                own[pages[p // 16], p % 16] = True
            for pool in pools["pages"]:
                assert pool[own].isfinite().all() and pool[1:][~own[1:]].isnan().all()  # zeros may go to page 0
            for pool in pools["slots"]:
                others = [i for i in range(pool.shape[0]) if i != slot]
                assert pool[slot].isfinite().all() and pool[others].isnan().all()
    finally:
        variants(prefill="torch")
    assert sampled == expected
    assert_same_logits(got, want)


def test_nobodys_prompt_leaves_everything_alone(llm):
    """What graphs are captured over, while sequences have state."""
    runner = runner_of(llm)
    llm.llm_engine.core.step()
    sequence = ByHand(runner, tokens(40), [3, 1, 7], 2)
    with static_prompts(runner, SIZES):
        sequence.step(21)
        pools = pools_of(runner)
        tables = [*runner.batch.tables, runner.batch.state_slot, runner.batch.block_table]
        kept = [*(pool[1:] for pool in (*pools["pages"], *pools["slots"])), *tables, runner.prompt._packed]
        before = [tensor.clone() for tensor in kept]
        for size, batch in itertools.product(SIZES, (runner.prompt, runner.prompts)):
            with torch.inference_mode(), batch.nobodys(size):
                runner._graph_prompt(batch, size)
            assert all(torch.equal(a, b) for a, b in zip(kept, before))
    sequence.finish()
