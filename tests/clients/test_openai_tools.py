"""OpenAI's SDK and tools: calls are right, whole and streamed, and a tool's answer finds its way into the model's."""

import json

import pytest

from tests.clients.tools import BOTH, BOTH_CALLS, LOOPS, RUN, TOOLS, called, history, schema
from vllm.benchmarks.tiny_tasks import generate

OFF = {"chat_template_kwargs": {"enable_thinking": False}}
GREEDY = {"model": "tiny", "temperature": 0}


def ask(client, messages, tools=TOOLS, thinking=False, **fields):
    extra = {} if thinking else OFF
    return client.chat.completions.create(messages=messages, tools=tools, extra_body=extra, **fields, **GREEDY)


def user(text) -> list[dict]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize(("question", "name", "arguments", "answer"), LOOPS)
def test_a_tool_loop(client, question, name, arguments, answer, thinking):
    messages = user(question)
    for _ in range(3):
        choice = ask(client, messages, thinking=thinking).choices[0]
        messages.append(choice.message)
        if choice.finish_reason != "tool_calls":
            break
        for call in choice.message.tool_calls:
            assert (call.function.name, json.loads(call.function.arguments)) == (name, arguments)
            result = RUN[call.function.name](**json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    assert len(messages) == 4, "asked, called, ran, answered"
    assert (choice.message.content, choice.finish_reason, choice.message.tool_calls) == (answer, "stop", None)


def test_a_tool_loop_in_streams(client):
    """The SDK puts the pieces together; what it has goes back as it is."""
    question, name, arguments, answer = LOOPS[0]
    messages = user(question)

    def turn():
        with client.chat.completions.stream(messages=messages, tools=TOOLS, extra_body=OFF, **GREEDY) as stream:
            events = list(stream)
            return [event.type for event in events], stream.get_final_completion().choices[0].message

    types, message = turn()
    assert "tool_calls.function.arguments.done" in types and not message.content
    assert called(message.tool_calls) == [{"name": name, "arguments": arguments}]
    result = RUN[name](**arguments)
    messages += [message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": result}]
    types, message = turn()
    assert "content.done" in types and message.content == answer


def test_parallel_calls(client):
    whole = ask(client, user(BOTH)).choices[0].message
    assert [(call["name"], call["arguments"]) for call in called(whole.tool_calls)] == BOTH_CALLS
    assert len({call.id for call in whole.tool_calls}) == 2 and not whole.content
    names, arguments = {}, {}
    for chunk in ask(client, user(BOTH), stream=True):
        for piece in chunk.choices[0].delta.tool_calls or ():
            if piece.function.name:
                assert piece.index not in names, "a name comes once"
                names[piece.index] = (piece.function.name, piece.id)
            arguments[piece.index] = arguments.get(piece.index, "") + (piece.function.arguments or "")
    assert [(names[i][0], json.loads(arguments[i])) for i in sorted(names)] == BOTH_CALLS
    # Both results go back, in the order of the calls.
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": RUN[name](**given)}
        for call, (name, given) in zip(whole.tool_calls, BOTH_CALLS, strict=True)
    ]
    final = ask(client, [*user(BOTH), whole, *results]).choices[0]
    assert final.finish_reason in ("stop", "tool_calls")
    one = ask(client, user(BOTH), parallel_tool_calls=False).choices[0].message
    assert [(call["name"], call["arguments"]) for call in called(one.tool_calls)] == BOTH_CALLS[:1]


@pytest.mark.parametrize("kind", ["tool", "parallel", "tool_loop"])
def test_unknown_tools(client, kind):
    """Tools and words that the model has not met in training."""
    items = generate(kind, 8)
    right = 0
    for item in items:
        message = ask(client, history(item), item.tools).choices[0].message
        right += item.score_calls(called(message.tool_calls)) if item.calls else item.score(message.content or "")
    assert right >= 7, f"{right} of 8"


@pytest.mark.parametrize("question", [LOOPS[0][0], "What is 12+34?", "Hello"])
def test_required_and_named_calls(client, question):
    """Whatever was asked, what comes out is a call that fits the tool."""
    tool = schema("get_price", item="string")
    tool["function"]["parameters"]["properties"]["item"] = {"enum": ["apple", "lemon"]}
    for choice in ("required", {"type": "function", "function": {"name": "get_price"}}):
        done = ask(client, user(question), [tool], tool_choice=choice, max_tokens=200).choices[0]
        (call,) = called(done.message.tool_calls)[:1]
        assert call["name"] == "get_price" and call["arguments"]["item"] in ("apple", "lemon")


def test_no_call_where_none_is_wanted(client):
    for fields in ({}, {"tool_choice": "none"}, {"tool_choice": "auto"}):
        choice = ask(client, user("What is 12+34?"), **fields).choices[0]
        assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == ("46", None, "stop")
