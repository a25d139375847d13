"""Sends requests to a server as a schedule says and notes when each token came back."""

from __future__ import annotations

import asyncio
import gc
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm.benchmarks.datasets import Sample
from vllm.benchmarks.http_client import Client, RequestFailed
from vllm.benchmarks.serve_metrics import Record

MOST_CONNECTIONS = 256
"""Opened before the first request; more are opened when they are needed."""


@dataclass(frozen=True)
class Endpoint:
    """How a server is asked.

    Attributes:
        chat: messages rather than a prompt.
        body: fields of every request, laid over what is made here.
    """

    path: str
    chat: bool
    model: str
    body: dict[str, Any] = field(default_factory=dict)

    def request(self, sample: Sample) -> dict[str, Any]:
        """The body that asks for a sample."""
        if self.chat:
            asked = {
                "messages": [{"role": "user", "content": sample.prompt}],
                "max_completion_tokens": sample.output_len,
            }
        else:
            asked = {"prompt": sample.prompt, "max_tokens": sample.output_len}
        stream = {"stream": True, "stream_options": {"include_usage": True}}
        return {"model": self.model, **asked, "temperature": 0.0, **stream, **self.body}


class Reader:
    """Turns one stream's events into a record.

    A chat's first event names a role and brings no token, and a last one may name only a reason; they are not counted. A token
    counts even where it has no text yet (half a letter), because the server has made it.
    """

    def __init__(self, record: Record, chat: bool) -> None:
        self.record, self._chat = record, chat

    def __call__(self, event: dict[str, Any], now: float) -> None:
        record = self.record
        usage = event.get("usage")
        if usage:
            record.output_len, record.counted = usage.get("completion_tokens", record.output_len), True
            record.prompt_len = usage.get("prompt_tokens", record.prompt_len)
        if "error" in event and not event.get("choices"):
            error = event["error"]
            record.error = str(error.get("message", error) if isinstance(error, dict) else error)
        for choice in event.get("choices") or ():
            text, is_token = self._text(choice)
            if is_token:
                record.arrivals.append(now)
                if text:
                    record.text.append(text)

    def _text(self, choice: dict[str, Any]) -> tuple[str, bool]:
        if not self._chat:
            text = choice.get("text") or ""
            return text, bool(text) or choice.get("finish_reason") is None
        delta = choice.get("delta") or {}
        text = (delta.get("reasoning") or delta.get("reasoning_content") or "") + (delta.get("content") or "")
        silent = delta.get("content") == "" and "role" not in delta and choice.get("finish_reason") is None
        return text, bool(text or delta.get("tool_calls") or silent)


def arrival_times(count: int, rate: float, burstiness: float, seed: int = 0) -> list[float]:
    """Seconds after the start at which requests are sent.

    Gaps are drawn from a gamma distribution of shape `burstiness` and mean 1 / rate: 1 makes a Poisson process, less makes bursts, more makes
    arrivals even. They are then scaled so that the last request is sent at count / rate, so that two runs offer the same load.
    """
    if rate == float("inf"):
        return [0.0] * count
    draw = random.Random(seed)
    times, now = [], 0.0
    for _ in range(count):
        now += draw.gammavariate(burstiness, 1 / (rate * burstiness))
        times.append(now)
    return [moment * count / rate / times[-1] for moment in times]


async def ask(client: Client, endpoint: Endpoint, sample: Sample, request: bytes | None = None) -> Record:
    """One request from sending to its end. A failure is the record's `error`; only its absence of an answer is the caller's to see."""
    record = Record(sample.prompt_len, sample.output_len)
    await _ask(client, endpoint, record, request or client.prepare(endpoint.path, endpoint.request(sample)))
    return record


async def _ask(client: Client, endpoint: Endpoint, record: Record, request: bytes) -> None:
    record.start = time.perf_counter()
    try:
        await client.stream(request, Reader(record, endpoint.chat))
    except RequestFailed as error:
        record.error = str(error)
    except asyncio.CancelledError:
        record.error = "interrupted"
        raise
    if record.error is None and not record.arrivals:
        record.error = "the answer has no tokens"
        if record.counted and record.output_len:
            record.error = f"nothing tells when the answer's {record.output_len} tokens came: they have no text"
            record.error += " (--backend openai shows those too)" if endpoint.chat else ""
    if not record.counted:
        record.output_len = len(record.arrivals)


async def wait_until_ready(
    client: Client, endpoint: Endpoint, sample: Sample, seconds: float, say: Callable[[str], None]
) -> None:
    """Ask until there is an answer.

    Raises:
        RequestFailed: there was none in that time; or one that waiting does not change, such as an unknown model.
    """
    end, said = time.monotonic() + seconds, False
    while True:
        record = Record(sample.prompt_len, sample.output_len)
        try:
            await client.stream(client.prepare(endpoint.path, endpoint.request(sample)), Reader(record, endpoint.chat))
            if record.error is None:
                return
            problem = RequestFailed(record.error)
        except RequestFailed as error:
            problem = error
        wrong = problem.status is not None and 400 <= problem.status < 500 and problem.status != 429
        if wrong or time.monotonic() >= end:
            raise problem
        if not said:
            say(f"waiting up to {seconds:g} s for the server: {problem}")
            said = True
        await asyncio.sleep(min(1.0, max(end - time.monotonic(), 0.01)))


async def drive(
    client: Client,
    endpoint: Endpoint,
    samples: Sequence[Sample],
    times: Sequence[float],
    max_concurrency: int | None,
    records: list[Record],
    on_done: Callable[[Record], None] = lambda record: None,
) -> None:
    """Send everything; `records` gets one entry a sample at once, so that what there is can be read whatever ends this."""
    requests = [client.prepare(endpoint.path, endpoint.request(sample)) for sample in samples]
    records += [Record(sample.prompt_len, sample.output_len) for sample in samples]
    room = asyncio.Semaphore(max_concurrency) if max_concurrency else None

    async def one(record: Record, request: bytes) -> None:
        if room is None:
            await _ask(client, endpoint, record, request)
        else:
            async with room:
                await _ask(client, endpoint, record, request)
        on_done(record)

    await client.connect(min(len(samples), max_concurrency or len(samples), MOST_CONNECTIONS))
    tasks: list[asyncio.Task[None]] = []
    gc.collect()
    gc.disable()  # a collection in the middle would be measured as the server's
    start = time.perf_counter()
    try:
        for record, request, moment in zip(records, requests, times):
            delay = start + moment - time.perf_counter()
            if delay > 0:
                await asyncio.sleep(delay)
            tasks.append(asyncio.create_task(one(record, request)))
        await asyncio.gather(*tasks)
    finally:
        gc.enable()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
