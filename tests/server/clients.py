"""Clients that do not behave: plain sockets, which can stop reading, vanish, or say half of what they meant to."""

import json
import socket
import struct
import threading

from tests.server.wire import request_bytes

LONG = {"prompt": "a", "temperature": 0, "ignore_eos": True, "max_tokens": 3000, "stream": True}


def connect(server, receive_buffer: int | None = None) -> socket.socket:
    """A connection; a small receive buffer fills after a few answers that nobody reads."""
    sock = socket.socket()
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.settimeout(30)
    sock.connect(("127.0.0.1", server.port))
    return sock


def begin(server, body: dict, path: str = "/v1/completions", **options) -> socket.socket:
    """A connection on which a request has been sent, and nothing been read."""
    sock = connect(server, **options)
    sock.sendall(request_bytes("POST", path, json.dumps(body).encode()))
    return sock


def begin_and_read(server, body: dict, **options) -> socket.socket:
    """The same, once the answer has begun."""
    sock = begin(server, body, **options)
    assert sock.recv(1000).startswith(b"HTTP/1.1 200"), server.log
    return sock


def reset(sock: socket.socket) -> None:
    """Vanish: the other side gets a reset, not an end."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def read_all(sock: socket.socket) -> bytes:
    """Everything until the connection ends."""
    pieces = []
    try:
        while piece := sock.recv(1 << 16):
            pieces.append(piece)
    except ConnectionResetError:
        pass
    finally:
        sock.close()
    return b"".join(pieces)


class Reader(threading.Thread):
    """Reads the answer to one request in the background."""

    def __init__(self, server, **fields):
        super().__init__(daemon=True)
        self._sock = begin(server, {**LONG, **fields})
        self._answer = b""
        self.start()

    def run(self):
        self._answer = read_all(self._sock)

    def answer(self, timeout: float = 30) -> bytes:
        """Headers and body, once the connection has ended."""
        self.join(timeout)
        assert not self.is_alive(), f"an answer has not ended within {timeout} s"
        return self._answer

    def events(self) -> list[dict]:
        """The events of a stream that ends as it should."""
        lines = [
            line[6:] for line in self.answer().split(b"\r\n") for line in line.split(b"\n") if line[:6] == b"data: "
        ]
        assert lines[-1] == b"[DONE]", self._answer[-300:]
        return [json.loads(line) for line in lines[:-1]]

    def error(self) -> dict:
        """The error object that the answer is or ends with."""
        answer = self.answer()
        if answer.startswith(b"HTTP/1.1 200"):
            return self.events()[-1]["error"]
        assert answer[9:10] == b"5", answer[:300]
        return json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]
