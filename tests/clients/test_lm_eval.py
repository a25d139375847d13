"""lm-eval: tasks made of sums that the checkpoint knows, which it must therefore score."""

import json
import shutil
from pathlib import Path

import pytest

from tests.clients.programs import run, run_json, write_lines
from tests.entrypoints.openai.server import TINY
from vllm.benchmarks.tiny_tasks import generate

TASKS = Path(__file__).parent / "lm_eval_tasks"
SAMPLES = 32


@pytest.fixture
def tasks(tmp_path) -> Path:
    """The folder of the tasks, their questions beside them."""
    folder = shutil.copytree(TASKS, tmp_path / "tasks")
    sums = []
    for number, item in enumerate(generate("completion", SAMPLES)):
        total = int(item.expected)
        choices = [str(total + wrong) for wrong in (-10, 1, 100)]
        choices.insert(number % 4, str(total))
        sums.append({"question": item.prompt, "answer": str(total), "choices": choices, "right": number % 4})
    write_lines(tmp_path / "sums.jsonl", sums)
    chats = [{"question": item.messages[0]["content"], "answer": item.expected} for item in generate("add2", SAMPLES)]
    write_lines(tmp_path / "chats.jsonl", chats)
    return folder


@pytest.mark.slow
def test_the_command(server, tasks, tmp_path):
    """Token ids made on the client's side: generation, and log-likelihoods of each choice."""
    arguments = {
        "model": "tiny",
        "base_url": f"{server.url}/v1/completions",
        "tokenizer": TINY,
        "tokenizer_backend": "huggingface",
        "num_concurrent": 4,
    }
    run(
        *("lm-eval", "run", "--model", "local-completions", "--model_args"),
        ",".join(f"{name}={value}" for name, value in arguments.items()),
        *("--tasks", "tiny_sums,tiny_sums_choose", "--include_path", tasks, "--output_path", "scores"),
        folder=tmp_path,
    )
    (path,) = tmp_path.glob("scores/**/results_*.json")
    results = json.loads(path.read_text())
    assert results["n-samples"]["tiny_sums"]["effective"] == SAMPLES
    assert results["results"]["tiny_sums"]["exact_match,none"] >= 0.95
    assert results["results"]["tiny_sums_choose"]["acc,none"] >= 0.95


@pytest.mark.slow
def test_the_server_s_tokenizer_and_the_chat_endpoint(server, tasks, tmp_path):
    scores = run_json("lm_eval_program.py", server.url, tasks, folder=tmp_path)
    assert min(scores["remote"].values()) >= 0.9 and len(scores["remote"]) == 2
    assert scores["chat"]["tiny_chat"] >= 0.9
