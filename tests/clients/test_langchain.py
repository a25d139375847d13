"""LangChain's chat model for OpenAI servers."""

import asyncio
from typing import Literal

import openai
import pytest
from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

from tests.clients.tools import BOTH, BOTH_CALLS, LOOPS, RUN
from vllm.benchmarks.tiny_tasks import generate

TOOLS = [tool(function) for function in RUN.values()]


class Word(BaseModel):
    """One of two words."""

    word: Literal["seven", "eight"]


@pytest.fixture
def model(server):
    return make_model(server)


def make_model(server, **options) -> ChatOpenAI:
    fields = {"model": "tiny", "temperature": 0, "max_retries": 0, **options}
    thinking = {"chat_template_kwargs": {"enable_thinking": False}}
    return ChatOpenAI(base_url=f"{server.url}/v1", api_key="none", extra_body=thinking, **fields)


def test_invoke(model):
    answer = model.invoke([SystemMessage("Answer briefly."), HumanMessage("What is 12+34?")])
    assert answer.content == "46" and answer.response_metadata["finish_reason"] == "stop"
    assert answer.usage_metadata["output_tokens"] == 3


def test_a_batch(model):
    items = generate("add2", 8)
    answers = model.batch([item.messages[0]["content"] for item in items])
    assert sum(item.score(answer.content) for item, answer in zip(items, answers)) >= 7


def test_stream(server):
    model = make_model(server, stream_usage=True)
    pieces = list(model.stream("What is 12+34?"))
    whole = sum(pieces[1:], pieces[0])
    assert whole.content == "46" and len([piece for piece in pieces if piece.content]) == 2
    assert whole.usage_metadata["output_tokens"] == 3

    async def read():
        return "".join([piece.content async for piece in make_model(server).astream("What is 20+22?")])

    assert asyncio.run(read()) == "42"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("question", "name", "arguments", "answer"), LOOPS)
def test_a_tool_loop(model, question, name, arguments, answer, stream):
    model = model.bind_tools(TOOLS)

    def turn():
        if not stream:
            return model.invoke(messages)
        pieces = list(model.stream(messages))
        return sum(pieces[1:], pieces[0])

    messages = [HumanMessage(question)]
    asked = turn()
    (call,) = asked.tool_calls
    assert (call["name"], call["args"]) == (name, arguments) and not asked.invalid_tool_calls
    (chosen,) = [one for one in TOOLS if one.name == name]
    result = chosen.invoke(call)
    assert isinstance(result, ToolMessage) and result.content == RUN[name](**arguments)
    messages += [asked, result]
    assert turn().content == answer


def test_parallel_calls(model):
    calls = model.bind_tools(TOOLS).invoke(BOTH).tool_calls
    assert [(call["name"], call["args"]) for call in calls] == BOTH_CALLS


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(model, method):
    assert model.with_structured_output(Word, method=method).invoke("What is 12+34?").word in ("seven", "eight")


def test_log_probabilities(model):
    entries = (
        model.bind(logprobs=True, top_logprobs=2).invoke("What is 12+34?").response_metadata["logprobs"]["content"]
    )
    assert [entry["token"] for entry in entries[:2]] == ["4", "6"] and len(entries[0]["top_logprobs"]) == 2


def test_errors(server):
    with pytest.raises(openai.NotFoundError, match="tiny"):
        make_model(server, model="gpt-9").invoke("Hello")
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        make_model(server).invoke("a" * 20000)
