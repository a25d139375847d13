"""A server in a process of its own, on a free port, for tests.

with RemoteServer("--max-num-seqs", "4") as server:
    server.post("/v1/completions", {"prompt": "12+34="})
    server.stop(signal.SIGTERM)      # the exit code
"""

import contextlib
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
from openai import AsyncOpenAI, OpenAI

ROOT = Path(__file__).resolve().parents[3]
TINY = ROOT / "vllm" / "assets" / "tiny-qwen3_5-moe"

CHAT_FLAGS = ("--reasoning-parser", "qwen3", "--tool-call-parser", "qwen3_coder", "--enable-auto-tool-choice")
SMALL = ("--max-num-seqs", "16", "--kv-cache-memory-bytes", "64M")


PORTS = range(20_000, 32_768)
"""Below those that Linux gives to connections: one of the thousands that tests open must not get the port of a server that starts."""
_WORKERS = 8


def _share() -> Iterator[int]:
    """Ports of this process's own: of pytest-xdist's workers, each has others. Beside another run it begins elsewhere."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _WORKERS
    ports = PORTS[worker::_WORKERS]
    start = random.Random(os.getpid()).randrange(len(ports))
    return itertools.cycle([*ports[start:], *ports[:start]])


_ports = _share()


def free_port() -> int:
    """A port that nobody has, and that nobody else is going to get."""
    for port in itertools.islice(_ports, len(PORTS)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("no port is free")


class RemoteServer:
    """`vllm serve` on the bundled checkpoint, named `tiny`; ready when the `with` block begins, over when it ends.

    Args:
        args: flags after the usual ones, which they override.
        env: variables on top of this process's.
        wait: False returns before the server is ready.
        command: what to start in place of `vllm serve`, as arguments of Python.
    """

    def __init__(self, *args, env=None, wait=True, command=("-m", "vllm.entrypoints.cli.main", "serve"), timeout=120):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.args = [str(TINY), "--served-model-name", "tiny", "--port", str(self.port), *SMALL, *map(str, args)]
        self._command = [sys.executable, *command, *self.args]
        self._env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **(env or {})}
        self._wait, self._timeout = wait, timeout
        self.process = None

    def __enter__(self):
        self._log = tempfile.NamedTemporaryFile(prefix="vllm-server-", suffix=".log")
        self.process = subprocess.Popen(
            self._command, cwd=ROOT, env=self._env, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True
        )
        self.http = httpx.Client(base_url=self.url, timeout=60)
        if self._wait:
            self.wait_until_ready()
        return self

    def __exit__(self, *_):
        self.http.close()
        self.stop()
        self._log.close()

    @property
    def log(self) -> str:
        """What the server has printed so far."""
        return Path(self._log.name).read_text()

    def wait_until_ready(self):
        end = time.monotonic() + self._timeout
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode}:\n{self.log}")
            try:
                if self.http.get("/health").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.05)
        self.stop(signal.SIGKILL)
        raise RuntimeError(f"the server was not ready after {self._timeout} s:\n{self.log}")

    def send(self, number):
        os.kill(self.process.pid, number)

    def wait(self, timeout=30) -> int:
        """The exit code, once it ends by itself."""
        return self.process.wait(timeout)

    def stop(self, number=signal.SIGTERM, timeout=40) -> int:
        """End it, and everything it has started; the exit code."""
        children = self.children()
        if self.process.poll() is None:
            self.send(number)
        try:
            return self.process.wait(timeout)
        finally:
            for process in [*children, self.process]:
                with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                    process.kill()

    def children(self) -> list[psutil.Process]:
        """The processes that it has started, the engine's among them."""
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def engines(self) -> list[psutil.Process]:
        """The process in which the engine runs, once there is one."""
        return list(filter(_is_engine, self.children()))

    def engine(self) -> psutil.Process:
        """The same, where there must be one."""
        (found,) = self.engines()
        return found

    # Requests. `body` is a dictionary, or bytes as they are.

    def post(self, path, body, **headers) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.http.post(path, content=content, headers={"Content-Type": "application/json", **headers})

    def chat(self, text, **fields) -> dict:
        """A greedy answer to one message, thinking off unless `fields` say otherwise."""
        done = self.post("/v1/chat/completions", chat_body(text, **fields))
        assert done.status_code == 200, done.text
        return done.json()

    def complete(self, prompt, **fields) -> dict:
        done = self.post("/v1/completions", {"prompt": prompt, "temperature": 0, **fields})
        assert done.status_code == 200, done.text
        return done.json()

    def stream(self, path, body) -> list[dict]:
        """The events of a stream that ends as it should."""
        with self.http.stream("POST", path, json={**body, "stream": True}) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            return parse_events("".join(response.iter_text()))

    def openai(self, **options) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, **options)

    def async_openai(self, **options) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, **options)


def _is_engine(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):  # a compiler's helper, say, that has just gone
        return "core_proc" in " ".join(process.cmdline())
    return False


def chat_body(text, **fields) -> dict:
    messages = text if isinstance(text, list) else [{"role": "user", "content": text}]
    return {"messages": messages, "temperature": 0, "chat_template_kwargs": {"enable_thinking": False}, **fields}


def parse_events(text: str) -> list[dict]:
    """Server-sent events of a whole stream, without the [DONE] that must end it."""
    events = text.split("\n\n")
    assert events.pop() == "", "the stream ends in the middle of an event"
    assert all(item.startswith("data: ") for item in events)
    assert events[-1] == "data: [DONE]"
    return [json.loads(item.removeprefix("data: ")) for item in events[:-1]]
