"""What the tests of the asynchronous engine share."""

import asyncio
import contextlib
import os
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

from vllm import EngineArgs, SamplingParams
from vllm.config.checkpoint import TINY
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

DELTA = RequestOutputKind.DELTA


def make_config(**overrides):
    settings = {"max_model_len": 256, "max_num_seqs": 8, "device": "cpu", "use_tqdm_on_load": False} | overrides
    return EngineArgs(str(TINY), **settings).create_engine_config()


def params(max_tokens=8, **changes):
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **changes)


@contextlib.asynccontextmanager
async def running(core_class=None, **overrides):
    """A started engine, ended afterwards; and nothing of it may stay."""
    before = resources()
    engine = AsyncLLM(make_config(**overrides), core_class=core_class)
    try:
        await engine.start()
        yield engine
    finally:
        engine.shutdown()
    await asyncio.sleep(0)
    assert engine.num_unfinished_requests == 0 and not engine.output_processor.has_unfinished_requests
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert_left_nothing(before)


def resources():
    """Child processes, open sockets and pipes, and temporary folders of this process, by name."""
    me = psutil.Process()
    links = [target for target in _links("/proc/self/fd") if target.startswith(("socket:", "anon_inode:", "pipe:"))]
    return Counter([*(f"process {child.pid}" for child in me.children(recursive=True)), *links, *folders()])


def assert_left_nothing(before):
    """Nothing has come since `before` that is still there; what others had left behind may have gone meanwhile.

    `before` was taken on the same side of asyncio.run: an event loop has descriptors of its own.
    """
    end = time.monotonic() + 5
    while left := resources() - before:
        assert time.monotonic() < end, f"left behind: {', '.join(left)}"
        time.sleep(0.01)


def folders():
    return {path.name for path in Path(tempfile.gettempdir()).glob("vllm-*")}


def _links(folder):
    for name in os.listdir(folder):
        with contextlib.suppress(OSError):
            yield os.readlink(f"{folder}/{name}")


async def until(condition, what, seconds=5.0):
    """Wait for something that is true soon."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        await asyncio.sleep(0.01)


async def collect(stream):
    """All outputs of a stream."""
    return [output async for output in stream]


def tokens_of(outputs):
    """The tokens of a DELTA stream with one sequence."""
    return [token for output in outputs for completion in output.outputs for token in completion.token_ids]
