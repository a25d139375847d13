"""What a token costs the server on its way from the engine to a client's socket, without a model.

    python benchmarks/server_overhead.py [--streams 1 256] [--tokens N] [--runs N] [--out benchmarks/results/server_overhead.json]

A stub in the engine's process makes a token for every stream at a set pace. CPU time is that of the processes, as the system
counts it; the client is a process of its own. The runs of all cases are interleaved, and medians are kept: whatever else runs on
the machine meets all of them. With one stream, a token must cost the server less than 0.3 ms. Many streams get a token each every
20 ms by the clock, whether or not anybody has read the one before; the server keeps up when they end within a tenth of the time
that the clock gives them and when a token is no longer on its way at the end than it was at the beginning.

A server that is late puts the tokens that wait for a stream into one event. So beside the pace there is a case without any, as
fast as the stub can make tokens: what the server can take at most, many of them in an event.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import re
import shlex
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import psutil
import uvloop

from vllm.benchmarks.stub_core import PacedStubCore, ScheduledStubCore
from vllm.config.checkpoint import TINY

MOST_CPU = 0.3  # milliseconds of the server for a token of one stream
MOST_LAG = 0.1  # of the time that the clock gives the tokens of many
MOST_GROWTH = 20.0  # milliseconds that tokens may take longer at the end: one step
COMPLETION = ("/v1/completions", {"prompt": [1, 2, 3]})
KINDS = {
    "completion": COMPLETION,
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "What is 12+34?"}]}),
    # The number of a token is in its id, so that each can be held against the clock.
    "completion with token ids": (COMPLETION[0], {**COMPLETION[1], "return_token_ids": True}),
}
PACES = {"paced": PacedStubCore.seconds_a_step, "scheduled": ScheduledStubCore.seconds_a_step, "fast": 0.0}
CHAT_FLAGS = ["--reasoning-parser", "qwen3", "--tool-call-parser", "qwen3_coder", "--enable-auto-tool-choice"]

Case = tuple[str, str, int, int]  # core, kind, streams, tokens a stream


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


async def read(port: int, kind: str, tokens: int) -> list[tuple[float, bytes]]:
    """What came of one stream, and when."""
    path, fields = KINDS[kind]
    options = {"max_tokens": tokens, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    content = json.dumps({**fields, **options}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(content)}\r\n\r\n"
    writer.write(head.encode() + content)
    pieces = []
    while piece := await reader.read(1 << 16):
        pieces.append((time.monotonic(), piece))
    writer.close()
    return pieces


def counts(pieces: list[tuple[float, bytes]]) -> tuple[int, int]:
    """(tokens, events) of one stream, as its own usage counts them."""
    lines = [line for line in b"".join(piece for _, piece in pieces).split(b"\n") if line.startswith(b"data: ")]
    assert lines[-1].strip() == b"data: [DONE]"
    return json.loads(lines[-2][6:])["usage"]["completion_tokens"], len(lines) - 2


def delays(pieces: list[tuple[float, bytes]], pace: float) -> list[float]:
    """How much later than the quickest of its stream each piece came, in seconds, by the clock's time for its last token."""
    found = []
    for at, piece in pieces:
        if ids := re.findall(rb'"token_ids":\[([\d,]+)\]', piece):
            last = int(ids[-1].rpartition(b",")[2])
            found.append(at - pace * last)
    return [delay - min(found) for delay in found]


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


async def measure(case: Case, port: int, front: psutil.Process, engine: psutil.Process) -> dict[str, float]:
    """Run a case's streams at once."""
    core, kind, streams, tokens = case
    before = [cpu_seconds(front), cpu_seconds(engine), time.perf_counter()]
    answers = await asyncio.gather(*(read(port, kind, tokens) for _ in range(streams)))
    after = [cpu_seconds(front), cpu_seconds(engine), time.perf_counter()]
    front_s, engine_s, seconds = (now - then for now, then in zip(after, before))
    made, events = (sum(column) for column in zip(*map(counts, answers)))
    assert made == streams * tokens
    result = {
        "server_cpu_ms_a_token": front_s / made * 1e3,
        "engine_cpu_ms_a_token": engine_s / made * 1e3,
        "server_cpu_share": front_s / seconds,
        "tokens_per_second": made / seconds,
        "tokens_an_event": made / events,
        "seconds": seconds,
    }
    if core == "scheduled":
        result["lag"] = seconds / (tokens * PACES[core]) - 1
    if core == "scheduled" and "ids" in kind:
        found = [delays(pieces, PACES[core]) for pieces in answers]
        late = sorted(delay * 1e3 for stream in found for delay in stream)
        early, end = ([d for s in found for d in s[len(s) * i // 4 : len(s) * (i + 1) // 4]] for i in (1, 3))
        result["delay_ms_p50"], result["delay_ms_p99"] = late[len(late) // 2], late[len(late) * 99 // 100]
        result["delay_ms_growth"] = (statistics.median(end) - statistics.median(early)) * 1e3
    return result


def summary(case: Case, runs: list[dict[str, float]]) -> dict[str, object]:
    """Medians over the runs, and the server's cost in each of them."""
    core, kind, streams, tokens = case
    medians = {name: round(statistics.median(run[name] for run in runs), 4) for name in runs[0]}
    return {
        "kind": kind,
        "streams": streams,
        "tokens_a_stream": tokens,
        "milliseconds_a_step": PACES[core] * 1e3,
        **medians,
        "server_cpu_ms_of_runs": [round(run["server_cpu_ms_a_token"], 4) for run in runs],
        **({"lag_of_runs": [round(run["lag"], 4) for run in runs]} if "lag" in runs[0] else {}),
    }


def problems(found: dict[str, object]) -> list[str]:
    """Which bounds do not hold."""
    kind, streams = found["kind"], found["streams"]
    failed = []
    if streams == 1 and found["server_cpu_ms_a_token"] >= MOST_CPU:
        failed.append(f"{kind}: a token costs {found['server_cpu_ms_a_token']} ms")
    if found.get("lag", 0) > MOST_LAG:
        failed.append(f"{kind}: {streams} streams take {found['lag']:.0%} longer than the clock gives them")
    if found.get("delay_ms_growth", 0) > MOST_GROWTH:
        failed.append(f"{kind}: tokens take {found['delay_ms_growth']:.0f} ms longer at the end")
    return failed


def cases(streams: list[int], tokens: int | None) -> list[Case]:
    made: list[Case] = []
    for count in streams:
        if count == 1:
            made += [("paced", kind, 1, tokens or 3000) for kind in ("completion", "chat")]
        else:
            made += [("scheduled", kind, count, tokens or 500) for kind in KINDS]
            made.append(("fast", "completion", count, tokens or 1500))
    return made


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--tokens", type=int, help="a stream; default: 3000 of one stream, 500 of each of several")
    parser.add_argument("--runs", type=int, default=5, help="of each, interleaved")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> int:
    """1 where a bound does not hold."""
    args = parse()
    wanted = cases(args.streams, args.tokens)
    runs: dict[Case, list[dict[str, float]]] = {case: [] for case in wanted}
    loads = [os.getloadavg()[0]]
    with contextlib.ExitStack() as stack:
        servers = {core: stack.enter_context(server(core)) for core in dict.fromkeys(case[0] for case in wanted)}
        for case in wanted:
            uvloop.run(measure((*case[:3], 20), *servers[case[0]]))
        for _ in range(args.runs):
            for case in wanted:
                runs[case].append(uvloop.run(measure(case, *servers[case[0]])))
            loads.append(os.getloadavg()[0])
    kept = [summary(case, found) for case, found in runs.items()]
    failed = [problem for found in kept for problem in problems(found)]
    for found in kept:
        print(json.dumps(found), flush=True)
    if args.out:
        names = ("fastapi", "orjson", "pyzmq", "uvicorn", "uvloop")
        result = {
            "command": shlex.join(["python", *sys.argv]),
            "method": f"medians of {args.runs} interleaved runs of each case, on a machine that others used at the same time",
            "machine": {
                "cpus": os.cpu_count(),
                "architecture": platform.machine(),
                "loads": [round(load, 2) for load in loads],
            },
            "versions": {"python": platform.python_version(), **{name: version(name) for name in names}},
            "bounds": {
                "server_cpu_ms_a_token_of_one_stream": MOST_CPU,
                "lag_of_many_streams_behind_the_clock": MOST_LAG,
                "delay_ms_growth": MOST_GROWTH,
            },
            "runs": kept,
            "failed": failed,
        }
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    for problem in failed:
        print(f"FAILED {problem}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
