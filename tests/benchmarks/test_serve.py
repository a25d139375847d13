"""`vllm bench serve` against a server whose timings are known."""

import asyncio
import contextlib
import json
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.entrypoints.openai.server import free_port
from vllm.benchmarks.datasets import Sample
from vllm.benchmarks.drive import Endpoint, Reader, arrival_times, ask
from vllm.benchmarks.http_client import Client
from vllm.benchmarks.serve_metrics import Record
from vllm.entrypoints.cli import main as cli

SERVER = Path(__file__).with_name("known_server.py")
QUICK = ("--skip-tokenizer-init", "--random-input-len", "7", "--disable-tqdm", "--model", "known")


@contextlib.contextmanager
def known_server(first_ms, gap_ms):
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, str(SERVER), str(port), str(first_ms), str(gap_ms)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "ready\n"
        yield port
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def server():
    with known_server(20, 2) as port:
        yield port


def bench(*words):
    return cli.main(["bench", "serve", *map(str, words)])


def truth(port, count):
    """Means and medians in ms of the last `count` streams, by the server's own clock."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/sent") as answer:
        streams = json.loads(answer.read())[-count:]
    gaps = [b - a for _, *sent in streams for a, b in zip(sent, sent[1:])]
    values = {
        "ttft": [sent[0] - received for received, *sent in streams],
        "tpot": [(sent[-1] - sent[0]) / (len(sent) - 1) for _, *sent in streams],
        "itl": gaps,
        "e2el": [sent[-1] - received for received, *sent in streams],
    }
    found = {}
    for name, seconds in values.items():
        found[f"mean_{name}_ms"] = 1e3 * statistics.fmean(seconds)
        found[f"median_{name}_ms"] = 1e3 * statistics.median(seconds)
    tokens = sum(len(sent) for _, *sent in streams)
    found["output_throughput"] = tokens / (max(s[-1] for s in streams) - min(s[0] for s in streams))
    return found


def test_five_thousand_tokens_a_second_are_timed_within_two_percent(tmp_path):
    """50 streams with a token every 10 ms, begun one after the other. Other work on the machine delays server and client alike, but not at the same moments, so the best of
    a few runs counts."""
    streams, tokens, worst = 50, 200, {}
    for attempt in range(5):
        with known_server(150, 10) as port:
            words = (
                "--num-prompts",
                streams,
                "--random-output-len",
                tokens,
                "--request-rate",
                200,
                "--burstiness",
                1000,
            )
            words += ("--save-result", "--result-dir", tmp_path)
            assert bench(*QUICK, "--port", port, *words, "--result-filename", f"{attempt}.json") == 0
            known = truth(port, streams)
        found = json.loads((tmp_path / f"{attempt}.json").read_text())
        assert found["completed"] == streams and found["total_output_tokens"] == streams * tokens
        assert found["total_input_tokens"] == 7 * streams
        worst = {name: abs(found[name] / value - 1) for name, value in known.items()}
        # The rate really is what it should be, or the rest says nothing.
        if max(worst.values()) < 0.02 and found["max_output_tokens_per_s"] > 4900:
            break
    assert max(worst.values()) < 0.02, worst
    assert found["max_output_tokens_per_s"] > 4900


def test_the_block_and_the_file(server, capsys, tmp_path):
    words = ("--num-prompts", 4, "--random-output-len", 5, "--save-result", "--save-detailed", "--max-concurrency", 2)
    where = (
        "--result-dir",
        tmp_path,
        "--result-filename",
        "r.json",
        "--goodput",
        "ttft:0.001",
        "tpot:5000",
        "--metric-percentiles",
        "50,99",
    )
    assert bench(*QUICK, "--port", server, *words, *where) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {len(line) for line in lines if line.endswith(("-", "="))} == {50}
    assert lines[0] == "============ Serving Benchmark Result ============"
    rows = dict(line.split(":", 1) for line in lines if ":" in line)
    assert [int(rows[name]) for name in ("Successful requests", "Failed requests", "Total generated tokens")] == [
        4,
        0,
        20,
    ]
    assert float(rows["Request goodput (req/s)"]) == 0  # no first token comes that fast; others may come with it
    assert {
        f"{kind} {name} (ms)" for kind in ("Mean", "Median", "P50", "P99") for name in ("TTFT", "TPOT", "ITL", "E2EL")
    } <= set(rows)
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["complete"] and not found["interrupted"] and found["max_concurrent_requests"] == 2
    assert found["output_lens"] == [5] * 4 and [len(gaps) for gaps in found["itls"]] == [4] * 4
    assert found["generated_texts"] == [" w" * 5] * 4 and found["errors"] == [""] * 4
    assert found["environment"]["versions"]["torch"] and found["flags"]["num_prompts"] == 4
    assert found["model_id"] == "known" and found["backend"] == "openai"
    for name, value in (
        ("median_ttft_ms", found["p50_ttft_ms"]),
        ("total_token_throughput", 12 * 4 / found["duration"]),
    ):
        assert found[name] == pytest.approx(value, rel=1e-4)


def test_a_real_server_without_model(tmp_path):
    """Both endpoints of our own server, prompts of exact lengths, through a tokenizer."""
    from tests.entrypoints.openai.server import RemoteServer

    with RemoteServer(command=("-m", "vllm.benchmarks.stub_server", "paced")) as remote:
        for backend in ("vllm", "openai-chat"):
            words = (
                "--backend",
                backend,
                "--base-url",
                remote.url,
                "--tokenizer",
                "preset:tiny",
                "--disable-tqdm",
                "--ignore-eos",
            )
            lengths = (
                "--num-prompts",
                6,
                "--random-input-len",
                30,
                "--random-output-len",
                20,
                "--random-range-ratio",
                0.5,
            )
            where = ("--save-detailed", "--result-dir", tmp_path, "--result-filename", f"{backend}.json")
            assert bench(*words, *lengths, *where, "--request-rate", 50, "--output-dir", tmp_path / backend) == 0
            found = json.loads((tmp_path / f"{backend}.json").read_text())
            assert found["completed"] == 6 and found["model_id"] == "tiny"
            assert all(10 <= n <= 30 for n in found["output_lens"]) and len(set(found["output_lens"])) > 1
            if backend == "vllm":  # no chat template around the prompt
                assert all(14 <= n <= 46 for n in found["input_lens"])
            assert (tmp_path / backend / "serve.md").is_file() and (
                tmp_path / backend / "serve-latencies.png"
            ).is_file()


def test_tokens_without_text_are_timed(tmp_path):
    """As a preset's are, whose model has a larger vocabulary than the tokenizer that it borrows."""
    from tests.entrypoints.openai.server import SMALL, RemoteServer

    with RemoteServer(*SMALL) as remote:
        (special,) = remote.post("/tokenize", {"prompt": "<|im_start|>"}).json()["tokens"]
        only = json.dumps({"allowed_token_ids": [special], "ignore_eos": True})
        for backend in ("openai", "openai-chat"):
            where = ("--save-detailed", "--result-dir", tmp_path, "--result-filename", f"{backend}.json")
            asked = ("--num-prompts", 3, "--random-input-len", 8, "--random-output-len", 5, "--extra-body", only)
            words = ("--backend", backend, "--base-url", remote.url, "--tokenizer", "preset:tiny", "--disable-tqdm")
            assert bench(*words, *asked, *where) == 0
            found = json.loads((tmp_path / f"{backend}.json").read_text())
            assert (found["completed"], found["failed"]) == (3, 0)
            assert found["output_lens"] == [5] * 3 and all(len(gaps) == 3 for gaps in found["itls"])


def test_a_chat_that_shows_no_token_is_an_error():
    """A server that leaves out what has no text, or whose parser holds it back: the first event and the last bring no token."""

    class Silent:
        async def stream(self, request, reader):
            reader({"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}, 1.0)
            reader({"choices": [{"delta": {}, "finish_reason": "length"}]}, 2.0)
            reader({"choices": [], "usage": {"completion_tokens": 5, "prompt_tokens": 2}}, 2.0)

    endpoint = Endpoint("/v1/chat/completions", True, "tiny")
    record = asyncio.run(ask(Silent(), endpoint, Sample("", 2, 5), b"as asked"))
    assert "nothing tells when the answer's 5 tokens came: they have no text (--backend openai" in record.error


def test_an_interrupted_run_keeps_what_it_has(tmp_path):
    with known_server(10, 20) as port:
        words = ["--num-prompts", "400", "--random-output-len", "10", "--max-concurrency", "8", "--port", str(port)]
        where = ["--save-result", "--result-dir", str(tmp_path), "--result-filename", "r.json"]
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve", *QUICK, *words, *where]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        end = time.monotonic() + 60
        while time.monotonic() < end:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/sent") as answer:
                if len(json.loads(answer.read())) > 40:
                    break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["interrupted"] and not found["complete"] and 8 <= found["completed"] < 400
    assert "Serving Benchmark Result" in out and "interrupted" in err and "Traceback" not in err


def test_an_unreachable_server_is_one_line(capsys):
    port = free_port()
    assert bench(*QUICK, "--port", port, "--ready-check-timeout-sec", 0.1) == 1
    out, err = capsys.readouterr()
    assert (
        out == ""
        and err.splitlines()[-1]
        == f"error: http://127.0.0.1:{port}: cannot connect to 127.0.0.1:{port}: Connection refused"
    )
    assert bench(*QUICK, "--port", port, "--ready-check-timeout-sec", 0, "--num-prompts", 2) == 1
    assert "2 requests failed; the first: cannot connect" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--goodput", "ttft=5"], "--goodput ttft=5: expected"),
        (["--percentile-metrics", "tttf"], "--percentile-metrics tttf: expected ttft"),
        (["--metric-percentiles", "101"], "--metric-percentiles"),
        (["--request-rate", "0"], "--request-rate and --burstiness must be above 0"),
        (["--request-rate", "nan"], "--request-rate and --burstiness must be above 0"),
        (["--request-rate", "5", "--burstiness", "inf"], "only the first may be inf"),
        (["--num-warmups", "-1"], "--num-warmups"),
        (["--goodput", "ttft:nan"], "--goodput ttft:nan: expected"),
        (["--dataset-name", "sharegpt"], "needs --dataset-path"),
        (["--dataset-name", "custom", "--dataset-path", "/no/such"], "/no/such: no such file"),
        (["--num-prompts", "0"], "--num-prompts must be at least 1"),
        (["--base-url", "localhost:8000"], "expected http://host:port"),
        (["--base-url", "http://[::1:80"], "--base-url http://[::1:80: Invalid IPv6"),
        (["--base-url", "http://localhost:x"], "--base-url http://localhost:x: Port"),
        (["--save-result", "--result-dir", "/no/such"], "--result-dir /no/such: no such folder"),
        (["--backend", "openai-chat"], "cannot be sent as token ids"),
        (["--header", "x"], "expected NAME=VALUE"),
        (["--max-concurency", "3"], "did you mean --max-concurrency?"),
    ],
)
def test_mistakes_are_one_line(server, capsys, words, message):
    assert bench(*QUICK, "--port", server, *words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ") and message in err


def test_a_kept_connection_that_the_server_closed_is_opened_again():
    """The server answers one request a connection, and says nothing of that."""
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s"
    event = b'data: {"choices": [{"text": "x", "finish_reason": null}]}\n\ndata: [DONE]\n\n'
    asked = []

    async def handle(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        asked.append(1)
        writer.write(answer % (len(event), event))
        await writer.drain()
        with contextlib.suppress(asyncio.IncompleteReadError):
            await reader.readexactly(20)  # the next request's first bytes, to which there is no answer
        writer.close()

    async def main():
        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        async with server:
            client = Client(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
            records = [await ask(client, Endpoint("/v1/completions", False, "m"), Sample("hi", 1, 1)) for _ in range(3)]
            client.close()
        return records

    assert [(record.error, "".join(record.text)) for record in asyncio.run(main())] == [(None, "x")] * 3
    assert len(asked) == 3


def test_what_counts_as_a_token():
    record = Record(3, 4)
    read = Reader(record, chat=True)
    read({"choices": [{"delta": {"role": "assistant", "content": ""}}]}, 1.0)
    read({"choices": [{"delta": {"reasoning": "hm"}}]}, 2.0)
    read({"choices": [{"delta": {"content": "yes"}}]}, 3.0)
    read({"choices": [{"delta": {}, "finish_reason": "stop"}]}, 4.0)
    read({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 2}}, 5.0)
    assert record.arrivals == [2.0, 3.0] and record.output_len == 2 and record.prompt_len == 9
    assert "".join(record.text) == "hmyes" and record.counted
    record = Record(3, 4)
    read = Reader(record, chat=False)
    read({"choices": [{"text": "", "finish_reason": None}]}, 1.0)  # half a letter
    read({"choices": [{"text": "é", "finish_reason": None}]}, 2.0)
    read({"choices": [{"text": "", "finish_reason": "length"}]}, 3.0)
    assert record.arrivals == [1.0, 2.0]
    read({"error": {"message": "the engine died"}}, 4.0)
    assert record.error == "the engine died" and not record.success


def test_bodies():
    sample = Sample("hi", 1, 5)
    asked = Endpoint("/v1/completions", False, "m", {"top_p": 0.5, "temperature": 1}).request(sample)
    assert asked["prompt"] == "hi" and asked["max_tokens"] == 5 and asked["temperature"] == 1 and asked["top_p"] == 0.5
    assert asked["stream"] and asked["stream_options"] == {"include_usage": True}
    asked = Endpoint("/v1/chat/completions", True, "m").request(sample)
    assert asked["messages"] == [{"role": "user", "content": "hi"}] and asked["temperature"] == 0


def test_arrivals():
    assert arrival_times(3, float("inf"), 1.0) == [0, 0, 0]
    spread = {}
    for burstiness in (0.2, 1.0, 25.0):
        times = arrival_times(4000, 20, burstiness, seed=1)
        assert times == sorted(times) and times[-1] == pytest.approx(200)
        gaps = [b - a for a, b in zip(times, times[1:])]
        spread[burstiness] = statistics.pstdev(gaps) * 20
        # A gamma distribution of shape k has a coefficient of variation of 1 / sqrt(k).
        assert spread[burstiness] == pytest.approx(burstiness**-0.5, rel=0.1)
    assert arrival_times(50, 20, 1.0, seed=1) != arrival_times(50, 20, 1.0, seed=2)
