"""What a token costs the server on its way from the engine to a client's socket, without a model.

    python benchmarks/server_overhead.py [--streams 1 256] [--tokens N] [--runs N] [--out benchmarks/results/server_overhead.json]

A stub in the engine's process makes a token for every stream at a set pace. CPU time is that of the processes, as the system
counts it; the client is a process of its own, and of several runs the cheapest counts, because whatever else runs on the machine
only adds to it. With one stream, a token of a completion must cost the server less than 0.3 ms;
many, at the pace of large models, must keep up: they may take a tenth longer than one stream does.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import psutil

from vllm.benchmarks.stub_core import PacedStubCore, SlowStubCore
from vllm.config.checkpoint import TINY

MOST_CPU = 0.3  # milliseconds of the server for a token of one stream
MOST_LAG = 0.1  # of the time that one stream takes at the same pace
KINDS = {
    "completion": ("/v1/completions", {"prompt": [1, 2, 3]}),
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "What is 12+34?"}]}),
}
CHAT_FLAGS = ["--reasoning-parser", "qwen3", "--tool-call-parser", "qwen3_coder", "--enable-auto-tool-choice"]


@contextlib.contextmanager
def server(core: str) -> Iterator[tuple[int, psutil.Process, psutil.Process]]:
    """(port, the server's process, the engine's) of a server on a stub."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = [str(TINY), "--port", str(port), "--max-num-seqs", "1024", "--max-num-batched-tokens", "1024", *CHAT_FLAGS]
    process = subprocess.Popen(
        [sys.executable, "-m", "vllm.benchmarks.stub_server", core, *flags], stdout=subprocess.DEVNULL
    )
    try:
        end = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < end, "the server does not start"
                time.sleep(0.1)
        running = psutil.Process(process.pid)
        (engine,) = [child for child in running.children() if "core_proc" in " ".join(child.cmdline())]
        yield port, running, engine
    finally:
        process.terminate()
        process.wait(30)


async def read(port: int, kind: str, tokens: int) -> tuple[int, int]:
    """(tokens, chunks) of one stream, as its own usage counts them."""
    path, fields = KINDS[kind]
    body = {
        **fields,
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    content = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(content)}\r\n\r\n"
    writer.write(head.encode() + content)
    pieces = []
    while piece := await reader.read(1 << 16):
        pieces.append(piece)
    writer.close()
    lines = [line for line in b"".join(pieces).split(b"\n") if line.startswith(b"data: ")]
    assert lines[-1].strip() == b"data: [DONE]"
    return json.loads(lines[-2][6:])["usage"]["completion_tokens"], len(lines) - 2


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


async def measure(core: str, kind: str, streams: int, tokens: int) -> dict[str, float | int | str]:
    """Run `streams` streams at once on a fresh server."""
    pace = {"paced": PacedStubCore, "slow": SlowStubCore}[core].seconds_a_step
    with server(core) as (port, front, engine):
        await asyncio.gather(*(read(port, kind, 20) for _ in range(streams)))
        start = time.perf_counter()
        await read(port, kind, tokens)
        alone = time.perf_counter() - start
        before = [cpu_seconds(front), cpu_seconds(engine), time.perf_counter()]
        results = await asyncio.gather(*(read(port, kind, tokens) for _ in range(streams)))
        after = [cpu_seconds(front), cpu_seconds(engine), time.perf_counter()]
    front_s, engine_s, seconds = (now - then for now, then in zip(after, before))
    made, chunks = (sum(column) for column in zip(*results))
    assert made == streams * tokens
    return {
        "kind": kind,
        "streams": streams,
        "tokens_a_stream": tokens,
        "milliseconds_a_step": pace * 1e3,
        "server_cpu_ms_a_token": round(front_s / made * 1e3, 4),
        "engine_cpu_ms_a_token": round(engine_s / made * 1e3, 4),
        "tokens_per_second": round(made / seconds, 1),
        "tokens_a_chunk": round(made / chunks, 3),
        "seconds": round(seconds, 3),
        "lag": round(seconds / alone - 1, 4),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--tokens", type=int, help="a stream; default: 3000 of one stream, 300 of each of several")
    parser.add_argument("--runs", type=int, default=3, help="of each; the cheapest is kept")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> int:
    """1 where a bound does not hold."""
    args = parse()
    kept, failed = [], []
    for streams in args.streams:
        for kind in KINDS:
            core, tokens = ("paced", args.tokens or 3000) if streams == 1 else ("slow", args.tokens or 300)
            runs = [asyncio.run(measure(core, kind, streams, tokens)) for _ in range(args.runs)]
            costs = [run["server_cpu_ms_a_token"] for run in runs]
            run = runs[costs.index(min(costs))]
            kept.append({**run, "server_cpu_ms_of_runs": costs})
            print(json.dumps(kept[-1]), flush=True)
            if streams == 1 and run["server_cpu_ms_a_token"] >= MOST_CPU:
                failed.append(f"{kind}: a token costs {run['server_cpu_ms_a_token']} ms")
            if streams > 1 and run["lag"] > MOST_LAG:
                failed.append(f"{kind}: {streams} streams take {run['lag']:.0%} longer than one")
    if args.out:
        names = ("fastapi", "orjson", "pyzmq", "uvicorn", "uvloop")
        result = {
            "command": shlex.join(["python", *sys.argv]),
            "machine": {"cpus": os.cpu_count(), "architecture": platform.machine(), "load_before": round(LOAD, 2)},
            "versions": {"python": platform.python_version(), **{name: version(name) for name in names}},
            "bounds": {"server_cpu_ms_a_token_of_one_stream": MOST_CPU, "lag_of_many_streams": MOST_LAG},
            "runs": kept,
            "failed": failed,
        }
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    for problem in failed:
        print(f"FAILED {problem}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    LOAD = os.getloadavg()[0]
    sys.exit(main())
