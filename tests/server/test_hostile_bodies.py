"""Bodies meant to break something: refused in a sentence, quickly, and the next good request is answered as ever."""

import json
import time

import pytest

from tests.server import hostile_bodies as corpus
from tests.server.probes import resident, until_idle, work, works

SECONDS = 5
"""That a body may cost the server, all its processes together."""
PATIENCE = 30
"""Seconds until the answer, beside other tests that want the processor too."""


def check_error(response) -> None:
    """OpenAI's error object, in a few words."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["code"] == response.status_code
    assert 0 < len(error["message"]) < 1000 and "Traceback" not in error["message"]
    assert "root:" not in error["message"], "a file's content"


def send(server, path: str, body: bytes):
    start, worked = time.monotonic(), work(server)
    response = server.post(path, body)
    assert time.monotonic() - start < PATIENCE, f"{time.monotonic() - start:.1f} s"
    assert work(server) - worked < SECONDS, f"{work(server) - worked:.1f} s"
    if response.status_code != 200:
        check_error(response)
    return response


@pytest.fixture(scope="module", autouse=True)
def _stays_well(small):
    """Whatever came, the same processes run, hold nothing, have not grown much and have nothing to report."""
    for path, body in list(corpus.REFUSED.values())[-40:]:
        small.post(path, body)
    works(small)
    before, engine = resident(small), small.engine()
    yield
    works(small)
    until_idle(small)
    after = resident(small)
    assert small.engine() == engine
    assert after["server"] - before["server"] < 150 and after["engine"] - before["engine"] < 150, (before, after)
    assert "Traceback" not in small.log and "Internal error" not in small.log, small.log[-3000:]


@pytest.mark.parametrize("name", corpus.REFUSED)
def test_refused(small, name):
    response = send(small, *corpus.REFUSED[name])
    assert response.status_code == 400, (response.status_code, response.text[:300])
    works(small)


@pytest.mark.parametrize("name", corpus.TOLERATED)
def test_refused_or_answered(small, name):
    path, body = corpus.TOLERATED[name]
    response = send(small, path, body)
    assert response.status_code in (200, 400), (response.status_code, response.text[:300])
    if response.status_code == 200:
        json.loads(response.text)
    works(small)


@pytest.mark.parametrize("model", corpus.UNKNOWN_MODELS, ids=lambda model: repr(model)[:20])
def test_models_that_are_not_there(small, model):
    """The answer names the ones that are."""
    for path, body in ((corpus.CHAT, corpus.chat(model=model)), (corpus.COMPLETION, corpus.completion(model=model))):
        response = send(small, path, body)
        if model:
            assert response.status_code == 404 and "this server has: tiny" in response.json()["error"]["message"]
    works(small)


@pytest.mark.parametrize("path", [corpus.CHAT, corpus.COMPLETION])
def test_wrong_types_everywhere(small, path):
    base = {"messages": [corpus.USER]} if path == corpus.CHAT else {"prompt": "a"}
    for field in corpus.FIELDS:
        for value in corpus.WRONG_VALUES:
            body = corpus.dump({**base, "max_tokens": 2, "temperature": 1, field: value})
            response = send(small, path, body)
            assert response.status_code in (200, 400, 404), (field, value, response.text[:300])
    works(small)


def test_bodies_that_are_too_large(small):
    """50 megabytes, said beforehand or not: the refusal arrives although much of the body is still to be sent."""

    def pieces():
        for _ in range(50):
            yield b"x" * corpus.MEGABYTE

    before = resident(small)["server"]
    for content in (b"x" * (50 * corpus.MEGABYTE), pieces()):
        start = time.monotonic()
        response = small.http.post(corpus.CHAT, content=content, headers={"Content-Type": "application/json"})
        assert time.monotonic() - start < SECONDS
        assert response.status_code == 413 and "--max-body-size" in response.json()["error"]["message"]
        check_error(response)
        works(small)
    assert resident(small)["server"] - before < 64
