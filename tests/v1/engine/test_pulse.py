"""An engine that is there and does not get on: noticed, and not confused with one that works hard."""

import asyncio
import signal

import pytest

from tests.v1.engine.engines import params, running, until
from tests.v1.engine.stub_cores import BusyCore, PacedCore, StuckCore
from vllm.v1.engine import pulse
from vllm.v1.engine.exceptions import EngineStalledError

pytestmark = pytest.mark.usefixtures("own_temp")


@pytest.mark.parametrize(
    ("seconds", "worked", "silence", "on_gpu", "words"),
    [
        (0, 0, 0, True, None),
        (0, 0, 0, False, None),
        (0, 0, 21, False, "not been heard of for 21 s"),
        (0, 0, 19, True, None),
        (299, 0, 1, True, None),
        (301, 301, 1, True, "has taken 301 s"),
        (59, 0, 1, False, None),
        (61, 0.5, 1, False, "in which it worked 0.5 s"),
        (36000, 30000, 1, False, None),  # a long prompt on a slow machine, among others' work
        (36000, 3600, 1, False, None),
    ],
)
def test_what_is_a_stall(seconds, worked, silence, on_gpu, words):
    reason = pulse.why_stalled(seconds, worked, silence, on_gpu)
    assert reason is None if words is None else words in reason


def test_a_pulse():
    beat = pulse.Pulse()
    assert beat.read() == (0, 0)
    beat.step_begins()
    total = sum(range(200_000))
    seconds, worked = beat.read()
    assert total and seconds >= worked > 0
    beat.step_ends()
    assert beat.read() == (0, 0)


async def health(engine):
    try:
        await engine.check_health()
    except EngineStalledError as error:
        return str(error)


async def ask_for_one(engine):
    stream = await engine.add_request([1, 2], params(5), "r")
    await asyncio.sleep(0.05)
    return stream


@pytest.fixture
def quick(monkeypatch):
    """The bounds, for tests. A beat still comes once a second."""
    monkeypatch.setattr(pulse, "LONGEST_SILENCE", 2.5)
    monkeypatch.setattr(pulse, "LONGEST_REST", 1.2)


@pytest.mark.parametrize("processes", ["0", "1"])
def test_a_step_that_waits_for_ever(quick, monkeypatch, processes):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", processes)
    monkeypatch.setattr(StuckCore, "seconds", 4.0)  # a thread cannot be killed

    async def main():
        async with running(StuckCore) as engine:
            assert await health(engine) is None
            await asyncio.wrap_future(engine._long_prompts)  # reading that tokenizer would be work of this process too
            stream = await ask_for_one(engine)
            reasons = []
            while not reasons or reasons[-1] is None:
                await asyncio.sleep(0.1)
                reasons.append(await health(engine))
                assert len(reasons) < 100
            assert reasons[0] is None and "in which it worked 0.0 s" in reasons[-1]
            assert engine.is_running and not engine.errored, "it may come back"
            await stream.aclose()

    asyncio.run(main())


def test_a_step_that_works_for_long(quick):
    async def main():
        async with running(BusyCore) as engine:
            stream = await ask_for_one(engine)
            for _ in range(25):
                await asyncio.sleep(0.1)
                assert await health(engine) is None
            await stream.aclose()

    asyncio.run(main())


def test_a_process_that_is_stopped_and_goes_on(quick):
    async def main():
        async with running(PacedCore) as engine:
            engine._client._process.send_signal(signal.SIGSTOP)
            reason = None
            for _ in range(80):
                await asyncio.sleep(0.1)
                if (reason := await health(engine)) is not None:
                    break
            assert "has not been heard of" in reason
            engine._client._process.send_signal(signal.SIGCONT)
            healthy = []

            async def look():
                while True:
                    healthy.append(await health(engine) is None)
                    await asyncio.sleep(0.05)

            looking = asyncio.ensure_future(look())
            await until(lambda: healthy and healthy[-1], "the next beat")
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)

    asyncio.run(main())
