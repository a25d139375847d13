"""How a server ends: asked to, with work under way, because its engine is gone, or killed itself. Nobody is left without a word."""

import json
import os
import signal
import tempfile
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest

from tests.entrypoints.openai.server import RemoteServer
from tests.server.clients import Reader, begin_and_read, connect, read_all
from tests.server.conftest import STUB
from tests.server.probes import held, until, works
from tests.server.wire import request_bytes

LIMITS = ("--max-num-seqs", 4, "--max-num-queued-requests", 50)
SLOW = {"command": (*STUB, "slow")}  # twenty milliseconds a token
PATH = "/v1/completions"
SOON = 5
"""Seconds: far less than --shutdown-timeout, or than the answers under way would take."""


@pytest.fixture
def folder():
    """For temporary files; short enough for the names of sockets. Of ours none is left in it once a server has ended."""
    with tempfile.TemporaryDirectory(prefix="ends-") as folder:
        yield Path(folder)


def check_log(server, *words: str) -> None:
    log = server.log
    assert "Traceback" not in log and all(word in log for word in words), log


def busy(server, running: int = 4, waiting: int = 3) -> bool:
    """Whether so many requests run and wait."""
    now = held(server)
    return (now["num_requests_running"], now["num_requests_waiting"]) == (running, waiting)


class Watcher(threading.Thread):
    """Asks /health again and again, on connections of its own, until nobody answers."""

    def __init__(self, server):
        super().__init__(daemon=True)
        self._url, self.seen = f"{server.url}/health", []
        self.start()

    def run(self):
        headers = {"Connection": "close"}
        with httpx.Client(timeout=5, headers=headers) as http:
            while True:
                try:
                    self.seen.append(http.get(self._url).status_code)
                except httpx.HTTPError:
                    return
                time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_the_engine_is_killed(number):
    """Whoever runs, waits, streams or wants it whole is told; then the server ends and says why."""
    with RemoteServer(*LIMITS, **SLOW) as server:
        readers = [Reader(server, stream=i % 2 == 0) for i in range(7)]
        until(lambda: busy(server), 10)
        assert server.http.get("/health").status_code == 200
        engine, watcher = server.engine(), Watcher(server)
        until(lambda: watcher.seen, 5)
        start = time.monotonic()
        engine.send_signal(number)
        for reader in readers:
            error = reader.error()
            assert error["code"] == 503 and number.name in error["message"]
        assert server.wait(SOON) == 1 and time.monotonic() - start < SOON
        watcher.join(5)
        assert set(watcher.seen) == {200, 503} and sorted(watcher.seen) == watcher.seen
        check_log(server, "engine is dead", f"killed by signal {number.value} ({number.name})")


def test_no_more_is_taken_for_an_engine_that_is_gone():
    """In the moment before the server ends, it refuses in so many words: here those who had begun to ask."""
    with RemoteServer(*LIMITS, **SLOW) as server:
        bodies = {PATH: {"prompt": "a"}, "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]}}
        asked = []
        for path, body in bodies.items():
            data = request_bytes("POST", path, json.dumps(body).encode())
            asked.append((connect(server), data[-1:]))
            asked[-1][0].sendall(data[:-1])
        assert server.http.get("/health").status_code == 200  # by now they have been read
        server.engine().kill()
        until(lambda: "engine is dead" in server.log, 3)
        for sock, rest in asked:
            sock.sendall(rest)
            head, _, body = read_all(sock).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 503 ") and "SIGKILL" in json.loads(body)["error"]["message"]
        assert server.wait(SOON) == 1


def test_the_engine_is_stopped_for_a_while():
    """Nothing that the server can do by itself waits for it, and its streams go on where they were."""
    with RemoteServer(*LIMITS, **SLOW) as server:
        reader = Reader(server, max_tokens=50, prompt=[1], return_token_ids=True)
        until(lambda: busy(server, 1, 0), 10)
        server.engine().suspend()
        try:
            start = time.monotonic()
            for path in ("/health", "/metrics", "/v1/models", "/load", "/version"):
                assert server.http.get(path).status_code == 200
            assert server.post("/tokenize", {"prompt": "a"}).status_code == 200
            assert time.monotonic() - start < 2
        finally:
            server.engine().resume()
        tokens = [token for event in reader.events() for token in event["choices"][0]["token_ids"]]
        assert tokens == list(range(2, 52))
        server.engine().suspend()
        assert server.stop(signal.SIGTERM, 10) == 0, "an engine that does not answer is killed"
        check_log(server, "does not end by itself")


def test_sigterm_lets_everything_finish():
    """What runs and what waits, streams and whole answers; meanwhile who comes new is refused."""
    with RemoteServer(*LIMITS, "--max-model-len", 256) as server:
        readers = [Reader(server, prompt="12+34=", max_tokens=80, stream=i % 2 == 0) for i in range(8)]
        until(lambda: busy(server, 4, 4), 10)
        server.send(signal.SIGTERM)
        until(lambda: server.http.get("/health").status_code == 503, 2)
        refused = server.post(PATH, {"prompt": "a"})
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["message"] == "the server is shutting down"
        for i, reader in enumerate(readers):
            if i % 2:
                assert b'"text":"46\\n' in reader.answer() and b'"finish_reason":"length"' in reader.answer()
            else:
                events = [event["choices"][0] for event in reader.events()]
                assert "".join(event["text"] for event in events).startswith("46\n")
                assert events[-1]["finish_reason"] == "length"
        assert server.wait() == 0
        check_log(server, "SIGTERM: finishing what runs (8)")


def test_what_takes_longer_than_the_shutdown_timeout():
    with RemoteServer(*LIMITS, "--shutdown-timeout", 1, **SLOW) as server:
        readers = [Reader(server, stream=i % 2 == 0) for i in range(7)]
        until(lambda: busy(server), 10)
        start = time.monotonic()
        server.send(signal.SIGTERM)
        for reader in readers:
            error = reader.error()
            assert error["code"] == 503 and "shutting down" in error["message"]
        assert server.wait(SOON) == 0 and 1 <= time.monotonic() - start < SOON
        check_log(server, "not finished in time")


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_ctrl_c(first):
    with RemoteServer(*LIMITS, **SLOW) as server:
        readers = [Reader(server) for _ in range(3)]
        until(lambda: busy(server, 3, 0), 10)
        os.killpg(server.process.pid, first)
        until(lambda: "once more stops at once" in server.log, 3)
        start = time.monotonic()
        os.killpg(server.process.pid, signal.SIGINT)
        assert server.wait(SOON) == 130 and time.monotonic() - start < 3
        assert all(reader.error()["code"] == 503 for reader in readers)
        check_log(server, "Stopping at once")


def test_clients_that_keep_a_server_from_ending():
    """Idle connections, half a request, and an answer that nobody reads: none of them is waited for long."""
    with RemoteServer(*LIMITS, "--shutdown-timeout", 1, command=(*STUB, "fast")) as server:
        idle = [connect(server) for _ in range(5)]
        half = connect(server)
        half.sendall(request_bytes("POST", PATH, b"x" * 1000)[:-500])
        body = {"prompt": [1], "n": 4, "temperature": 1, "max_tokens": 4000, "stream": True}
        deaf = begin_and_read(server, body, receive_buffer=4096)
        until(lambda: not any(held(server).values()), 20)
        start = time.monotonic()
        server.send(signal.SIGTERM)
        assert server.wait(10) == 0 and time.monotonic() - start < 6
        check_log(server)
        for sock in (*idle, half, deaf):
            sock.close()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_signal_while_the_model_loads(folder, number, code):
    with RemoteServer(wait=False, env={"TMPDIR": str(folder)}) as server:
        until(server.engines, 60)
        engine = server.engine()
        os.killpg(server.process.pid, number)
        assert server.wait(SOON) == code
        until(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE, 5)
        until(lambda: not list(folder.glob("vllm-*")), 2)
        check_log(server)


def test_the_server_is_killed(folder):
    """Its engine sees that and ends, also in the middle of its work."""
    with RemoteServer(*LIMITS, env={"TMPDIR": str(folder)}) as server:
        reader = Reader(server)
        until(lambda: held(server)["num_requests_running"] == 1, 10)
        engine = server.engine()
        server.send(signal.SIGKILL)
        until(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE, 5)
        assert b"[DONE]" not in reader.answer() and not list(folder.glob("vllm-*"))


def test_an_end_leaves_nothing_behind(folder):
    with RemoteServer(*LIMITS, env={"TMPDIR": str(folder)}) as server:
        works(server)
        children = server.children()
        assert server.stop(signal.SIGTERM) == 0
        assert not any(child.is_running() for child in children) and not list(folder.glob("vllm-*"))
        check_log(server, "SIGTERM: stopping")
