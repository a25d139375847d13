"""HTTP/1.1 as uvicorn speaks it, with bounds that it lacks: on the size of a head, and on how long the rest of a request may take."""

from __future__ import annotations

import asyncio

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from vllm.entrypoints.openai.errors import APIError

MAX_HEAD = 64 << 10
"""Bytes of a request's first line and headers; one read of the socket may go beyond. Longer ones would be copied ever again."""


class BoundedHttp(HttpToolsProtocol):
    """One connection.

    A head must be complete, and a body go on, within the time after which an idle connection is closed. Upgrades are not
    made: such a request is answered as if it did not ask for one, with its body, which httptools would take for the other
    protocol's. (Java's client asks every server for HTTP/2 that way.) Broken requests get an error object too.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._in_head, self._head_size = True, 0
        self._stalled: asyncio.TimerHandle | None = None
        self._start_timer()

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self._cancel_timer()

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self._stalled is None or not self._in_head:
            self._start_timer()
        self._head_size += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._go_on_without_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self.send_400_response("this is not HTTP/1.1")
        else:
            if self._in_head and self._head_size > MAX_HEAD:
                self._refuse(APIError(431, f"the request's first line and headers are larger than {MAX_HEAD} bytes"))

    def send_400_response(self, msg: str) -> None:
        self._refuse(APIError(400, msg))

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        super().on_message_complete()
        self._in_head, self._head_size = True, 0  # what comes next is another request
        self._cancel_timer()

    def _start_timer(self) -> None:
        self._cancel_timer()
        self._stalled = self.loop.call_later(max(self.timeout_keep_alive, 1), self._on_stall)

    def _cancel_timer(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _on_stall(self) -> None:
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete and not cycle.more_body:
            self._start_timer()  # the request before is still being answered
        else:
            self.transport.close()

    def _go_on_without_upgrade(self, rest: bytes) -> None:
        """Read the request again, as it would be without the wish."""
        if self.parser.get_method() == b"CONNECT":
            return self.send_400_response("this is no proxy")
        lines = [b"%s %s HTTP/1.1" % (self.parser.get_method(), self.url)]
        lines += [
            b"%s: %s" % (name, value) for name, value in self.headers if name not in (b"upgrade", b"http2-settings")
        ]
        self.parser = httptools.HttpRequestParser(self)
        self._head_size = 0
        self.data_received(b"\r\n".join([*lines, b"", rest]))

    def _refuse(self, error: APIError) -> None:
        """Answer in place of the application, and close."""
        self._cancel_timer()
        response = error.response()
        headers = [*response.raw_headers, (b"connection", b"close")]
        head = b"".join(b"%s: %s\r\n" % header for header in headers)
        self.transport.write(STATUS_LINE[error.status] + head + b"\r\n" + response.body)
        self.transport.close()
