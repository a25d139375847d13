"""OpenAI's SDK: answers, streams, reasoning, log-probabilities, errors, several requests at once."""

import asyncio
import math
import time

import openai
import pytest

from tests.entrypoints.openai.server import RemoteServer
from vllm.benchmarks.tiny_tasks import generate

OFF = {"chat_template_kwargs": {"enable_thinking": False}}
GREEDY = {"model": "tiny", "temperature": 0}
QUESTION = [{"role": "user", "content": "What is 12+34?"}]
KINDS = ("add2", "copy", "reverse", "count", "other")


def text_of(chunks) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_right_whole_and_streamed(client, kind):
    right = 0
    for item in generate(kind, 6):
        asked = {"messages": item.messages, "extra_body": OFF, **GREEDY}
        done = client.chat.completions.create(**asked)
        streamed = text_of(client.chat.completions.create(stream=True, **asked))
        assert streamed == done.choices[0].message.content
        right += item.score(streamed)
    assert right >= 5, f"{right} of 6 {kind}"


def test_the_parts_of_a_stream(client):
    options = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    *chunks, last = client.chat.completions.create(messages=QUESTION, extra_body=OFF, **options, **GREEDY)
    assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in [*chunks, last]}) == 1
    assert [chunk.choices[0].delta.role for chunk in chunks].count("assistant") == 1
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert last.choices == [] and last.usage.total_tokens == last.usage.prompt_tokens + 3
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == last.usage.completion_tokens == 3


def test_reasoning_is_a_field_of_its_own(client):
    whole = client.chat.completions.create(messages=QUESTION, **GREEDY).choices[0].message
    deltas = [
        chunk.choices[0].delta for chunk in client.chat.completions.create(messages=QUESTION, stream=True, **GREEDY)
    ]
    reasoning = [getattr(delta, "reasoning", None) or "" for delta in deltas]
    content = [delta.content or "" for delta in deltas]
    assert ("".join(reasoning), "".join(content)) == (whole.reasoning, whole.content) == ("2+4=6, 1+3=4", "46")
    ends = max(i for i, piece in enumerate(reasoning) if piece)
    assert ends < min(i for i, piece in enumerate(content) if piece), "an answer in the middle of the thinking"


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
def test_reasoning_may_be_sent_back(client, field):
    earlier = {"role": "assistant", "content": "46", field: "2+4=6, 1+3=4"}
    again = [*QUESTION, earlier, {"role": "user", "content": "What is 20+22?"}]
    done = client.chat.completions.create(messages=again, extra_body=OFF, **GREEDY)
    assert done.choices[0].message.content == "42"


def test_several_choices_and_seeds(client):
    def ask(seed):
        done = client.completions.create(
            model="tiny", prompt="The ", n=3, temperature=1.5, seed=seed, max_tokens=12, extra_body={"ignore_eos": True}
        )
        assert [choice.index for choice in done.choices] == [0, 1, 2] and done.usage.completion_tokens == 36
        return [choice.text for choice in done.choices]

    first, second, other = ask(1), ask(1), ask(2)
    assert first == second != other and len(set(first)) > 1


def test_where_answers_end(client):
    def ask(**fields):
        choice = client.completions.create(prompt="12+34=", **fields, **GREEDY).choices[0]
        return choice.text, choice.finish_reason

    assert ask(stop="\n") == ("46", "stop")
    assert ask(max_tokens=2) == ("46", "length")
    assert ask(stop=["6"], extra_body={"include_stop_str_in_output": True}) == ("46", "stop")


def test_chat_logprobs(client):
    asked = {"messages": QUESTION, "logprobs": True, "top_logprobs": 3, "extra_body": OFF, **GREEDY}
    whole = client.chat.completions.create(**asked).choices[0].logprobs.content
    assert "".join(bytes(entry.bytes).decode() for entry in whole) == "46<|im_end|>"
    for entry in whole:
        ranked = [other.logprob for other in entry.top_logprobs]
        assert len(ranked) == 3 and ranked == sorted(ranked, reverse=True) and entry.logprob == ranked[0]
        assert entry.token == entry.top_logprobs[0].token and sum(map(math.exp, ranked)) <= 1 + 1e-4
    assert math.exp(whole[0].logprob) > 0.9, "it knows this sum"
    chunks = client.chat.completions.create(stream=True, **asked)
    scored = [chunk.choices[0].logprobs for chunk in chunks]
    streamed = [entry for logprobs in scored if logprobs for entry in logprobs.content]
    assert [(entry.token, round(entry.logprob, 3)) for entry in streamed] == [
        (entry.token, round(entry.logprob, 3)) for entry in whole
    ]


def test_completion_logprobs_score_a_text(client):
    def score(text):
        done = client.completions.create(prompt=text, echo=True, logprobs=2, max_tokens=0, **GREEDY)
        (choice,) = done.choices
        assert choice.text == text == "".join(choice.logprobs.tokens) and done.usage.completion_tokens == 0
        assert [text[at:][:1] for at in choice.logprobs.text_offset] == [token[:1] for token in choice.logprobs.tokens]
        assert choice.logprobs.token_logprobs[0] is None and choice.logprobs.top_logprobs[0] is None
        return sum(choice.logprobs.token_logprobs[len("12+34=") :])

    assert score("12+34=46\n") > -0.1 and score("12+34=47\n") < -3


def test_completions_take_texts_and_token_ids(client, server):
    tokens = [server.post("/tokenize", {"prompt": text}).json()["tokens"] for text in ("12+34=", "20+22=")]
    for prompt in (["12+34=", "20+22="], tokens):
        done = client.completions.create(prompt=prompt, stop="\n", **GREEDY)
        assert [(choice.index, choice.text) for choice in done.choices] == [(0, "46"), (1, "42")]
    assert client.completions.create(prompt=tokens[0], stop="\n", **GREEDY).choices[0].text == "46"
    texts = ["", ""]
    for chunk in client.completions.create(prompt=tokens, stop="\n", stream=True, **GREEDY):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == ["46", "42"]


def test_many_at_once(server):
    items = generate("add2", 24)

    async def ask(client, item):
        stream = await client.chat.completions.create(messages=item.messages, stream=True, extra_body=OFF, **GREEDY)
        return item.score(text_of([chunk async for chunk in stream]))

    async def run():
        async with server.async_openai() as client:
            return await asyncio.gather(*(ask(client, item) for item in items))

    assert sum(asyncio.run(run())) >= 23


def test_a_stream_that_is_not_read_to_its_end(client, server):
    """Closed, or given up by a timeout: either way the request ends in the engine too."""
    asked = {"prompt": "a", "max_tokens": 3000, "extra_body": {"ignore_eos": True}, **GREEDY}
    with client.completions.create(stream=True, **asked) as stream:
        next(iter(stream))
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3).completions.create(**asked)
    end = time.monotonic() + 3
    while server.http.get("/load").json()["server_load"]:
        assert time.monotonic() < end, "requests that nobody reads go on"
        time.sleep(0.05)


def test_errors_say_what_to_change(client):
    with pytest.raises(openai.NotFoundError, match=r"'gpt-9' does not exist.*tiny") as caught:
        client.completions.create(model="gpt-9", prompt="a")
    assert caught.value.status_code == 404 and caught.value.param == "model"
    for fields, param, words in (
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "user", "content": "a" * 20000}]}, "prompt", "maximum context length"),
        ({"max_completion_tokens": 10**6}, "max_tokens", "maximum context length"),
        ({"extra_body": {"guided_json": "{}"}}, None, "structured_outputs"),
        ({"tool_choice": "required"}, None, "needs tools"),
    ):
        with pytest.raises(openai.BadRequestError, match=words) as caught:
            client.chat.completions.create(**{"messages": QUESTION, **GREEDY, **fields})
        assert caught.value.param == param, fields
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="tiny", input="a")


def test_names_and_ids(client):
    (model,) = client.models.list()
    assert (model.id, client.models.retrieve("tiny").id, model.owned_by) == ("tiny", "tiny", "vllm")
    raw = client.chat.completions.with_raw_response.create(
        messages=QUESTION, extra_body=OFF, extra_headers={"X-Request-Id": "mine-1"}, **GREEDY
    )
    assert raw.headers["x-request-id"] == raw.parse().id == "chatcmpl-mine-1"


def test_keys_and_a_full_queue():
    """One place and no queue: whoever comes second is told when to come again, which the SDK then does by itself."""
    limits = ("--max-num-seqs", "1", "--max-num-queued-requests", "0", "--api-key", "first", "--api-key", "second")
    with RemoteServer(*limits, "--root-path", "/llm") as server:
        address = f"{server.url}/llm/v1"
        with pytest.raises(openai.AuthenticationError, match="API key"):
            openai.OpenAI(base_url=address, api_key="third", max_retries=0).models.list()
        client = openai.OpenAI(base_url=address, api_key="second", max_retries=0)
        assert [model.id for model in client.models.list()] == ["tiny"]
        asked = {"messages": QUESTION, "extra_body": OFF, **GREEDY}
        stream = client.completions.create(
            prompt="a", max_tokens=4000, stream=True, extra_body={"ignore_eos": True}, **GREEDY
        )
        next(iter(stream))
        with pytest.raises(openai.InternalServerError, match="try again later") as caught:
            client.chat.completions.create(**asked)
        assert caught.value.status_code == 503 and int(caught.value.response.headers["retry-after"]) >= 1
        stream.close()
        patient = client.with_options(max_retries=5)
        assert patient.chat.completions.create(**asked).choices[0].message.content == "46"
