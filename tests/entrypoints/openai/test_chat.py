"""/v1/chat/completions on the bundled checkpoint, whole and streamed, through plain HTTP."""

import json

import pytest

from tests.entrypoints.openai.server import chat_body
from vllm.benchmarks.tiny_tasks import generate

PATH = "/v1/chat/completions"
SUM = "What is 12+34?"
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
CALL = 'Call "get_weather" with city "paris" and days 3.'


def joined(events):
    """What a stream's deltas add up to, by choice."""
    choices = {}
    for chunk in events:
        for part in chunk["choices"]:
            choice = choices.setdefault(
                part["index"], {"content": "", "reasoning": "", "tool_calls": [], "logprobs": [], "token_ids": []}
            )
            delta = part["delta"]
            for name in ("content", "reasoning"):
                choice[name] += delta.get(name) or ""
            choice["role"] = delta.get("role") or choice.get("role")
            for piece in delta.get("tool_calls", ()):
                if piece["index"] == len(choice["tool_calls"]):
                    choice["tool_calls"].append({**piece["function"], "id": piece["id"], "type": piece["type"]})
                else:
                    assert set(piece) == {"index", "function"} and set(piece["function"]) == {"arguments"}
                    choice["tool_calls"][piece["index"]]["arguments"] += piece["function"]["arguments"]
            choice["logprobs"] += (part["logprobs"] or {"content": []})["content"]
            choice["token_ids"] += part.get("token_ids") or []
            assert choice.get("finish_reason") is None, "something comes after the end"
            choice["finish_reason"] = part["finish_reason"]
    return choices


def test_an_answer(server):
    body = server.chat(SUM)
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "46", "reasoning": None}
    assert (choice["finish_reason"], choice["index"], choice["stop_reason"]) == ("stop", 0, None)
    assert body["object"] == "chat.completion" and body["model"] == "tiny" and body["id"].startswith("chatcmpl-")
    usage = body["usage"]
    assert usage["completion_tokens"] == 3 and usage["total_tokens"] == usage["prompt_tokens"] + 3
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}


def test_a_stream(server):
    events = server.stream(PATH, chat_body(SUM))
    first, *_, last = events
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert last["choices"][0]["finish_reason"] == "stop"
    assert len({(e["id"], e["created"], e["model"], e["object"]) for e in events}) == 1
    assert first["object"] == "chat.completion.chunk"
    assert not any("usage" in event for event in events)
    assert joined(events)[0]["content"] == "46"


def test_thinking_is_kept_apart(server):
    body = server.chat(SUM, chat_template_kwargs={})
    message = body["choices"][0]["message"]
    assert message["content"] == "46" and message["reasoning"] == "2+4=6, 1+3=4"
    assert "</think>" not in json.dumps(body)
    assert (
        server.chat(SUM, reasoning_effort="none", chat_template_kwargs={})["choices"][0]["message"]["reasoning"] is None
    )
    hidden = server.chat(SUM, chat_template_kwargs={}, include_reasoning=False)["choices"][0]["message"]
    assert (hidden["content"], hidden["reasoning"]) == ("46", None)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"chat_template_kwargs": {}},
        {"n": 3, "temperature": 1.0, "seed": 7, "max_tokens": 12, "ignore_eos": True},
        {"logprobs": True, "top_logprobs": 2, "return_token_ids": True, "chat_template_kwargs": {}},
        {"logprobs": True},
        {"stop": ["6"], "include_stop_str_in_output": True},
        {"max_completion_tokens": 1},
        {"tools": [WEATHER], "messages": [{"role": "user", "content": CALL}]},
        {"tools": [WEATHER], "messages": [{"role": "user", "content": CALL}], "chat_template_kwargs": {}},
        {
            "tools": [WEATHER],
            "messages": [{"role": "user", "content": CALL}],
            "logprobs": True,
            "return_token_ids": True,
        },
        {"skip_special_tokens": False, "ignore_eos": True, "max_tokens": 8},
    ],
)
def test_a_stream_equals_the_whole_answer(server, fields):
    body = chat_body(SUM, **fields)
    whole = server.post(PATH, body).json()
    events = server.stream(PATH, {**body, "stream_options": {"include_usage": True}})
    assert events[-1]["choices"] == [] and events[-1]["usage"] == whole["usage"]
    streamed = joined(events)
    assert len(streamed) == len(whole["choices"])
    for choice in whole["choices"]:
        other, message = streamed[choice["index"]], choice["message"]
        assert (other["content"], other["reasoning"]) == (message["content"] or "", message["reasoning"] or "")
        calls = [{**call["function"], "type": call["type"]} for call in message.get("tool_calls", ())]
        assert [{k: v for k, v in call.items() if k != "id"} for call in other["tool_calls"]] == calls
        assert other["finish_reason"] == choice["finish_reason"]
        assert other["logprobs"] == (choice["logprobs"] or {"content": []})["content"]
        assert other["token_ids"] == choice.get("token_ids", [])
    if fields.get("return_token_ids"):
        assert events[0]["prompt_token_ids"] == whole["prompt_token_ids"]
        assert len(streamed[0]["token_ids"]) == whole["usage"]["completion_tokens"]


def test_usage_so_far(server):
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = server.stream(PATH, chat_body(SUM, stream_options=options))
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts) and counts[-1] == 3
    assert all(
        e["usage"]["total_tokens"] == e["usage"]["prompt_tokens"] + e["usage"]["completion_tokens"] for e in events
    )


def test_logprobs(server):
    (choice,) = server.chat(SUM, logprobs=True, top_logprobs=3)["choices"]
    four, six, end = choice["logprobs"]["content"]
    assert (four["token"], six["token"], end["token"]) == ("4", "6", "<|im_end|>")
    assert four["bytes"] == [ord("4")] and four["logprob"] > -0.1
    for position in (four, six, end):
        top = [candidate["logprob"] for candidate in position["top_logprobs"]]
        assert len(top) == 3 and top == sorted(top, reverse=True) and position["logprob"] == top[0]
    (choice,) = server.chat(SUM, logprobs=True)["choices"]
    assert choice["logprobs"]["content"][0]["top_logprobs"] == []
    (choice,) = server.chat(SUM, logprobs=True, return_tokens_as_token_ids=True, return_token_ids=True)["choices"]
    assert [c["token"] for c in choice["logprobs"]["content"]] == [f"token_id:{t}" for t in choice["token_ids"]]


def test_prompt_logprobs(server):
    body = server.chat(SUM, prompt_logprobs=1, return_token_ids=True)
    first, *rest = body["prompt_logprobs"]
    assert first is None and len(rest) == body["usage"]["prompt_tokens"] - 1
    for token, position in zip(body["prompt_token_ids"][1:], rest):
        assert set(position[str(token)]) == {"logprob", "rank", "decoded_token"}


def test_a_call(server):
    body = server.chat(CALL, tools=[WEATHER])
    (choice,) = body["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    assert call["type"] == "function" and call["id"].startswith("call_") and call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "paris", "days": 3}


def test_a_tool_loop(server):
    messages = [{"role": "user", "content": CALL}]
    for thinking in ({}, {"enable_thinking": False}):
        called = server.chat(messages, tools=[WEATHER], chat_template_kwargs=thinking)["choices"][0]["message"]
        answered = {"role": "tool", "tool_call_id": called["tool_calls"][0]["id"], "content": "sunny 21"}
        done = server.chat([*messages, called, answered], tools=[WEATHER], chat_template_kwargs=thinking)
        assert done["choices"][0]["message"]["content"] == "The result is sunny 21."
        assert done["choices"][0]["finish_reason"] == "stop"


def test_parallel_calls(server):
    item = generate("parallel", 1)[0]
    for fields, count in (({}, 2), ({"parallel_tool_calls": False}, 1)):
        calls = server.chat(item.messages, tools=item.tools, **fields)["choices"][0]["message"]["tool_calls"]
        assert [call["function"]["name"] for call in calls] == [call["name"] for call in item.calls][:count]
        events = server.stream(PATH, chat_body(item.messages, tools=item.tools, **fields))
        assert len(joined(events)[0]["tool_calls"]) == count


def test_tool_choice_none(server):
    message = server.chat(SUM, tools=[WEATHER], tool_choice="none")["choices"][0]["message"]
    assert message["content"] == "46" and "tool_calls" not in message
    with_tools = server.chat(SUM, tools=[WEATHER])["usage"]["prompt_tokens"]
    assert server.chat(SUM, tools=[WEATHER], tool_choice="none")["usage"]["prompt_tokens"] < with_tools


def test_messages_in_every_form(server):
    plain = server.chat(SUM)["usage"]["prompt_tokens"]
    parts = [{"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "12+34?"}]}]
    body = server.chat(parts)
    assert (body["choices"][0]["message"]["content"], body["usage"]["prompt_tokens"]) == ("46", plain)
    system = [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": SUM}]
    developer = [{**system[0], "role": "developer"}, system[1]]
    assert server.chat(developer)["usage"] == server.chat(system)["usage"]
    for name in ("reasoning", "reasoning_content"):
        earlier = [
            {"role": "user", "content": SUM},
            {"role": "assistant", "content": "46", name: "2+4=6, 1+3=4", "tool_calls": None},
            {"role": "user", "content": 'Copy the word "planet".'},
        ]
        assert server.chat(earlier)["choices"][0]["message"]["content"] == "planet"


def test_continuing_the_last_message(server):
    messages = [{"role": "user", "content": SUM}, {"role": "assistant", "content": "4"}]
    body = server.chat(messages, continue_final_message=True, add_generation_prompt=False)
    assert body["choices"][0]["message"]["content"] == "6"


def test_sampling_fields(server):
    def text(**fields):
        return server.chat(SUM, **fields)["choices"][0]["message"]["content"]

    four = server.post("/tokenize", {"prompt": "4"}).json()["tokens"][0]
    assert text(stop="6") == "4" and text(stop=["6"], include_stop_str_in_output=True) == "46"
    assert server.chat(SUM, stop_token_ids=[four])["choices"][0]["stop_reason"] == four
    assert text(bad_words=["4"])[:1] != "4" and text(logit_bias={str(four): -100})[:1] != "4"
    assert text(allowed_token_ids=[four], max_tokens=3) == "444"
    assert text(ignore_eos=True, max_tokens=9).startswith("46")
    assert server.chat(SUM, min_tokens=6, max_tokens=9)["usage"]["completion_tokens"] >= 6
    assert text(max_tokens=1) == text(max_completion_tokens=1) == "4"
    wild = {"temperature": 2.0, "top_k": -1, "top_p": 1.0, "min_p": 0.0, "max_tokens": 12, "ignore_eos": True}
    assert text(**wild, seed=1) == text(**wild, seed=1) != text(**wild, seed=2)
    assert (
        text(temperature=2.0, top_k=1) == text(temperature=1.5, top_p=0.01) == text(temperature=1.5, min_p=1.0) == "46"
    )
    assert text(presence_penalty=0.1, frequency_penalty=0.1, repetition_penalty=1.01) == "46"
    assert text(**dict.fromkeys(("top_p", "top_k", "seed", "stop", "max_tokens", "logit_bias", "n", "tools"))) == "46"
    assert text(user="me", metadata={"a": "b"}, store=False, cache_salt="x", response_format={"type": "text"}) == "46"


def test_ids(server):
    done = server.post(PATH, chat_body(SUM), **{"X-Request-Id": "mine"})
    assert done.json()["id"] == "chatcmpl-mine" == done.headers["x-request-id"]
    assert server.chat(SUM, request_id="yours")["id"] == "chatcmpl-yours"
    twice = {server.chat(SUM)["id"], server.chat(SUM)["id"]}
    assert len(twice) == 2


@pytest.mark.parametrize("kind", ["add2", "copy", "tool", "tool_loop", "count"])
def test_it_knows_its_tasks(server, kind):
    """The server's way of prompting and parsing is the one that the checkpoint was trained with."""
    right = 0
    for item in generate(kind, 4):
        message = server.chat(item.messages, tools=item.tools)["choices"][0]["message"]
        if item.calls:
            functions = [call["function"] for call in message.get("tool_calls", ())]
            right += item.score_calls([{**f, "arguments": json.loads(f["arguments"])} for f in functions])
        else:
            right += message["content"] == item.expected
    assert right >= 3
