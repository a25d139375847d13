"""What users meet who start a server, or ask it for the first time, and get something wrong: one line that says what to do."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest

from tests.entrypoints.openai.server import ROOT, TINY, RemoteServer, free_port
from tests.server.probes import works


def serve(*arguments, **env):
    """A server that does not come to serve."""
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)


def check_one_line(done, *words):
    """Of error, last, and with these words; what loading has said by then may stand before it."""
    assert done.returncode == 2, done
    *before, last = done.stderr.strip().splitlines()
    assert last.startswith("error: ") and all(word in last for word in words), done.stderr
    assert not any(line.startswith(("error", "ERROR", "Traceback", "  File")) for line in before), done.stderr
    assert "Serving" not in done.stdout


@pytest.fixture
def broken(tmp_path):
    """A copy of the checkpoint with one file replaced, or removed."""

    def make(name, content):
        folder = shutil.copytree(TINY, tmp_path / "model")
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)
        return folder

    return make


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("model.safetensors", lambda old: old[: len(old) // 2], ["model.safetensors", "damaged"]),
        ("model.safetensors", lambda old: None, ["no safetensors files"]),
        ("config.json", lambda old: b"{", ["config.json", "not valid JSON"]),
        ("tokenizer.json", lambda old: b"{}", ["--tokenizer", "cannot be read"]),
    ],
)
def test_a_model_that_cannot_be_loaded(broken, name, change, words):
    """Most of it is found by the engine's process, whose own words these are."""
    folder = broken(name, change((TINY / name).read_bytes()))
    check_one_line(serve(folder, "--port", free_port()), *words)


def test_a_model_that_is_not_there():
    check_one_line(serve("/nowhere/at/all", "--port", free_port()), "/nowhere/at/all", "no such folder")


def test_a_model_that_does_not_fit():
    check_one_line(serve(TINY, "--port", free_port(), "--kv-cache-memory-bytes", "1K"), "--kv-cache-memory-bytes")


@pytest.mark.parametrize(
    ("flags", "advice"),
    [
        (["--enable-prefix-caching"], "leave it out"),
        (["--pipeline-parallel-size", "2"], "one GPU"),
        (["--enable-lora"], "merge the adapter into the weights"),
        (["--ssl-certfile", "x.pem"], "reverse proxy"),
        (["--trust-remote-code"], "never run"),
        (["--guided-decoding-backend", "outlines"], "leave it out"),
        (["--cpu-offload-gb", "4"], "quantised"),
    ],
)
def test_flags_of_vllm_that_are_not_here(flags, advice):
    """Refused by name, with what to do, before anything is loaded."""
    start = time.monotonic()
    done = serve(TINY, *flags)
    check_one_line(done, flags[0], advice)
    assert done.stderr.count("\n") == 1 and time.monotonic() - start < 10


def test_a_flag_that_nobody_has():
    done = serve(TINY, "--max-num-seq", "4")
    check_one_line(done, "--max-num-seq", "--max-num-seqs")


@pytest.fixture(scope="module")
def plain():
    """No parser, one name."""
    with RemoteServer("--max-model-len", 128) as server:
        yield server


def test_a_port_in_use(plain):
    """Found before anything is loaded, and nothing happens to who has it."""
    start = time.monotonic()
    done = serve(TINY, "--port", plain.port)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"error: --port {plain.port}: cannot listen on 127.0.0.1: Address already in use\n"
    assert time.monotonic() - start < 15
    works(plain)


def error_of(response, status):
    assert response.status_code == status, response.text
    return response.json()["error"]


def test_a_wrong_model_name(plain):
    for path, body in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("/v1/completions", {"prompt": "a"}),
    ):
        error = error_of(plain.post(path, {**body, "model": "gpt-4"}), 404)
        assert error["message"] == "The model 'gpt-4' does not exist; this server has: tiny"
        assert (error["type"], error["param"]) == ("NotFoundError", "model")


def test_tools_without_a_parser(plain):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    body = {"messages": [{"role": "user", "content": "a"}], "tools": tools}
    for choice, flags in (
        ("auto", ["--enable-auto-tool-choice", "--tool-call-parser"]),
        ("required", ["--tool-call-parser"]),
        ({"type": "function", "function": {"name": "f"}}, ["--tool-call-parser"]),
    ):
        error = error_of(plain.post("/v1/chat/completions", {**body, "tool_choice": choice}), 400)
        assert all(flag in error["message"] for flag in flags) and error["param"] == "tools"
        assert ("--enable-auto-tool-choice" in error["message"]) == (choice == "auto")


def test_too_long_a_prompt(plain):
    error = error_of(plain.post("/v1/completions", {"prompt": "word " * 300}), 400)
    assert "maximum context length is 128 tokens" in error["message"] and error["param"] == "prompt"


def test_fields_of_other_versions(plain):
    """Named, with what to send in their place."""
    for field, value, advice in (
        ("guided_json", {"type": "object"}, "structured_outputs"),
        ("best_of", 3, "send n"),
        ("suffix", "b", "write the whole prompt into prompt"),
        ("truncate_prompt_tokens", 5, "shorten the prompt"),
    ):
        error = error_of(plain.post("/v1/completions", {"prompt": "a", field: value}), 400)
        assert f"{field} is not supported" in error["message"] and advice in error["message"]


def test_what_it_says_when_it_serves(plain):
    """A line of curl that works as it stands."""
    (line,) = [line for line in plain.log.splitlines() if line.strip().startswith("curl ")]
    done = subprocess.run(["bash", "-c", line.strip() + " -s"], capture_output=True, text=True, timeout=30)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"]


DEAF = "import os, sys; reader, writer = os.pipe(); os.close(reader); os.dup2(writer, 1)"
STUB = "from vllm.benchmarks.stub_server import main; sys.exit(main())"


def test_nobody_reads_what_it_says_when_it_serves():
    """As in `vllm serve | head -1`: that is no reason to end."""
    with RemoteServer(command=("-c", f"{DEAF}; {STUB}", "fast")) as server:
        server.complete("a", max_tokens=2)
        assert server.stop() == 0 and "Traceback" not in server.log
