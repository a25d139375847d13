"""One request's outputs for one reader, who may be slow: what has not been read becomes one output, not many."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import TYPE_CHECKING

from vllm.outputs import RequestOutput
from vllm.v1.engine.exceptions import EngineDeadError

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.output_processor import RequestState


class Mailbox:
    """Tells a reader that there is something to read. Holds no outputs: those are made when the reader comes."""

    __slots__ = ("_has_news", "_loop", "_reason", "_waiter")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._has_news = False
        self._reason: str | None = None
        self._waiter: asyncio.Future[None] | None = None

    def notify(self) -> None:
        """Something can be read."""
        self._has_news = True
        self._wake()

    def fail(self, reason: str) -> None:
        """Nothing more will come."""
        self._reason = reason
        self._wake()

    async def wait(self) -> None:
        """Return when something can be read; raise EngineDeadError when nothing will come."""
        while self._reason is not None or not self._has_news:
            if self._reason is not None:
                raise EngineDeadError(self._reason)
            if self._waiter is not None:
                raise RuntimeError("a stream has one reader; this one is being read already")
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self._has_news = False

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class RequestStream:
    """An asynchronous iterator over a request's outputs.

    Cancelling a read does not end the request; `aclose`, leaving an `async with`, or dropping the last reference does.
    """

    def __init__(self, engine: AsyncLLM, state: RequestState, mailbox: Mailbox) -> None:
        self._engine = engine
        self._state = state
        self._mailbox = mailbox
        self._done = False

    @property
    def request_id(self) -> str:
        return self._state.request_id

    @property
    def prompt_token_ids(self) -> list[int]:
        return self._state.prompt_token_ids

    @property
    def sampling_params(self) -> SamplingParams:
        """As settled: with a seed, and with the length that the context leaves."""
        return self._state.params

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> RequestOutput:
        if self._done:
            raise StopAsyncIteration
        await self._mailbox.wait()
        output = self._engine.output_processor.take(self._state)
        self._done = output.finished
        return output

    async def aclose(self) -> None:
        """Abort the request if it is not finished."""
        self._done = True
        if not self._state.finished:
            self._engine.abort(self._state.request_id)

    async def __aenter__(self) -> RequestStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if not self._state.finished:
            self._engine._drop(self._state)
