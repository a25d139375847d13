"""Routes that programs around a server use, and its own schema."""

import json
import subprocess
import threading

from vllm import __version__


def test_service_routes(server):
    http = server.http
    assert (http.get("/health").status_code, http.get("/health").content) == (200, b"")
    assert http.get("/ping").status_code == http.post("/ping").status_code == 200
    assert http.get("/version").json() == {"version": __version__}
    assert http.get("/load").json() == {"server_load": 0}


def test_models(server):
    (card,) = server.http.get("/v1/models").json()["data"]
    assert (card["id"], card["object"], card["max_model_len"]) == ("tiny", "model", 4096)
    assert server.http.get("/v1/models/tiny").json() == card


def test_load_counts_what_runs(server):
    body = {"prompt": "a", "ignore_eos": True, "max_tokens": 400, "stream": True}
    with server.http.stream("POST", "/v1/completions", json=body) as response:
        pieces = response.iter_bytes()
        next(pieces)
        assert server.http.get("/load").json() == {"server_load": 1}


def test_metrics(server):
    server.complete("12+34=", max_tokens=2)
    text = server.http.get("/metrics")
    assert text.headers["content-type"].startswith("text/plain")
    assert 'vllm:generation_tokens_total{engine="0",model_name="tiny"}' in text.text


def test_the_schema_names_every_route_and_model(server):
    schema = server.http.get("/openapi.json").json()
    routes = {(path, method) for path, operations in schema["paths"].items() for method in operations}
    assert routes >= {
        *(
            ("/v1/chat/completions", "post"),
            ("/v1/completions", "post"),
            ("/tokenize", "post"),
            ("/detokenize", "post"),
        ),
        *(("/v1/models", "get"), ("/health", "get"), ("/version", "get"), ("/metrics", "get"), ("/load", "get")),
        *(("/ping", "get"), ("/ping", "post"), ("/tokenizer_info", "get")),
    }
    models = schema["components"]["schemas"]
    assert (
        "top_k" in models["CompletionRequest"]["properties"]
        and "tools" in models["ChatCompletionRequest"]["properties"]
    )

    def references(value):
        if isinstance(value, dict):
            for key, child in value.items():
                yield from [child] if key == "$ref" and isinstance(child, str) else references(child)
        elif isinstance(value, list):
            for child in value:
                yield from references(child)

    assert all(reference.removeprefix("#/components/schemas/") in models for reference in references(schema))


def test_curl(server):
    """The line that the server prints when it starts."""
    line = next(line for line in server.log.splitlines() if line.startswith("  curl "))
    done = subprocess.run(["sh", "-c", line + " --silent"], capture_output=True, text=True, timeout=60)
    message = json.loads(done.stdout)["choices"][0]["message"]
    assert message["role"] == "assistant" and (message["content"] or message["reasoning"])


def test_streams_at_once(server):
    """More of them than run at a time; each gets its own answer."""
    answers = {}

    def ask(n):
        answers[n] = server.complete(f"{n}+{n}=", stop="\n", max_tokens=4)["choices"][0]["text"]

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(10, 42)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {n: str(n + n) for n in range(10, 42)}
