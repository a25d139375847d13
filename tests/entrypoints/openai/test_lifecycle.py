"""How a server starts and ends, as far as tests/server does not say: wrong flags, a file of flags, a real engine that is cut off."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from tests.entrypoints.openai.server import ROOT, TINY, RemoteServer, free_port
from tests.v1.engine.stub_cores import LoadingCore
from vllm.benchmarks.stub_core import StubCore
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.openai import launcher
from vllm.entrypoints.openai.api_server import build_app
from vllm.entrypoints.openai.cli_args import ServerArgs
from vllm.entrypoints.openai.launcher import serve

LONG = {"prompt": "a", "temperature": 0, "ignore_eos": True, "max_tokens": 3000, "stream": True}


class Reader(threading.Thread):
    """Reads a stream to its end in the background."""

    def __init__(self, server, **fields):
        super().__init__(daemon=True)
        self._server, self._fields = server, fields
        self.started, self.lines, self.error = threading.Event(), [], None
        self.start()
        assert self.started.wait(30), server.log

    def run(self):
        try:
            body = {**LONG, **self._fields}
            with httpx.stream("POST", self._server.url + "/v1/completions", json=body, timeout=60) as response:
                for line in response.iter_lines():
                    if line:
                        self.lines.append(line)
                        self.started.set()
        except httpx.HTTPError as error:
            self.error = error
        self.started.set()

    def end(self):
        """The last event before [DONE], once the stream is over."""
        self.join(30)
        assert not self.is_alive() and self.error is None, self.error
        assert self.lines[-1] == "data: [DONE]"
        return json.loads(self.lines[-2].removeprefix("data: "))


def until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.02)


def run(*arguments, **env):
    """A command line that ends by itself."""
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, timeout=60)


def test_servers_get_ports_that_no_connection_gets():
    """Or one of the thousands that tests open would have a server's port, now and then, in the second before it listens."""
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = [free_port() for _ in range(100)]
    assert len(set(ports)) == 100 and (max(ports) < first or first < 32_768)


def test_a_client_that_leaves_frees_its_place(server):
    """And so does one that leaves before its answer has begun, or waits for a whole one."""
    for stream in (True, False):
        body = {**LONG, "stream": stream, "n": 2, "temperature": 1.0}
        with pytest.raises(httpx.ReadTimeout):
            with httpx.stream("POST", server.url + "/v1/completions", json=body, timeout=0.5) as response:
                for _ in response.iter_bytes():
                    break
                raise httpx.ReadTimeout("enough")
        until(lambda: server.http.get("/load").json() == {"server_load": 0}, 1)
    running = 'vllm:num_requests_running{engine="0",model_name="tiny"} 0.0'
    until(lambda: running in server.http.get("/metrics").text, 1)
    assert server.complete("12+34=", stop="\n")["choices"][0]["text"] == "46"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--reasoning-parser", "nobody"], ["--reasoning-parser", "nobody", "qwen3"]),
        (["--tool-call-parser", "nobody"], ["--tool-call-parser", "hermes"]),
        (["--enable-auto-tool-choice"], ["--tool-call-parser"]),
        (["--chat-template", "nowhere.jinja"], ["--chat-template", "nowhere.jinja"]),
        (["--host", "no.such.host.invalid"], ["--host"]),
        (["--port", "70000"], ["--port", "65535"]),
        (["--uds", "x.sock"], ["--uds"]),
        (["--ssl-keyfile", "x"], ["--ssl-keyfile", "proxy"]),
        (["--api-server-count", "4"], ["--api-server-count"]),
        (["--config", "nowhere.yaml"], ["--config", "nowhere.yaml"]),
    ],
)
def test_wrong_flags(arguments, words):
    done = run(TINY, *arguments)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert all(word in done.stderr for word in words), done.stderr


@pytest.mark.parametrize(
    ("template", "words"), [("a\n{{ a | nofilter }}", "line 2.*nofilter"), ("{% if a %}", "line 1.*endif")]
)
def test_a_chat_template_that_is_none(template, words):
    """Nobody waits for the model to hear of it; and Ctrl-C means again what it meant."""
    before, start = signal.getsignal(signal.SIGINT), time.monotonic()
    with pytest.raises(ValueError, match="--chat-template, " + words):
        serve(EngineArgs(str(TINY), device="cpu"), ServerArgs(port=0, chat_template=template), core_class=LoadingCore)
    assert time.monotonic() - start < 20 and signal.getsignal(signal.SIGINT) is before


def test_a_port_that_another_server_takes_while_the_model_loads(monkeypatch):
    """Until one of them listens, two may have the same one."""
    port = free_port()
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", port))
        monkeypatch.setattr(launcher, "build_app", lambda *args: other.listen() or build_app(*args))
        with pytest.raises(ValueError, match=f"^--port {port}: cannot listen on 127.0.0.1: Address already in use$"):
            serve(EngineArgs(str(TINY), device="cpu"), ServerArgs(port=port), core_class=StubCore)


def test_requests_that_take_too_long_are_told(tmp_path):
    """Started under the module's name, with a file of flags."""
    config = tmp_path / "flags.yaml"
    config.write_text("shutdown-timeout: 1\nserved-model-name: overridden\nenable_log_requests: true\n")
    module = ("-m", "vllm.entrypoints.openai.api_server")
    with RemoteServer("--config", config, command=module) as server:
        reader = Reader(server, request_id="slow")
        os.killpg(server.process.pid, signal.SIGINT)  # as a terminal does
        assert "shutting down" in reader.end()["error"]["message"]
        assert server.wait() == 0
        assert "cmpl-slow: aborted" in server.log and "Traceback" not in server.log


def test_a_second_ctrl_c_stops_at_once():
    with RemoteServer() as server:
        Reader(server)
        engine = server.engine()
        os.killpg(server.process.pid, signal.SIGINT)
        until(lambda: "once more" in server.log, 5)
        start = time.monotonic()
        os.killpg(server.process.pid, signal.SIGINT)
        assert server.wait() == 130 and time.monotonic() - start < 3, "far less than --shutdown-timeout"
        assert not engine.is_running() and "Traceback" not in server.log


def test_sigterm_lets_running_requests_finish():
    with RemoteServer() as server:
        reader = Reader(server, max_tokens=600)
        server.send(signal.SIGTERM)
        until(lambda: server.http.get("/health").status_code == 503, 2)
        refused = server.post("/v1/completions", {"prompt": "a"})
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
        assert reader.end()["choices"][0]["finish_reason"] == "length"
        assert server.wait() == 0
        assert "SIGTERM" in server.log and "Traceback" not in server.log
        assert not server.children()


def test_the_engine_is_killed():
    with RemoteServer() as server:
        readers = [Reader(server) for _ in range(4)]
        start = time.monotonic()
        server.engine().kill()
        for reader in readers:
            assert reader.end()["error"]["code"] == 503
        assert server.wait() == 1 and time.monotonic() - start < 5, "far less than the answers would take"
        assert "the engine is dead" in server.log and "Traceback" not in server.log
