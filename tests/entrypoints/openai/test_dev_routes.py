"""Routes that are there only with VLLM_SERVER_DEV_MODE=1."""

import gzip
import json

import pytest

from tests.entrypoints.openai.fake_engine import app_of, ask
from tests.entrypoints.openai.server import RemoteServer

ROUTES = ("/reset_prefix_cache", "/start_profile", "/stop_profile")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("profiles")


@pytest.fixture(scope="module")
def dev(folder):
    env = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_TORCH_PROFILER_DIR": str(folder / "traces")}
    with RemoteServer(env=env) as server:
        yield server


def test_a_profile(dev, folder):
    error = dev.post("/stop_profile", b"")
    assert error.status_code == 400 and "start one first" in error.json()["error"]["message"]
    assert dev.post("/start_profile", b"").json() == {"success": True}
    error = dev.post("/start_profile", b"")
    assert error.status_code == 400 and "already" in error.json()["error"]["message"]
    dev.complete("12+34=", max_tokens=4)
    done = dev.post("/stop_profile", b"").json()
    (file,) = (folder / "traces").iterdir()
    assert done == {"success": True, "trace": str(file)}
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    assert sum(event.get("name") in ("aten::mm", "aten::addmm", "aten::linear") for event in events) >= 4
    assert dev.post("/start_profile", b"").status_code == 200, "once more"
    assert dev.post("/stop_profile", b"").status_code == 200
    assert dev.complete("12+34=", max_tokens=2)["choices"][0]["text"] == "46"


def test_nothing_is_cached(dev):
    """So there is nothing to forget, and a request under way does not notice."""
    assert dev.post("/reset_prefix_cache", b"").json() == {"success": True}
    body = {"prompt": "12+34=", "temperature": 0, "max_tokens": 200, "ignore_eos": True, "stream": True}
    with dev.http.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        assert dev.post("/reset_prefix_cache", b"").status_code == 200
        assert list(lines)[-2:] == ["data: [DONE]", ""]


def test_it_says_so(dev):
    assert "VLLM_SERVER_DEV_MODE is on" in dev.log and "open to everybody" in dev.log
    assert {*ROUTES} <= dev.http.get("/openapi.json").json()["paths"].keys()


def test_not_without_the_variable(server, monkeypatch):
    for path in ROUTES:
        assert server.post(path, b"").status_code == 404
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "0")
    assert ask(app_of(), "POST", "/start_profile").status_code == 404
