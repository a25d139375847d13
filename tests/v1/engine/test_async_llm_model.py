"""The asynchronous engine on the real bundled checkpoint, in a real process of its own."""

import asyncio
import random

import pytest

from tests.v1.engine.engines import DELTA, collect, params, running, tokens_of, until
from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind

pytestmark = pytest.mark.usefixtures("own_temp")

LENGTHS = (1, 2, 15, 16, 17, 33, 60, 100)


@pytest.fixture(scope="module")
def prompts():
    rng = random.Random(0)
    return [[rng.randrange(900) for _ in range(n)] for n in LENGTHS] + ["1 + 2 =", "Hello wörld 😀", "Count: 5 6 7"]


@pytest.fixture(scope="module")
def wanted(prompts):
    greedy = [params(5 + i, logprobs=2) for i in range(len(prompts))]
    drawn = [SamplingParams(temperature=1.5, seed=i, max_tokens=12, ignore_eos=True) for i in range(len(prompts))]
    return [*zip(prompts, greedy, strict=True), *zip(prompts, drawn, strict=True)]


@pytest.fixture(scope="module")
def answers(tiny_model, wanted):
    llm = LLM(str(tiny_model), max_model_len=256, max_num_seqs=8, device="cpu", use_tqdm_on_load=False)
    return llm.generate([prompt for prompt, _ in wanted], [p for _, p in wanted], use_tqdm=False)


def test_llm_counts_the_same(tiny_model, prompts):
    llm = LLM(str(tiny_model), max_model_len=256, max_num_seqs=8, device="cpu", use_tqdm_on_load=False)
    outputs = llm.generate(prompts, params(3), use_tqdm=False)
    found = {metric.name: metric for metric in llm.get_metrics()}
    assert found["vllm:prompt_tokens"].value == sum(len(output.prompt_token_ids) for output in outputs)
    assert found["vllm:generation_tokens"].value == 3 * len(prompts)
    assert found["vllm:e2e_request_latency_seconds"].count == len(prompts)
    assert found["vllm:num_requests_running"].value == found["vllm:kv_cache_usage_perc"].value == 0


async def check(engine, i, wanted, answer):
    """A request of any kind gives what LLM gives."""
    prompt, sampling_params = wanted
    kind = list(RequestOutputKind)[i % 3]
    outputs = await collect(engine.generate(prompt, sampling_params.clone(output_kind=kind), f"r{i}"))
    expected = answer.outputs[0]
    last = outputs[-1].outputs[0]
    assert outputs[-1].finished and outputs[-1].prompt_token_ids == answer.prompt_token_ids
    assert (last.finish_reason, last.stop_reason) == (expected.finish_reason, expected.stop_reason)
    if kind is not DELTA:
        assert (last.text, last.token_ids) == (expected.text, expected.token_ids)
        assert repr(last.logprobs)[:200] == repr(expected.logprobs)[:200] or last.logprobs
        return
    assert tokens_of(outputs) == expected.token_ids
    assert "".join(o.outputs[0].text for o in outputs) == expected.text
    if expected.logprobs is not None:
        logprobs = [scores for o in outputs for scores in o.outputs[0].logprobs]
        assert [list(scores) for scores in logprobs] == [list(scores) for scores in expected.logprobs]
        for ours, theirs in zip(logprobs, expected.logprobs, strict=True):
            assert [s.logprob for s in ours.values()] == pytest.approx([s.logprob for s in theirs.values()], abs=1e-4)


@pytest.mark.parametrize("multiprocessing", ["1", "0"])
def test_concurrent_requests_give_what_llm_gives(monkeypatch, wanted, answers, multiprocessing):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", multiprocessing)

    async def main():
        async with running() as engine:
            await asyncio.gather(*(check(engine, i, *pair) for i, pair in enumerate(zip(wanted, answers, strict=True))))
            count = engine.metrics
            assert count.generation_tokens == sum(len(a.outputs[0].token_ids) for a in answers)
            assert count.prompt_tokens == sum(len(a.prompt_token_ids) for a in answers)
            assert count.finished["length"] == len(answers) and count.step_tokens.sum >= count.prompt_tokens
            assert (count.num_running, count.num_waiting, count.kv_cache_usage) == (0, 0, 0)

    asyncio.run(main())


def test_preemptions_change_no_answer_and_count_no_token_twice(wanted, answers):
    async def main():
        async with running(num_gpu_blocks_override=1 + 16, max_num_batched_tokens=16) as engine:
            pairs = list(zip(wanted, answers, strict=True))
            long = params(60, output_kind=DELTA)  # a hundred tokens that need more and more pages
            extra = [asyncio.ensure_future(collect(engine.generate([3] * 40, long, f"long{i}"))) for i in range(4)]
            await asyncio.gather(*(check(engine, i, *pair) for i, pair in enumerate(pairs)))
            texts = [tokens_of(outputs) for outputs in await asyncio.gather(*extra)]
            assert all(text == texts[0] and len(text) == 60 for text in texts)
            count = engine.metrics
            assert count.num_preemptions > 0
            assert count.generation_tokens == sum(len(a.outputs[0].token_ids) for a in answers) + 4 * 60
            assert count.prompt_tokens == sum(len(a.prompt_token_ids) for a in answers) + 4 * 40
            assert count.time_to_first_token.counts != [0] * len(count.time_to_first_token.counts)
            assert count.step_tokens.sum > count.prompt_tokens + count.generation_tokens - len(answers) - 4

    asyncio.run(main())


def test_aborted_requests_give_pages_and_slots_back_within_a_second():
    async def main():
        async with running(max_num_seqs=4) as engine:
            endless = params(200, output_kind=DELTA)
            for _ in range(3):
                tasks = [
                    asyncio.ensure_future(collect(engine.generate([i, 2, 3], endless, f"r{i}"))) for i in range(12)
                ]
                await until(lambda: (engine.metrics.num_running, engine.metrics.num_waiting) == (4, 8), "work")
                assert engine.metrics.kv_cache_usage > 0
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                assert (engine.metrics.num_running, engine.metrics.num_waiting) == (0, 0)
                await until(lambda: engine.metrics.kv_cache_usage == 0, "pages are still held", seconds=1)
            assert len(tokens_of(await collect(engine.generate([1], params(5, output_kind=DELTA), "after")))) == 5

    asyncio.run(main())


def test_pages_that_do_not_suffice_are_an_error_at_start(capfd):
    async def main():
        with pytest.raises(ValueError) as caught:
            async with running(kv_cache_memory_bytes=1000):
                pass
        assert "\n" not in str(caught.value)

    asyncio.run(main())
    assert "Traceback" not in capfd.readouterr().err


def test_sizes_are_told():
    async def main():
        async with running(num_gpu_blocks_override=1 + 16) as engine:
            assert 'num_gpu_blocks="17"' in engine.metrics.render().decode()
            for iterator in (engine.generate([1], None, "a"), engine.generate("1 + 2 =", None, "b")):
                assert (await anext(iterator)).outputs[0].token_ids
                await iterator.aclose()

    asyncio.run(main())
