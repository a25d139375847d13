"""A thousand streams at once, and more than there is room for: every answer right and in order, and nothing stays behind."""

import asyncio
import json
import random
import time

import pytest

from tests.entrypoints.openai.server import RemoteServer, chat_body
from tests.server.probes import held, metric, resident, until_idle, works
from tests.server.wire import post, post_all
from vllm.config.checkpoint import TINY

COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
VOCAB = json.loads((TINY / "config.json").read_text())["text_config"]["vocab_size"]
WAVE = 1000


def sums(count):
    rng = random.Random(count)
    return [(rng.randrange(10, 100), rng.randrange(10, 100)) for _ in range(count)]


def check_sum(answer, a, b):
    """A whole stream that spells the sum: one id, one ending, after everything else."""
    assert answer.status == 200 and answer.complete, answer
    assert answer.text == str(a + b), (a, b, answer.text)
    assert len({event["id"] for event in answer.events}) == 1
    *before, last = [choice["finish_reason"] for event in answer.events for choice in event["choices"]]
    assert last == "stop" and not any(before)


def run_wave(server, count):
    pairs = sums(count)
    fields = {"temperature": 0, "stop": "\n", "max_tokens": 8, "stream": True}
    answers = asyncio.run(post_all(server.port, COMPLETION, [{"prompt": f"{a}+{b}=", **fields} for a, b in pairs]))
    for answer, (a, b) in zip(answers, pairs):
        check_sum(answer, a, b)


@pytest.mark.slow
def test_a_thousand_streams(large):
    """And another thousand take next to nothing that the first have not taken."""
    run_wave(large, 50)
    sizes = [resident(large)]
    for _ in range(2):
        run_wave(large, WAVE)
        until_idle(large)
        sizes.append(resident(large))
    assert metric(large, "request_success_total") == 2 * WAVE + 50
    before, first, second = sizes
    assert first["server"] - before["server"] <= 100 and second["server"] - first["server"] <= 8, sizes
    assert first["engine"] - before["engine"] <= 400 and second["engine"] - first["engine"] <= 64, sizes
    assert "Traceback" not in large.log and "ERROR" not in large.log


def test_conversations_at_once(large):
    pairs = sums(150)
    bodies = [chat_body(f"What is {a}+{b}?", stream=True, stream_options={"include_usage": True}) for a, b in pairs]
    for answer, (a, b) in zip(asyncio.run(post_all(large.port, CHAT, bodies)), pairs):
        *events, usage = answer.events
        assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == len(str(a + b)) + 1
        assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        answer.events = events
        check_sum(answer, a, b)
    until_idle(large)


def run_counting_wave(server, tokens):
    """Streams of token ids that count up: one lost, repeated or strayed into another stream would show."""
    bodies = [
        {"prompt": [start], "max_tokens": tokens, "stream": True, "return_token_ids": True} for start in range(WAVE)
    ]
    answers = asyncio.run(post_all(server.port, COMPLETION, bodies))
    for start, answer in enumerate(answers):
        assert answer.status == 200 and answer.complete
        got = [token for event in answer.events for choice in event["choices"] for token in choice["token_ids"]]
        assert got == [(start + count) % VOCAB for count in range(1, tokens + 1)]


def test_every_token_of_a_thousand_streams_in_order(stub):
    """The first waves find out how many streams there are at once, which is a matter of time; after them memory stays as it is."""
    for _ in range(2):
        run_counting_wave(stub, 40)
    before = resident(stub)
    for _ in range(2):
        run_counting_wave(stub, 40)
    until_idle(stub)
    after = resident(stub)
    assert all(after[name] - before[name] <= 8 for name in before), (before, after)
    assert metric(stub, "generation_tokens_total") == WAVE * 160


@pytest.fixture(scope="module")
def crowded():
    """Two may run and four may wait."""
    with RemoteServer("--max-num-seqs", 2, "--max-num-queued-requests", 4) as server:
        yield server


def test_more_than_there_is_room_for(crowded):
    """Those that find no room are told at once and when to come again; the others never notice."""

    async def ask(a, b, stream):
        started = time.monotonic()
        fields = {"temperature": 0, "max_tokens": 60, "ignore_eos": True, "stream": stream}
        answer = await post(crowded.port, COMPLETION, {"prompt": f"{a}+{b}=", **fields})
        return answer, time.monotonic() - started

    async def ask_all():
        return await asyncio.gather(*(ask(a, b, i % 2 == 0) for i, (a, b) in enumerate(sums(60))))

    refused = admitted = 0
    for (answer, seconds), (a, b) in zip(asyncio.run(ask_all()), sums(60)):
        if answer.status == 503:
            refused += 1
            error = answer.json["error"]
            assert int(answer.headers["retry-after"]) >= 1 and error["code"] == 503
            assert error["type"] == "ServiceUnavailableError" and "try again later" in error["message"]
            assert seconds < 3
        else:
            admitted += 1
            assert answer.status == 200
            text = answer.text if answer.complete else answer.json["choices"][0]["text"]
            assert text.startswith(f"{a + b}\n")
    assert admitted >= 6 and refused >= 30, (admitted, refused)
    until_idle(crowded)
    works(crowded)
    assert "Traceback" not in crowded.log


def test_more_in_one_request_than_ever_fits(crowded):
    """Trying again would not help, so this is no 503; and what fits only in part leaves nothing behind."""
    refused = crowded.post(COMPLETION, {"prompt": "a", "n": 7})
    assert refused.status_code == 400 and "--max-num-queued-requests" in refused.json()["error"]["message"]
    for stream in (False, True):
        refused = crowded.post(COMPLETION, {"prompt": ["a"] * 7, "max_tokens": 500, "stream": stream})
        assert refused.status_code == 503, "each of the seven would fit alone"
        until_idle(crowded)
    assert not any(held(crowded).values())
    works(crowded)
