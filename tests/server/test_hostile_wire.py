"""What is not quite HTTP, or not HTTP at all: refused or closed within moments, never taken for another request."""

import contextlib
import json
import socket
import time

import pytest

from tests.entrypoints.openai.server import RemoteServer
from tests.server.clients import connect
from tests.server.conftest import STUB
from tests.server.probes import resident, works

SECONDS = 5
KEEP_ALIVE = 1
BODY = json.dumps({"prompt": "12+34=", "temperature": 0, "stop": "\n", "max_tokens": 4}).encode()
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n"
CHUNKS = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
ANOTHER = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"


def ask(
    headers: bytes, body: bytes = BODY, line: bytes = b"POST /v1/completions HTTP/1.1", close: bool = True
) -> bytes:
    return line + b"\r\nHost: x\r\n" + b"Connection: close\r\n" * close + headers + b"\r\n" + body


def get(path: bytes, headers: bytes = b"") -> bytes:
    return ask(headers, b"", b"GET " + path + b" HTTP/1.1")


@pytest.fixture(scope="module")
def server():
    with RemoteServer("--timeout-keep-alive", KEEP_ALIVE) as server:
        works(server)
        before, engine = resident(server), server.engine()
        yield server
        works(server)
        after = resident(server)
        assert server.engine() == engine and after["server"] - before["server"] < 64, (before, after)
        assert "Traceback" not in server.log and "ERROR" not in server.log, server.log[-3000:]


def exchange(server, data: bytes) -> bytes:
    """Everything that comes back until the connection ends, which it must."""
    answer, start = b"", time.monotonic()
    with connect(server) as sock:
        sock.settimeout(SECONDS)
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            sock.sendall(data)
        with contextlib.suppress(ConnectionResetError):
            while piece := sock.recv(1 << 16):
                answer += piece
    assert time.monotonic() - start < SECONDS
    return answer


def check_refused(answer: bytes, *statuses: int) -> None:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert int(head.split()[1]) in statuses, answer[:300]
    error = json.loads(body)["error"]
    assert error["code"] in statuses and error["message"]


NOT_HTTP = {
    "bytes": b"\x00\xff\x16\x03\x01" * 100 + b"\r\n\r\n",
    "tls": bytes.fromhex("16030100a5010000a10303") + b"\x01" * 160,
    "ssh": b"SSH-2.0-OpenSSH_9.6\r\n",
    "http/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "http/9.9": b"GET /health HTTP/9.9\r\n\r\n",
    "lower case": b"get /health http/1.1\r\n\r\n",
    "a long method": b"A" * 100_000 + b" / HTTP/1.1\r\n\r\n",
    "bytes in the path": get(b"/\xff\xfe"),
    "line feeds alone": get(b"/health").replace(b"\r\n", b"\n"),
    "carriage returns alone": get(b"/health").replace(b"\r\n", b"\r"),
    "nul in a header": ask(LENGTH + b"X: a\x00b\r\n"),
    "space in a name": ask(LENGTH + b"X Y: a\r\n"),
    "no colon": ask(LENGTH + b"nonsense\r\n"),
    "folded header": ask(LENGTH + b"X: a\r\n b\r\n"),
    "proxy": b"CONNECT example.com:443 HTTP/1.1\r\nHost: x\r\n\r\n",
    "two lengths": ask(LENGTH + b"Content-Length: 5\r\n"),
    "the same length twice": ask(LENGTH + LENGTH),
    "a list of lengths": ask(b"Content-Length: %d, %d\r\n" % (len(BODY), len(BODY))),
    "length and chunks": ask(LENGTH + CHUNKED, b"0\r\n\r\n" + ANOTHER),
    "chunks and length": ask(CHUNKED + b"Content-Length: 3\r\n", b"8\r\nSMUGGLED\r\n0\r\n\r\n"),
    "two encodings": ask(CHUNKED + b"Transfer-Encoding: x\r\n", b"0\r\n\r\n" + ANOTHER),
    "an unknown encoding": ask(b"Transfer-Encoding: xchunked\r\n", b"0\r\n\r\n" + ANOTHER),
    "space before the colon": ask(b"Transfer-Encoding : chunked\r\n" + LENGTH),
    "negative length": ask(b"Content-Length: -5\r\n"),
    "length with a sign": ask(b"Content-Length: +%d\r\n" % len(BODY)),
    "hexadecimal length": ask(b"Content-Length: 0x10\r\n"),
    "length of 23 digits": ask(b"Content-Length: 99999999999999999999999\r\n"),
    "no number of a chunk": ask(CHUNKED, b"zz\r\nabc\r\n0\r\n\r\n"),
    "too large a chunk": ask(CHUNKED, b"ffffffffffffffffff\r\nabc\r\n0\r\n\r\n"),
    "chunks with line feeds": ask(CHUNKED, CHUNKS.replace(b"\r\n", b"\n")),
    "rubbish in a chunk's extension": ask(CHUNKED, b'%x;a="\n"\r\n' % len(BODY) + CHUNKS),
}


@pytest.mark.parametrize("name", NOT_HTTP)
def test_not_http(server, name):
    check_refused(exchange(server, NOT_HTTP[name]), 400)
    works(server)


TOO_LONG = {
    "url": get(b"/" + b"a" * 2_000_000),
    "query": get(b"/health?" + b"a=b&" * 500_000),
    "header": ask(b"X: " + b"a" * 2_000_000 + b"\r\n" + LENGTH),
    "headers": ask(b"".join(b"X-%d: a\r\n" % i for i in range(100_000)) + LENGTH),
    "key": ask(b"Authorization: Bearer " + b"a" * 2_000_000 + b"\r\n" + LENGTH),
    "header of 50 MB that never ends": b"GET /health HTTP/1.1\r\nX: " + b"a" * 50_000_000,
    "url of 50 MB that never ends": b"GET /" + b"a" * 50_000_000,
}


@pytest.mark.parametrize("name", TOO_LONG)
def test_too_long_a_head(server, name):
    check_refused(exchange(server, TOO_LONG[name]), 431)
    works(server)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (get(b"/v1/models/..%2f..%2fetc%2fpasswd"), 404),
        (get(b"/../../etc/passwd"), 404),
        (get(b"/%ff%fe%00%0d%0aX:1"), 404),
        (get(b"//v1/models"), 404),
        (get(b"/v1/models/" + b"%2e" * 1000), 404),
        (ask(b"", b"", b"TRACE /health HTTP/1.1"), 405),
        (ask(b"", b"", b"OPTIONS * HTTP/1.1"), 404),
        (ask(LENGTH + b"Content-Encoding: gzip\r\n", b"\x1f\x8b\x08" + BODY[3:]), 400),
    ],
)
def test_odd_requests(server, data, status):
    check_refused(exchange(server, data), status)
    works(server)


UPGRADE = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: %s\r\nHTTP2-Settings: AAMAAABk\r\n"
WEBSOCKET = b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"


@pytest.mark.parametrize(
    "headers",
    [
        b"",
        b"Content-Type: text/plain\r\nContent-Type: application/xml\r\n",
        b"Content-Type: application/json; charset=utf-7\r\n",
        b"Expect: 100-continue\r\n",
        b"Expect: the-unexpected\r\n",
        b"X-Forwarded-For: 1.2.3.4\r\nX-Forwarded-Host: evil\r\nX-Forwarded-Proto: javascript\r\n",
        b"Cookie: " + b"a=b; " * 1000 + b"\r\n",
        UPGRADE % b"h2c",
        UPGRADE % b"websocket" + WEBSOCKET,
    ],
)
def test_odd_headers_change_nothing(server, headers):
    """A server need not grant an upgrade, but it must answer the request, whose body is not the other protocol's."""
    for framing, body in ((LENGTH, BODY), (CHUNKED, CHUNKS)):
        answer = exchange(server, ask(headers + framing, body, close=False) + get(b"/version"))
        assert answer.count(b" 200 OK\r\n") == 2 and b'"text":"46"' in answer and b'"version"' in answer, answer[:300]


def test_a_websocket_is_not_granted(server):
    answer = exchange(server, ask(UPGRADE % b"websocket" + WEBSOCKET, b"", b"GET /v1/models HTTP/1.1", close=False))
    assert answer.startswith(b"HTTP/1.1 200 OK") and answer.count(b"HTTP/1.1") == 1
    assert "Upgrade" not in server.log and "WebSocket" not in server.log


def test_requests_in_a_row_on_one_connection(server):
    """Answered one after the other; what comes after an end is not read."""
    answer = exchange(server, ask(LENGTH, close=False) * 10 + ask(LENGTH) + ANOTHER)
    assert answer.count(b"HTTP/1.1 200 OK") == answer.count(b'"text":"46"') == 11 and b'"object":"list"' not in answer


@pytest.mark.parametrize("end", [0, 2, 10, len(ask(LENGTH, b"")) - 1, len(ask(LENGTH, b"")), len(ask(LENGTH)) - 1])
def test_requests_that_stop_in_the_middle(server, end):
    """Closed after the time for idle connections, though the client keeps its side open."""
    data = ask(LENGTH)[:end]
    start = time.monotonic()
    assert exchange(server, data) == b""
    assert time.monotonic() - start > KEEP_ALIVE / 2


def test_heads_that_trickle_in(server):
    """A byte now and then does not keep a connection without a request open."""
    with connect(server) as sock:
        start = time.monotonic()
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            for byte in get(b"/health", b"X-Long: " + b"a" * 1000 + b"\r\n"):
                sock.sendall(bytes([byte]))
                time.sleep(0.1)
        assert time.monotonic() - start < KEEP_ALIVE + SECONDS


def test_many_connections_without_a_request(server):
    """They keep nobody else from being answered."""
    idle = [connect(server) for _ in range(500)]
    for sock in idle[::2]:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    works(server)
    for sock in idle:
        sock.settimeout(KEEP_ALIVE + SECONDS)
        assert sock.recv(1) == b""
        sock.close()


def test_a_long_answer_is_not_taken_for_an_idle_connection():
    """Nothing comes from the client for longer than an idle connection may be, or half a request, while the answer goes on."""
    body = json.dumps({"prompt": "a", "max_tokens": 150, "ignore_eos": True, "stream": True}).encode()
    with RemoteServer("--timeout-keep-alive", KEEP_ALIVE, command=(*STUB, "slow")) as server:
        for extra in (b"", b"GET /health HTT"):
            with connect(server) as sock:
                sock.sendall(ask(b"Content-Length: %d\r\n" % len(body), body, close=False) + extra)
                text, start = b"", time.monotonic()
                while not text.endswith(b"\r\n0\r\n\r\n"):
                    piece = sock.recv(1 << 16)
                    assert piece, text[-200:]
                    text += piece
                assert b"data: [DONE]" in text and time.monotonic() - start > 2 * KEEP_ALIVE
                assert sock.recv(1) == b"", "closed once it is idle"


def test_the_answer_is_cut_only_where_nobody_is_there(server):
    """A connection that is shut for sending before the request is complete gets no answer."""
    with connect(server) as sock:
        sock.sendall(ask(LENGTH)[:-5])
        sock.shutdown(socket.SHUT_WR)
        sock.settimeout(SECONDS)
        assert sock.recv(1) == b""
    works(server)
