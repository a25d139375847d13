"""curl, as in the documentation and in people's scripts."""

import json
import re
import shlex
import subprocess

from tests.entrypoints.openai.server import chat_body, parse_events

JSON = ("-H", "Content-Type: application/json")


def curl(server, path, *args, stdin=None) -> tuple[int, str]:
    """Status and body."""
    command = ["curl", "-sS", "--noproxy", "*", "-m", "60", "-w", "\n%{http_code}", *args, server.url + path]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    body, _, status = done.stdout.rpartition("\n")
    return int(status), body


def test_the_line_that_the_server_prints(server):
    (line,) = re.findall(r"^ +(curl .*)$", server.log, re.M)
    done = subprocess.run([*shlex.split(line), "-sS", "--noproxy", "*"], capture_output=True, text=True, timeout=60)
    message = json.loads(done.stdout)["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "46", "reasoning": "2+4=6, 1+3=4"}


def test_an_answer(server):
    body = json.dumps(chat_body("What is 12+34?"))
    for args, stdin in ((("-d", body), None), (("--data-binary", "@-"), body)):
        status, text = curl(server, "/v1/chat/completions", *JSON, *args, stdin=stdin)
        assert status == 200 and json.loads(text)["choices"][0]["message"]["content"] == "46"
    # Without the header, curl says that it posts a form.
    status, text = curl(server, "/v1/completions", "-d", '{"prompt": "12+34=", "stop": "\\n", "temperature": 0}')
    assert status == 200 and json.loads(text)["choices"][0]["text"] == "46"


def test_a_stream(server):
    body = json.dumps(chat_body("What is 12+34?", stream=True, stream_options={"include_usage": True}))
    status, text = curl(server, "/v1/chat/completions", "-N", *JSON, "-d", body)
    *chunks, usage = parse_events(text)
    assert status == 200 and usage["usage"]["completion_tokens"] == 3
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "46"


def test_a_large_body_is_announced_first(server):
    """curl sends Expect: 100-continue before a body of more than a megabyte."""
    body = json.dumps({"prompt": "a" * 2_000_000})
    status, text = curl(server, "/v1/completions", *JSON, "-d", "@-", stdin=body)
    assert status == 400 and "maximum context length" in json.loads(text)["error"]["message"]
    status, text = curl(server, "/v1/completions", *JSON, "-d", "@-", stdin=" " * 17_000_000)
    assert status == 413 and "--max-body-size" in json.loads(text)["error"]["message"]


def test_the_other_routes(server):
    assert curl(server, "/health") == curl(server, "/ping") == (200, "")
    assert curl(server, "/health", "-X", "POST")[0] == 405
    models = json.loads(curl(server, "/v1/models")[1])["data"]
    assert [model["id"] for model in models] == ["tiny"] and models[0]["max_model_len"] > 0
    assert json.loads(curl(server, "/load")[1]) == {"server_load": 0}
    assert set(json.loads(curl(server, "/version")[1])) == {"version"}
    status, text = curl(server, "/metrics")
    assert status == 200 and re.search(r'^vllm:request_success_total\{.*model_name="tiny"', text, re.M)
    tokens = json.loads(curl(server, "/tokenize", "-d", '{"prompt": "12+34="}')[1])["tokens"]
    assert json.loads(curl(server, "/detokenize", "-d", json.dumps({"tokens": tokens}))[1]) == {"prompt": "12+34="}
    status, text = curl(server, "/v2/nowhere")
    assert status == 404 and json.loads(text)["error"]["message"] == "no route GET /v2/nowhere"


def test_errors_are_json(server):
    for body in ("{", "[]", '{"prompt": 3}', '{"prompt": "a", "temperature": "hot"}'):
        status, text = curl(server, "/v1/completions", *JSON, "-d", body)
        assert status == 400 and json.loads(text)["error"]["type"] == "BadRequestError", text
