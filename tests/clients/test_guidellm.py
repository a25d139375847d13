"""guidellm: a short load, in which every answer counts."""

import json

import pytest

from tests.clients.programs import run, write_lines
from tests.entrypoints.openai.server import TINY
from vllm.benchmarks.tiny_tasks import generate

REQUESTS = 24
LENGTH = 10  # tokens that each completion is made to have


def load(server, folder, questions, path, **options) -> dict:
    """What guidellm has measured, four requests at once."""
    data = write_lines(folder / "questions.jsonl", questions)
    backend = {"kind": "openai_http", "target": server.url, "model": "tiny", "request_format": path, **options}
    run(
        *("guidellm", "run", "--backend", _pairs(backend), "--profile", "kind=concurrent,streams=4"),
        *("--constraint", f"kind=max_requests,count={REQUESTS}", "--tokenizer", f"kind=hf_auto,model={TINY}"),
        *("--data", f"kind=json_file,path={data}", "--output", "kind=json,path=report.json", "--disable-console"),
        folder=folder,
    )
    (benchmark,) = json.loads((folder / "report.json").read_text())["benchmarks"]
    return benchmark


def _pairs(options) -> str:
    return ",".join(f"{name}={value}" for name, value in options.items())


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_short_load(server, tmp_path, path):
    """It asks for health and models first, streams, reads usage, and fixes lengths with ignore_eos."""
    if path == "/v1/completions":
        right = {item.prompt: item.expected for item in generate("completion", REQUESTS)}
        questions = [{"prompt": prompt, "output_tokens_count": LENGTH} for prompt in right]
    else:
        right = {item.messages[0]["content"]: item.expected for item in generate("add2", REQUESTS)}
        questions = [{"prompt": prompt} for prompt in right]
    benchmark = load(server, tmp_path, questions, path)
    requests = benchmark["requests"]
    assert (len(requests["successful"]), requests["errored"], requests["incomplete"]) == (REQUESTS, [], [])
    correct = 0
    for request in requests["successful"]:
        body = json.loads(request["request_args"])["body"]
        if path == "/v1/completions":
            correct += request["output"].startswith(right[body["prompt"]])
            assert body["ignore_eos"] and request["output_metrics"]["text_tokens"] == LENGTH
        else:
            (part,) = body["messages"][0]["content"]
            correct += request["output"].strip() == right[part["text"]]
            assert request["reasoning_output"]
        timings = request["info"]["timings"]
        assert timings["first_token_iteration"] <= timings["last_token_iteration"]
    assert correct >= 0.9 * REQUESTS
