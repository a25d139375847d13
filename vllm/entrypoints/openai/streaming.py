"""Answers that take their time: server-sent events, and what happens when the client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import orjson
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from vllm.entrypoints.openai.errors import APIError, ClientGone, as_api_error

Result = TypeVar("Result")

DONE = b"data: [DONE]\n\n"


def event(content: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + orjson.dumps(content) + b"\n\n"


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`. Raises ClientGone, with `work` cancelled and over, when the client goes before it is done.

    Args:
        receive: of a request whose body has been read.
    """
    watcher, worker = asyncio.ensure_future(_disconnect(receive)), asyncio.ensure_future(work)
    try:
        await asyncio.wait((watcher, worker), return_when=asyncio.FIRST_COMPLETED)
        if not worker.done():
            raise ClientGone
        return worker.result()
    finally:
        watcher.cancel()
        if not worker.done():
            worker.cancel()
            await asyncio.gather(worker, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events. What fails before the first event is answered with a status; later, with an error event.

    Args:
        events: whole events. Each is sent before the next is asked for: a slow reader holds back only its own stream.
        close: called once nothing more will be sent, however that came about.
        headers: added to the response's.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncIterator[bytes], close: Callable[[], Awaitable[None]], headers: dict[str, str]
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers})
        del self.headers["content-length"]
        self._events = events
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_disconnect(receive, self._answer(scope, receive, send))
        except ClientGone:
            pass
        finally:
            await self._close()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            first = await anext(self._events)
        except Exception as error:
            await as_api_error(error).response()(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": first, "more_body": True})
        last = DONE
        try:
            async for piece in self._events:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        except Exception as error:
            last = error_event(as_api_error(error)) + DONE
        await send({"type": "http.response.body", "body": last, "more_body": False})


def error_event(error: APIError) -> bytes:
    """What a stream says when it cannot go on."""
    return event(error.body())


class ChunkWriter:
    """Writes the chunks of one answer. What they have in common is turned into JSON once.

    Args:
        head: fields that every chunk begins with.
    """

    def __init__(self, head: dict[str, Any]) -> None:
        self._head = b"data: " + orjson.dumps(head)[:-1] + b',"choices":['

    def choice(
        self, choice: dict[str, Any], usage: dict[str, Any] | None = None, extra: dict[str, Any] | None = None
    ) -> bytes:
        """A chunk with one choice; with the usage so far, and other fields, where given."""
        if usage is None and extra is None:
            return self._head + orjson.dumps(choice) + b"]}\n\n"
        rest = {**(extra or {}), **({} if usage is None else {"usage": usage})}
        return self._head + orjson.dumps(choice) + b"]," + orjson.dumps(rest)[1:] + b"\n\n"

    def usage(self, usage: dict[str, Any]) -> bytes:
        """The chunk that ends a stream: no choice, only what it cost."""
        return self._head + b'],"usage":' + orjson.dumps(usage) + b"}\n\n"
