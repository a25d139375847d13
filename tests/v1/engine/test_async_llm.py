"""The asynchronous engine around cores without a model: streams, ends of all kinds, limits and deaths."""

import asyncio
import gc
import time

import pytest
import zmq

from tests.v1.engine.engines import (
    DELTA,
    assert_left_nothing,
    collect,
    make_config,
    params,
    resources,
    running,
    tokens_of,
    until,
)
from tests.v1.engine.stub_cores import (
    CallableCore,
    FailingCore,
    LosingCore,
    PacedCore,
    RefusingCore,
    StuckCore,
    TinyPoolCore,
)
from vllm.benchmarks.stub_core import StubCore
from vllm.engine.arg_utils import EngineArgs
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import async_llm
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineOverloadedError

pytestmark = pytest.mark.usefixtures("own_temp")

ENDLESS = params(200, output_kind=DELTA)


@pytest.fixture(params=["process", "thread"])
def mode(request, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0" if request.param == "thread" else "1")
    return request.param


@pytest.fixture
def in_thread(monkeypatch):
    """For what does not depend on where the core runs."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


async def freed(engine):
    await until(lambda: engine.metrics.kv_cache_usage == 0, "the core still runs something", seconds=1)


def test_many_streams(mode):
    async def one(engine, i):
        outputs = await collect(engine.generate([1, 2, i], params(1 + i % 7, output_kind=DELTA), f"r{i}"))
        assert tokens_of(outputs) == [i + 1 + k for k in range(1 + i % 7)]
        assert [o.finished for o in outputs] == [False] * (len(outputs) - 1) + [True]
        assert outputs[-1].outputs[0].finish_reason == "length" and outputs[0].request_id == f"r{i}"

    async def main():
        async with running(StubCore) as engine:
            await asyncio.gather(*(one(engine, i) for i in range(100)))
            assert engine.is_running and not engine.errored and engine.num_unfinished_requests == 0
            await engine.check_health()

    asyncio.run(main())


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_output_kinds_and_n(in_thread, kind):
    async def main():
        async with running(StubCore) as engine:
            wanted = SamplingParams(n=3, temperature=1.0, max_tokens=5, ignore_eos=True, output_kind=kind)
            outputs = await collect(engine.generate([7], wanted, "r"))
            assert outputs[-1].finished and not any(o.finished for o in outputs[:-1])
            if kind is DELTA:
                for i in range(3):
                    got = [t for o in outputs for c in o.outputs if c.index == i for t in c.token_ids]
                    assert got == [8, 9, 10, 11, 12]
            else:
                assert [c.token_ids for c in outputs[-1].outputs] == [[8, 9, 10, 11, 12]] * 3
            if kind is RequestOutputKind.FINAL_ONLY:
                assert len(outputs) == 1

    asyncio.run(main())


@pytest.mark.parametrize("kind", [DELTA, RequestOutputKind.CUMULATIVE])
def test_a_slow_reader_gets_everything_in_few_objects(mode, kind):
    def alive() -> int:
        gc.collect()
        return sum(type(thing) is RequestOutput for thing in gc.get_objects())

    async def main():
        before = alive()  # other tests of this process may have kept some
        async with running(StubCore, max_model_len=4096) as engine:
            wanted = params(4000, output_kind=kind)
            slow = await engine.add_request([1], wanted, "slow")
            quick = tokens_of(await collect(engine.generate([1], wanted.clone(output_kind=DELTA), "quick")))
            assert alive() <= before + 1
            await until(lambda: engine.num_unfinished_requests == 0, "the end")
            outputs = await collect(slow)
            assert len(outputs) == 1 and outputs[0].finished
            assert outputs[0].outputs[0].token_ids == quick == [(2 + i) % 1024 for i in range(4000)]

    asyncio.run(main())


def test_text_of_a_slow_reader_is_that_of_a_quick_one(in_thread):
    async def main():
        async with running(PacedCore) as engine:

            async def read(name, pause):
                text = ""
                async for output in engine.generate([30], params(40, output_kind=DELTA), name):
                    text += output.outputs[0].text
                    await asyncio.sleep(pause)
                return text

            texts = await asyncio.gather(read("a", 0), read("b", 0.07), read("c", 0.2))
            assert texts[0] and len(set(texts)) == 1

    asyncio.run(main())


async def close_iterator(engine):
    iterator = engine.generate([1], ENDLESS, "r")
    await anext(iterator)
    await iterator.aclose()


async def cancel_task(engine):
    task = asyncio.ensure_future(collect(engine.generate([1], ENDLESS, "r")))
    await until(lambda: engine.metrics.generation_tokens, "a token")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def leave_loop(engine):
    async with await engine.add_request([1], ENDLESS, "r") as stream:
        async for _ in stream:
            break


async def drop_stream(engine):
    stream = await engine.add_request([1], ENDLESS, "r")
    await anext(stream)
    del stream
    gc.collect()


async def abort_by_id(engine):
    stream = await engine.add_request([1], ENDLESS, "r")
    await anext(stream)
    engine.abort("r")
    engine.abort(["r", "nobody"])
    outputs = await collect(stream)
    assert outputs[-1].finished and outputs[-1].outputs[0].finish_reason == "abort"
    assert await collect(stream) == []


@pytest.mark.parametrize("end", [close_iterator, cancel_task, leave_loop, drop_stream, abort_by_id])
def test_ends_from_outside_reach_the_core(mode, end):
    async def main():
        async with running(PacedCore) as engine:
            other = asyncio.ensure_future(collect(engine.generate([5], params(30, output_kind=DELTA), "other")))
            await end(engine)
            await until(lambda: engine.num_unfinished_requests <= 1, "the end", seconds=1)
            await until(lambda: engine.metrics.kv_cache_usage <= 1 / 8, "the core still runs it", seconds=1)
            again = await collect(engine.generate([9], params(3, output_kind=DELTA), "r"))  # the id is free at once
            assert tokens_of(again) == [10, 11, 12]
            assert tokens_of(await other) == list(range(6, 36))
            await freed(engine)
            assert engine.metrics.finished == {"stop": 0, "length": 2, "abort": 1}

    asyncio.run(main())


def test_an_id_used_again_at_once_gets_its_own_outputs(mode):
    async def main():
        async with running(StubCore, max_model_len=4096) as engine:
            for i in range(50):
                stream = await engine.add_request([500 * (i % 2)], params(2000, output_kind=DELTA), "same")
                output = await anext(stream)
                assert output.outputs[0].token_ids[0] == 500 * (i % 2) + 1
                await stream.aclose()

    asyncio.run(main())


def test_stop_strings_end_the_request_in_the_core(mode):
    async def main():
        async with running(PacedCore) as engine:
            text = engine.get_tokenizer().decode([61, 62, 63])
            outputs = await collect(engine.generate([50], ENDLESS.clone(stop=[text[:2]]), "r"))
            assert outputs[-1].outputs[0].finish_reason == "stop"
            await freed(engine)

    asyncio.run(main())


def test_impossible_requests_are_value_errors_before_anything_is_queued(mode):
    async def main():
        async with running(TinyPoolCore, max_num_queued_requests=2, max_num_seqs=2) as engine:
            for prompt, wanted, word in [
                ("", params(), "at least one token"),
                ([], params(), "at least one token"),
                ([5000], params(), "0 to 1023"),
                ([1] * 300, params(), "--max-model-len 256"),
                ([1] * 40, params(), "pages hold 32"),
                ("a" * 100_000, params(), "--max-model-len 256"),
                ([1] * 100_000, params(), "--max-model-len 256"),
                ({"prompt": 7}, params(), "prompt must be"),
                ("\ud800", params(), "surrogate"),
                ("\ud800" * 10_000, params(), "surrogate"),
                ([1], params(logprobs=50), "--max-logprobs"),
                ([1], params().clone(temperature=1.0, n=5), "n must be at most 4"),
                ([1], params().clone(temperature=1.0, n=10**12), "n must be at most 4"),
            ]:
                with pytest.raises(ValueError, match=word):
                    await engine.add_request(prompt, wanted, "r")
                with pytest.raises(ValueError, match=word):
                    await anext(engine.generate(prompt, wanted, "r"))
                assert engine.num_unfinished_requests == 0
            if mode == "process":
                for impossible in ({"top_k": 1 << 70}, {"extra_args": {"x": object()}}):
                    with pytest.raises(ValueError, match="cannot take"):
                        await engine.add_request([1], params(**impossible), "r")
            stream = await engine.add_request([1], params(3, stop=["\ud800"]), "r")
            with pytest.raises(ValueError, match="'r' is in use"):
                await engine.add_request([1], params(), "r")
            assert (await collect(stream))[-1].finished
            [dropped] = await collect(engine.generate([13], params(), "unlucky"))
            assert dropped.outputs[0].finish_reason == "abort"
            await engine.check_health()

    asyncio.run(main())


def test_long_prompts_do_not_hold_the_loop_up(in_thread):
    async def main():
        async with running(StubCore, max_model_len=4096) as engine:
            worst, last = 0.0, time.perf_counter()

            async def beat():
                nonlocal worst, last
                while True:
                    await asyncio.sleep(0.001)
                    now = time.perf_counter()
                    worst, last = max(worst, now - last), now

            await engine._loop.run_in_executor(None, engine._long_prompts.result)
            heart = asyncio.ensure_future(beat())
            start = time.perf_counter()
            with pytest.raises(ValueError, match="--max-model-len 4096"):
                await engine.add_request("many words " * 60_000, params(), "long")
            seconds = time.perf_counter() - start
            heart.cancel()
            assert seconds > 0.2 and worst < max(0.2, seconds / 3)
            text = "some words " * 800
            assert len(text) > async_llm.LONG_PROMPT
            stream = await engine.add_request(text, params(2), "fits")
            assert stream.prompt_token_ids == engine.get_tokenizer().encode(text)
            assert (await collect(stream))[-1].prompt == text
            await asyncio.gather(heart, return_exceptions=True)

    asyncio.run(main())


def test_a_full_queue_refuses(mode, monkeypatch):
    async def main():
        async with running(PacedCore, max_num_seqs=2, max_num_queued_requests=3) as engine:
            steps, step = [], engine.metrics.step
            note = lambda stats, *rest: steps.append((stats.num_running, stats.num_waiting)) or step(stats, *rest)
            monkeypatch.setattr(engine.metrics, "step", note)
            streams = [await engine.add_request([1], params(20), f"r{i}") for i in range(5)]
            for _ in range(3):
                with pytest.raises(EngineOverloadedError, match="5 sequences run or wait") as caught:
                    await engine.add_request([1], params(20), "late")
                assert caught.value.retry_after >= 1
            await until(lambda: (2, 3) in steps, "two that run")
            await streams.pop().aclose()
            streams.append(await engine.add_request([1], params(20), "late"))
            for stream in streams:
                assert len((await collect(stream))[-1].outputs[0].token_ids) == 20

    asyncio.run(main())


def test_drain(mode):
    async def main(tokens, timeout):
        async with running(PacedCore) as engine:
            assert await engine.drain(0.1) if tokens == 0 else True
            streams = [await engine.add_request([1], params(tokens), f"r{i}") for i in range(3)] if tokens else []
            readers = [asyncio.ensure_future(collect(stream)) for stream in streams]
            draining = asyncio.ensure_future(engine.drain(timeout))
            await asyncio.sleep(0)
            with pytest.raises(EngineOverloadedError, match="shutting down"):
                await engine.add_request([1], params(), "late")
            finished = await draining
            reasons = {outputs[-1].outputs[0].finish_reason for outputs in await asyncio.gather(*readers)}
            return finished, reasons

    assert asyncio.run(main(20, 5.0)) == (True, {"length"})
    assert asyncio.run(main(200, 0.1)) == (False, {"abort"})
    assert asyncio.run(main(0, 5.0)) == (True, set())


async def kill(engine):
    engine._client._process.kill()


async def shut_down(engine):
    engine.shutdown()


@pytest.mark.parametrize(
    ("end", "reason"), [(kill, "killed by signal 9"), (shut_down, "the engine was shut down")], ids=["kill", "shutdown"]
)
def test_death_reaches_everybody(end, reason):
    async def main():
        async with running(PacedCore) as engine:
            readers = [asyncio.ensure_future(collect(engine.generate([1], ENDLESS, f"r{i}"))) for i in range(20)]
            unread = await engine.add_request([1], ENDLESS, "unread")
            done = await engine.add_request([1], params(1), "done")
            await until(lambda: engine.metrics.generation_tokens > 40, "tokens")
            start = time.monotonic()
            await end(engine)
            errors = await asyncio.wait_for(asyncio.gather(*readers, return_exceptions=True), 1)
            assert time.monotonic() - start < 1
            errors += await asyncio.gather(collect(unread), engine.check_health(), return_exceptions=True)
            errors += await asyncio.gather(engine.add_request([1], ENDLESS, "late"), return_exceptions=True)
            assert all(type(e) is EngineDeadError and reason in str(e) for e in errors), errors
            assert len((await collect(done))[-1].outputs[0].token_ids) == 1, "it had finished before"
            assert engine.errored and not engine.is_running and reason in str(engine.dead_error)
            engine.abort("r1")
            assert await engine.drain(1) is False

    asyncio.run(main())


def test_a_request_in_the_moment_of_death_is_told_of_it():
    async def main():
        async with running(PacedCore) as engine:
            await kill(engine)
            engine._client._process.wait()
            while engine._client._commands.poll(0, zmq.POLLOUT):
                time.sleep(0.001)
            errors = await asyncio.gather(
                collect(await engine.add_request([1], ENDLESS, "r")),
                engine.reset_prefix_cache(),
                return_exceptions=True,
            )
            assert all(type(e) is EngineDeadError and "killed by signal 9" in str(e) for e in errors), errors

    asyncio.run(main())


@pytest.mark.parametrize(("core", "reason"), [(FailingCore, "out of luck"), (LosingCore, "1 page lost")])
def test_a_failure_in_the_core_is_a_death(mode, core, reason):
    async def main():
        async with running(core) as engine:
            outputs = await asyncio.gather(collect(engine.generate([1], params(5), "r")), return_exceptions=True)
            await until(lambda: engine.errored, "the death")
            assert core is LosingCore or isinstance(outputs[0], EngineDeadError)
            with pytest.raises(EngineDeadError, match=reason):
                await engine.check_health()

    asyncio.run(main())


@pytest.mark.parametrize(("part", "method"), [("output_processor", "_add_tokens"), ("metrics", "step")])
def test_outputs_that_cannot_be_processed_are_a_death(mode, monkeypatch, part, method):
    async def main():
        async with running(PacedCore) as engine:
            monkeypatch.setattr(getattr(engine, part), method, None)
            with pytest.raises(EngineDeadError, match="cannot be processed"):
                await collect(engine.generate([1], ENDLESS, "r"))

    asyncio.run(main())


def test_a_start_that_fails(mode):
    async def main():
        engine = AsyncLLM(make_config(), core_class=RefusingCore)
        with pytest.raises(EngineDeadError, match="not been started"):
            await engine.check_health()
        with pytest.raises(ValueError, match="is odd; use 6"):
            await engine.start()
        assert engine.errored
        with pytest.raises(EngineDeadError, match="is odd"):
            await engine.add_request([1], params(), "r")
        engine.shutdown()

    before = resources()
    asyncio.run(main())
    assert_left_nothing(before)


def test_a_start_that_is_given_up(mode):
    async def main():
        engine = AsyncLLM(make_config(), core_class=StubCore)
        starting = asyncio.ensure_future(engine.start())
        await asyncio.sleep(0)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        await asyncio.sleep(0.1)
        assert engine.errored

    before = resources()
    asyncio.run(main())
    assert_left_nothing(before)


def test_a_constructor_that_fails_leaves_nothing(mode):
    before = resources()
    with pytest.raises(FileNotFoundError, match="--tokenizer"):
        AsyncLLM(make_config(tokenizer="./nowhere"), core_class=StubCore)
    assert_left_nothing(before)
    engine = AsyncLLM(make_config(), core_class=StubCore)
    engine.shutdown()
    assert_left_nothing(before)


def test_a_forgotten_engine_leaves_nothing():
    async def main():
        engine = AsyncLLM(make_config(), core_class=StubCore)
        await engine.start()
        stream = await engine.add_request([1], ENDLESS, "r")
        await anext(stream)

    before = resources()
    asyncio.run(main())
    gc.collect()
    assert_left_nothing(before)


def test_calls_between_the_steps(mode):
    """Their results and their errors come back to who asked, and cost nobody else anything."""

    async def main():
        async with running(CallableCore) as engine:
            assert await asyncio.gather(*(engine.reset_prefix_cache() for _ in range(3))) == [True] * 3
            with pytest.raises(ValueError, match="it has been started"):
                await engine.start_profile()
            with pytest.raises(ValueError, match="OSError: the disk is full"):
                await engine.stop_profile()
            given_up = asyncio.ensure_future(engine.reset_prefix_cache())
            await asyncio.sleep(0)
            given_up.cancel()
            assert await engine.reset_prefix_cache() is True and not engine._calls
            stream = await engine.add_request([1], params(3), "r")
            assert (await collect(stream))[-1].finished
        with pytest.raises(EngineDeadError):
            await engine.reset_prefix_cache()

    asyncio.run(main())


def test_one_stream_has_one_reader():
    async def main():
        async with running(StuckCore) as engine:
            stream = await engine.add_request([1], ENDLESS, "r")
            first = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0)
            with pytest.raises(RuntimeError, match="one reader"):
                await anext(stream)
            first.cancel()
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(anext(stream), 0.01)
            assert engine.num_unfinished_requests == 1, "a read that is given up does not end the request"
            await stream.aclose()

    asyncio.run(main())


def test_parameters_and_tokenizer(in_thread):
    async def main():
        async with running(StubCore) as engine:
            assert engine.get_tokenizer().encode("1 + 2") and engine.model_config is engine.config.model_config
            assert engine.default_sampling_params(max_tokens=3).max_tokens == 3
            stream = await engine.add_request("1 + 2 =", None, "r", priority=-3)
            assert stream.sampling_params.seed is not None and stream.request_id == "r"
            await stream.aclose()

    asyncio.run(main())


def test_from_engine_args(in_thread):
    engine = AsyncLLM.from_engine_args(EngineArgs("preset:tiny", device="cpu", disable_log_stats=True))
    assert engine._throughput is None and engine.max_num_sequences == 256 + 4096
    engine.shutdown()
