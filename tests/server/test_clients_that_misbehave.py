"""Clients that leave, read slowly or not at all: only their own answers suffer, and what they held comes back within a second."""

import asyncio
import json
import socket

import psutil
import pytest

from tests.entrypoints.openai.server import RemoteServer
from tests.server.clients import LONG, begin, begin_and_read, connect, read_all, reset
from tests.server.conftest import STUB
from tests.server.probes import held, metric, resident, until, until_idle, works
from tests.server.wire import post_all, request_bytes


@pytest.fixture(scope="module")
def server():
    """Eight run and the others wait; and steps are short, because none can be cut short."""
    limits = ("--max-num-seqs", 8, "--max-num-queued-requests", 100, "--max-num-batched-tokens", 512)
    with RemoteServer(*limits) as server:
        yield server


def leave_by_reset(sock):
    reset(sock)


def leave_by_end(sock):
    sock.close()


def leave_by_half_close(sock):
    """Nothing more is sent, and nothing read."""
    sock.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("leave", [leave_by_reset, leave_by_end, leave_by_half_close])
@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_leave(server, leave, stream):
    """Those whose answer has begun and those that wait for their turn."""
    running = [begin(server, {**LONG, "stream": stream}) for _ in range(8)]
    until(lambda: held(server)["num_requests_running"] == 8, 10)
    waiting = [begin(server, {**LONG, "stream": stream}) for _ in range(20)]
    until(lambda: held(server)["num_requests_waiting"] == 20, 10)
    for sock in [*running[::2], *waiting]:
        leave(sock)
    until(lambda: held(server)["num_requests_waiting"] == 0 and held(server)["num_requests_running"] == 4, 1)
    for sock in running[1::2]:
        leave(sock)
    assert until_idle(server, 1) < 1
    works(server)
    for sock in [*running, *waiting]:
        sock.close()


def test_clients_that_leave_while_their_prompt_is_read(server):
    """Prompts that take several steps, and several prompts in one request."""
    bodies = [{**LONG, "prompt": [5] * 4000, "max_tokens": 50}, {**LONG, "prompt": [[5] * 3000] * 6, "max_tokens": 50}]
    for body in bodies:
        sock = begin(server, body)
        until(lambda: held(server)["num_requests_running"] > 0, 10)
        reset(sock)
        until_idle(server, 3)
    works(server)


def test_clients_that_leave_before_they_have_asked(server):
    request = request_bytes("POST", "/v1/completions", json.dumps(LONG).encode())
    for end in (0, 5, request.index(b"\r\n") + 3, request.index(b"{"), len(request) - 10):
        for leave in (leave_by_reset, leave_by_end, leave_by_half_close):
            sock = connect(server)
            sock.sendall(request[:end])
            leave(sock)
            sock.close()
    until_idle(server)
    process = psutil.Process(server.process.pid)
    until(lambda: len([c for c in process.net_connections() if c.status not in ("LISTEN", "NONE")]) <= 2, 2)
    works(server)


def test_the_log_says_nothing_of_it(server):
    """Clients come and go; nobody wants to read about each."""
    assert "Traceback" not in server.log and "ERROR" not in server.log and "WARNING" not in server.log


def test_a_client_that_reads_nothing(server):
    """It holds no page and no slot once its tokens are made, others go on beside it, and its whole answer waits for it."""
    slow = begin_and_read(server, {**LONG, "max_tokens": 1500, "return_token_ids": True}, receive_buffer=4096)
    fields = {"temperature": 0, "stop": "\n", "max_tokens": 8, "stream": True}
    answers = asyncio.run(
        post_all(server.port, "/v1/completions", [{"prompt": f"{a}+11=", **fields} for a in range(20, 70)])
    )
    assert [answer.text for answer in answers] == [str(a + 11) for a in range(20, 70)]
    until_idle(server, 60)
    text = read_all(slow)
    lines = [line for line in text.replace(b"\r", b"").split(b"\n") if line.startswith(b"data: {")]
    tokens = [token for line in lines[1:] for token in json.loads(line[6:])["choices"][0]["token_ids"]]
    assert 1450 < len(tokens) <= 1500 and text.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


@pytest.fixture(scope="module")
def fast():
    """Tokens as fast as they can be made, for many streams."""
    limits = ("--max-num-seqs", 256, "--max-num-batched-tokens", 256)
    with RemoteServer(*limits, command=(*STUB, "fast")) as server:
        yield server


def test_what_is_not_read_is_not_kept(fast):
    """A hundred megabytes of events for clients that read none: they are written only as far as sockets take them."""
    body = {"prompt": [1], "max_tokens": 4000, "n": 32, "temperature": 1, "stream": True, "return_token_ids": True}
    warm = begin_and_read(fast, {**body, "max_tokens": 100})
    read_all(warm)
    before = resident(fast)["server"]
    slow = [begin_and_read(fast, body, receive_buffer=4096) for _ in range(4)]
    until_idle(fast, 120)
    assert metric(fast, "generation_tokens_total") == (4000 * 4 + 100) * 32
    grown = resident(fast)["server"] - before
    assert grown < 60, f"{grown} MB more"
    for sock in slow[1:]:
        reset(sock)
    answer = read_all(slow[0])
    assert answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert fast.http.get("/health").status_code == 200 and "Traceback" not in fast.log
