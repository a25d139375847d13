"""A streaming client that costs little: one POST, server-sent events as they come, each with the moment at which its bytes arrived.

httptools parses, orjson reads; sockets are asyncio's. An SDK costs several hundred microseconds a token, which at some thousand tokens a second
is more than there is.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import httptools
import orjson

MOST_ERROR_BYTES = 2000


class RequestFailed(Exception):
    """The server answered with an error, or not at all. `status` is None where there was no answer."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class Client:
    """Requests to one server, over connections that are kept open between them.

    Args:
        base_url: "http://127.0.0.1:8000" or https, with or without a path.
        headers: sent with every request.
    """

    def __init__(self, base_url: str, headers: dict[str, str] | None = None) -> None:
        try:
            parts = urlsplit(base_url)
            port = parts.port
        except ValueError as error:
            raise ValueError(f"--base-url {base_url}: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"--base-url {base_url}: expected http://host:port")
        self._host, self._tls = parts.hostname, parts.scheme == "https"
        self._port = port or (443 if self._tls else 80)
        self._path = parts.path.rstrip("/")
        host = f"[{self._host}]" if ":" in self._host else self._host
        lines = [f"Host: {host}:{self._port}", "Accept: text/event-stream, application/json"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        if any("\r" in line or "\n" in line for line in lines):
            raise ValueError("a header must not hold a line break")
        self._head = "\r\n".join(lines)
        self._idle: list[_Connection] = []

    async def get(self, path: str) -> Any:
        """The JSON answer to a GET. Raises RequestFailed."""
        connection = await self._send(f"GET {self._path}{path} HTTP/1.1\r\n{self._head}\r\n\r\n".encode(), None)
        body = await connection.finished
        self._keep(connection)
        try:
            return orjson.loads(body)
        except orjson.JSONDecodeError:
            raise RequestFailed(f"{path}: the answer is not JSON", connection.status) from None

    def prepare(self, path: str, body: dict[str, Any]) -> bytes:
        """A request as bytes, so that making it does not delay the moment of sending."""
        content = orjson.dumps(body)
        head = f"POST {self._path}{path} HTTP/1.1\r\n{self._head}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        return head.encode() + content

    async def stream(self, request: bytes, on_event: Callable[[dict[str, Any], float], None]) -> None:
        """Send a prepared request; call on_event(event, time.perf_counter() of its arrival) for every event.

        Raises:
            RequestFailed: no connection, another status than 200, or the stream broke off.
        """
        while True:
            connection = await self._send(request, on_event)
            try:
                await connection.finished
                break
            except BaseException as error:
                connection.close()
                # A server may close a connection that was kept open in the very moment in which it is used again.
                if not (isinstance(error, RequestFailed) and connection.was_used and connection.is_silent):
                    raise
        self._keep(connection)

    async def connect(self, count: int) -> None:
        """Open so many connections beforehand: opening them is work of this side, which must not count as the server's."""
        opened = await asyncio.gather(*(self._open() for _ in range(count - len(self._idle))), return_exceptions=True)
        self._idle += [connection for connection in opened if isinstance(connection, _Connection)]

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    async def _send(self, request: bytes, on_event: Callable[[dict[str, Any], float], None] | None) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                connection.was_used = True
                connection.begin(request, on_event)
                return connection
        connection = await self._open()
        connection.begin(request, on_event)
        return connection

    async def _open(self) -> _Connection:
        context = ssl.create_default_context() if self._tls else None
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(_Connection, self._host, self._port, ssl=context)
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error) or type(error).__name__
            raise RequestFailed(f"cannot connect to {self._host}:{self._port}: {reason}") from None
        return connection

    def _keep(self, connection: _Connection) -> None:
        if connection.usable:
            self._idle.append(connection)
        else:
            connection.close()


class _Connection(asyncio.Protocol):
    """One connection, with one request at a time on it."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self.finished: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self.usable = self._done = self.was_used = False
        self.is_silent = True
        self.status = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport, self.usable = transport, True

    def begin(self, request: bytes, on_event: Callable[[dict[str, Any], float], None] | None) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._on_event, self._rest, self._body, self.status = on_event, b"", [], 0
        self._done, self._now, self.usable, self.is_silent = False, 0.0, False, True
        self.finished = asyncio.get_running_loop().create_future()
        self._transport.write(request)

    def close(self) -> None:
        self.usable = False
        if self._transport is not None:
            self._transport.close()

    # asyncio's calls

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        self.is_silent = False
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, orjson.JSONDecodeError) as error:
            cause = error.__context__ if isinstance(error, httptools.HttpParserCallbackError) else error
            self._fail(f"the answer is not what a server of this kind sends: {cause}")
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        self.usable = False
        if self._done:  # everything had come, but not the end of the HTTP message
            self._succeed()
        self._fail("the connection was closed before the answer was complete")

    # httptools' calls

    def on_body(self, body: bytes) -> None:
        if self._on_event is None or self._parser.get_status_code() != 200:
            self._body.append(body)
            return
        *lines, self._rest = (self._rest + body).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                self._done = True
            elif data:
                self._on_event(orjson.loads(data), self._now)

    def on_message_complete(self) -> None:
        self.status = self._parser.get_status_code()
        self.usable = self._parser.should_keep_alive()
        if self.status == 200:
            self._succeed()
        else:
            self._fail(f"HTTP {self.status}: {_error_text(b''.join(self._body))}", self.status)

    def _succeed(self) -> None:
        if not self.finished.done():
            self.finished.set_result(b"".join(self._body))

    def _fail(self, message: str, status: int | None = None) -> None:
        if not self.finished.done():
            self.finished.set_exception(RequestFailed(message, status))
            self.finished.exception()  # a request that nobody waits for any more has not failed silently: it was given up


def _error_text(body: bytes) -> str:
    """The message of an OpenAI error object, or the body's beginning, on one line."""
    try:
        found = orjson.loads(body)
        found = found.get("error", found) if isinstance(found, dict) else found
        text = found.get("message") or found.get("detail") if isinstance(found, dict) else found
    except orjson.JSONDecodeError:
        text = None
    return " ".join(str(text or body[:MOST_ERROR_BYTES].decode("utf-8", "replace")).split())
