"""OpenAI's SDK and structured output: what comes out fits, thinking or not, whole or streamed."""

import json
import re
from typing import Literal

import openai
import pytest
from pydantic import BaseModel

from vllm.benchmarks.tiny_tasks import generate

OFF = {"chat_template_kwargs": {"enable_thinking": False}}
GREEDY = {"model": "tiny", "temperature": 0}
QUESTION = [{"role": "user", "content": "What is 12+34?"}]


class Fruit(BaseModel):
    """What a shop sells."""

    name: Literal["apple", "lemon"]
    price: int
    ripe: bool


def as_format(schema, name="answer") -> dict:
    return {"type": "json_schema", "json_schema": {"name": name, "schema": schema, "strict": True}}


@pytest.mark.parametrize("extra", [OFF, {}], ids=["plain", "thinking"])
def test_the_sdk_parses_into_a_class(client, extra):
    done = client.chat.completions.parse(
        messages=QUESTION, response_format=Fruit, max_tokens=600, extra_body=extra, **GREEDY
    )
    message = done.choices[0].message
    assert isinstance(message.parsed, Fruit) and done.choices[0].finish_reason == "stop"
    assert (message.reasoning is None) == (extra is OFF)


def test_a_sum_as_a_number(client):
    """The constraint changes the form of an answer, not what the model knows."""
    right = 0
    for item in generate("add2", 6):
        done = client.chat.completions.create(
            messages=item.messages, response_format=as_format({"type": "integer"}), extra_body=OFF, **GREEDY
        )
        right += json.loads(done.choices[0].message.content) == int(item.expected)
    assert right >= 5, f"{right} of 6"


@pytest.mark.parametrize("stream", [False, True])
def test_one_of_several_words(client, stream):
    schema = {"enum": ["forty-six", "eleven"]}
    asked = {"messages": QUESTION, "response_format": as_format(schema), "extra_body": OFF, **GREEDY}
    done = client.chat.completions.create(stream=stream, **asked)
    pieces = [chunk.choices[0].delta.content or "" for chunk in done] if stream else [done.choices[0].message.content]
    assert json.loads("".join(pieces)) in schema["enum"]


def test_any_object(client):
    done = client.chat.completions.create(
        messages=QUESTION, response_format={"type": "json_object"}, max_tokens=100, extra_body=OFF, **GREEDY
    )
    if done.choices[0].finish_reason == "stop":  # else it has found something to say for ever
        assert isinstance(json.loads(done.choices[0].message.content), dict)
    assert done.choices[0].message.content.lstrip().startswith("{")


def test_the_server_s_own_constraints(client):
    def answer(prompt="12+34=", **constraint):
        extra = {"structured_outputs": constraint}
        return client.completions.create(prompt=prompt, max_tokens=40, extra_body=extra, **GREEDY).choices[0].text

    assert answer(choice=["47", "46"]) == "46" and answer(choice=["seven", "six"]) in ("seven", "six")
    assert re.fullmatch(r"\d{2} apples", answer(regex=r"\d{2} apples")) and answer(regex=r"\d{2} apples")[:2] == "46"
    assert answer(grammar='root ::= "sum " [0-9]{2}').startswith("sum ")
    value = json.loads(answer(json={"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]},
                              disable_any_whitespace=True))  # fmt: skip
    assert isinstance(value["n"], int)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"response_format": as_format({"type": "no such type"})}, "schema"),
        ({"extra_body": {"structured_outputs": {"regex": "(("}}}, "regular expression"),
        ({"extra_body": {"structured_outputs": {"regex": "a", "choice": ["a"]}}}, "structured_outputs|one"),
        ({"response_format": {"type": "xml"}}, "response_format"),
    ],
)
def test_constraints_that_cannot_be(client, fields, words):
    with pytest.raises(openai.BadRequestError, match=words):
        client.chat.completions.create(messages=QUESTION, **GREEDY, **fields)
