"""The engine's side of one HTTP request: its prompts as engine requests, their outputs, and their end."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from vllm.entrypoints.openai.errors import APIError
from vllm.entrypoints.openai.renderer import Prompt
from vllm.logger import init_logger
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.async_llm import SHUTTING_DOWN, AsyncLLM
from vllm.v1.engine.request_stream import RequestStream

logger = init_logger(__name__)


class Generation:
    """Prompts that run in the engine for one HTTP request. `close` must be called, whatever happens.

    Args:
        engine: queues the prompts.
        request_id: the client's or a new one.
        log: say in the log when the request comes and when it is done.
    """

    def __init__(self, engine: AsyncLLM, request_id: str, log: bool = False) -> None:
        self._engine = engine
        self._log = log
        self._started = time.perf_counter()
        self.request_id = request_id
        self._prefix = f"{request_id}-{uuid.uuid4().hex[:8]}"  # clients may use an id twice
        self._streams: list[RequestStream] = []
        self._num_tokens = 0
        self._num_finished = 0
        self._is_constrained = False

    async def submit(self, prompt: Prompt, params: SamplingParams, priority: int = 0) -> None:
        """Queue one more prompt. Raises ValueError or EngineOverloadedError; prompts before it stay queued until `close`."""
        self._is_constrained = params.structured_outputs is not None
        engine_id = f"{self._prefix}-{len(self._streams)}"
        self._streams.append(await self._engine.add_request(prompt.for_engine(), params, engine_id, priority=priority))
        if self._log:
            logger.info("Request %s: %d prompt tokens, %s", self.request_id, len(prompt.token_ids), params)

    async def finals(self) -> list[RequestOutput]:
        """The whole output of each prompt, for requests whose outputs come only at the end."""
        return [self._seen(output) for stream in self._streams async for output in stream]

    async def outputs(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        """(number of the prompt, output) as they come."""
        if len(self._streams) == 1:
            async for output in self._streams[0]:
                yield 0, self._seen(output)
            return
        merged: asyncio.Queue[Any] = asyncio.Queue(len(self._streams))
        pumps = [asyncio.ensure_future(_pump(i, stream, merged)) for i, stream in enumerate(self._streams)]
        try:
            while self._num_finished < len(pumps):
                number, item = await merged.get()
                if isinstance(item, Exception):
                    raise item
                yield number, self._seen(item)
        finally:
            for pump in pumps:
                pump.cancel()

    async def close(self) -> None:
        """Abort what still runs. May be called again."""
        for stream in self._streams:
            await stream.aclose()
        if self._log and self._streams:
            seconds = time.perf_counter() - self._started
            ended = "done" if self._num_finished == len(self._streams) else "aborted"
            logger.info("Request %s: %s after %.3f s, %d tokens", self.request_id, ended, seconds, self._num_tokens)
            self._log = False

    def _seen(self, output: RequestOutput) -> RequestOutput:
        """Count an output. Raises APIError for one that was aborted, but not by its client: who has left reads nothing."""
        for completion in output.outputs:
            if completion.finish_reason == "abort":
                raise self._aborted(completion.stop_reason)
            self._num_tokens += len(completion.token_ids)
        self._num_finished += output.finished
        return output

    def _aborted(self, reason: str | None) -> APIError:
        if self._is_constrained and reason != SHUTTING_DOWN:
            reason = (
                reason or "its text could not go on in the form that was asked for, or it took too long to find out how"
            )
            return APIError(400, f"the answer was given up: {reason}")
        return APIError(503, f"the request was aborted: {reason or 'the engine has dropped it'}")


async def _pump(number: int, stream: RequestStream, merged: asyncio.Queue[Any]) -> None:
    """Hand one prompt's outputs on as fast as they are taken; in between, its stream makes one output of many."""
    try:
        async for output in stream:
            await merged.put((number, output))
    except Exception as error:
        await merged.put((number, error))
