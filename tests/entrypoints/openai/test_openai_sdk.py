"""OpenAI's own client: what most programs talk to the server with."""

import asyncio
import json

import openai
import pytest

from tests.entrypoints.openai.test_chat import CALL, SUM, WEATHER

OFF = {"chat_template_kwargs": {"enable_thinking": False}}
QUESTION = [{"role": "user", "content": SUM}]
GREEDY = {"model": "tiny", "temperature": 0}


def test_chat(client):
    done = client.chat.completions.create(messages=QUESTION, extra_body=OFF, **GREEDY)
    assert done.choices[0].message.content == "46" and done.usage.completion_tokens == 3
    thought = client.chat.completions.create(messages=QUESTION, **GREEDY).choices[0].message
    assert (thought.content, thought.reasoning) == ("46", "2+4=6, 1+3=4")


def test_chat_stream(client):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(messages=QUESTION, extra_body=OFF, **options, **GREEDY))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "46"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 3
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-2].choices[0].finish_reason == "stop"


def test_the_client_puts_a_stream_together_itself(client):
    with client.chat.completions.stream(
        messages=[{"role": "user", "content": CALL}], tools=[WEATHER], extra_body=OFF, **GREEDY
    ) as stream:
        (choice,) = stream.get_final_completion().choices
    (call,) = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "paris", "days": 3})
    assert choice.finish_reason == "tool_calls"


def test_a_tool_loop(client):
    messages = [{"role": "user", "content": CALL}]
    asked = (
        client.chat.completions.create(messages=messages, tools=[WEATHER], extra_body=OFF, **GREEDY).choices[0].message
    )
    messages += [asked, {"role": "tool", "tool_call_id": asked.tool_calls[0].id, "content": "rain"}]
    done = client.chat.completions.create(messages=messages, tools=[WEATHER], extra_body=OFF, **GREEDY)
    assert done.choices[0].message.content == "The result is rain."


def test_logprobs(client):
    done = client.chat.completions.create(messages=QUESTION, logprobs=True, top_logprobs=2, extra_body=OFF, **GREEDY)
    content = done.choices[0].logprobs.content
    assert "".join(entry.token for entry in content[:2]) == "46" and len(content[0].top_logprobs) == 2
    done = client.completions.create(prompt="12+34=", logprobs=2, echo=True, max_tokens=2, **GREEDY)
    assert done.choices[0].logprobs.tokens == list("12+34=46") and done.choices[0].text == "12+34=46"


def test_completions(client):
    done = client.completions.create(prompt=["12+34=", "20+22="], stop="\n", **GREEDY)
    assert [choice.text for choice in done.choices] == ["46", "42"]
    chunks = list(client.completions.create(prompt="12+34=", stop="\n", stream=True, **GREEDY))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "46"


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"


def test_errors_have_the_client_s_own_classes(client):
    with pytest.raises(openai.NotFoundError, match="tiny"):
        client.chat.completions.create(model="gpt", messages=QUESTION)
    with pytest.raises(openai.BadRequestError, match="temperature") as caught:
        client.chat.completions.create(model="tiny", messages=QUESTION, temperature=-1)
    assert caught.value.param == "temperature" and caught.value.body["code"] == 400
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        client.completions.create(model="tiny", prompt="a" * 30000, stream=True)


def test_async(server):
    async def ask(client, n):
        stream = await client.completions.create(prompt=f"{n}+{n}=", stop="\n", stream=True, **GREEDY)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def run():
        async with server.async_openai() as client:
            return await asyncio.gather(*(ask(client, n) for n in range(10, 26)))

    assert asyncio.run(run()) == [str(n + n) for n in range(10, 26)]


SCHEMA = {
    "type": "object",
    "properties": {"sum": {"type": "integer"}, "note": {"enum": ["a", "b"]}},
    "required": ["sum", "note"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("thinking", [{}, OFF])
def test_structured_output(client, thinking):
    def answer(extra=None, **fields):
        body = {**thinking, **(extra or {})}
        message = (
            client.chat.completions.create(messages=QUESTION, max_tokens=100, extra_body=body, **fields, **GREEDY)
            .choices[0]
            .message
        )
        assert (message.reasoning is None) == (thinking is OFF)
        return json.loads(message.content)

    # Left alone, so small a model may write white space for ever where JSON allows it.
    value = answer({"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}})
    assert isinstance(value["sum"], int) and value["note"] in ("a", "b") and len(value) == 2
    words = {"type": "json_schema", "json_schema": {"name": "word", "schema": {"enum": ["seven", "eight"]}}}
    assert answer(response_format=words) in ("seven", "eight")


def test_extra_constraints(client):
    def answer(**constraint):
        body = {"structured_outputs": constraint}
        return client.completions.create(prompt="12+34=", max_tokens=8, extra_body=body, **GREEDY).choices[0].text

    assert answer(choice=["seven", "46 or so"]) == "46 or so"
    assert answer(regex="[a-c]{3}") in [a + b + c for a in "abc" for b in "abc" for c in "abc"]
    with pytest.raises(openai.BadRequestError, match="regular expression"):
        answer(regex="(")
