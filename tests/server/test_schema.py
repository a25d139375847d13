"""The server against its own /openapi.json: schemathesis makes requests that fit it and requests that do not, for every route."""

import os
import re
import subprocess
import sys

import pytest

from tests.server.probes import resident, until_idle, works

EXAMPLES = 20
"""Of random requests a route, beside those that go systematically through every field."""

COMMAND = [
    *("run", "--phases", "coverage,fuzzing", "--max-examples", str(EXAMPLES), "--seed", "1"),
    # Hypothesis reads sources with ast.parse, which fails now and then with two threads at it before Python 3.11.8 (cpython issue 106905).
    *("--workers", "1"),
    *("--request-timeout", "5", "--max-failures", "5", "--no-color", "--suppress-health-check", "all"),
    # What fits the schema may still be refused: prompts too long, ids beyond the vocabulary, fields that exclude each other.
    *("--exclude-checks", "positive_data_acceptance"),
]


@pytest.mark.slow
def test_the_server_does_what_its_schema_says(small, tmp_path):
    """No 5xx, no status, method or content type that is not in the schema, and no answer that takes long."""
    works(small)
    before, engine = resident(small), small.engine()
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from schemathesis.cli import schemathesis; schemathesis()",
            *COMMAND,
            f"{small.url}/openapi.json",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=250,
        env={**os.environ, "COLUMNS": "120"},
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) generated, \d+ passed", done.stdout)[1]) > 500, done.stdout
    works(small)
    until_idle(small, 5)
    after = resident(small)
    assert small.engine() == engine
    assert after["server"] - before["server"] < 100 and after["engine"] - before["engine"] < 100, (before, after)
    assert "Traceback" not in small.log and "Internal error" not in small.log


def test_the_schema_covers_every_route(small):
    schema = small.http.get("/openapi.json").json()
    routes = {(method, path) for path, operations in schema["paths"].items() for method in operations}
    assert routes >= {
        *(("post", path) for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize")),
        *(
            ("get", path)
            for path in ("/v1/models", "/health", "/ping", "/version", "/metrics", "/load", "/tokenizer_info")
        ),
    }
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            assert {"400", "401", "404", "413", "503"} <= operation["responses"].keys(), (method, path)
    content = schema["paths"]["/v1/completions"]["post"]["responses"]["200"]["content"]
    assert set(content) == {"application/json", "text/event-stream"}


def test_a_wrong_method_is_told_the_right_ones(small):
    for method, path, right in (
        ("GET", "/v1/completions", "POST"),
        ("DELETE", "/ping", "GET, POST"),
        ("POST", "/v1/models/tiny", "GET"),
    ):
        refused = small.http.request(method, path)
        assert refused.status_code == 405 and refused.headers["allow"] == right
        assert refused.json()["error"]["code"] == 405
