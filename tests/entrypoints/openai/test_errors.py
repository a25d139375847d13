"""Everything that a client can get wrong: the status, the field, and a sentence that helps. Afterwards the server is as before."""

import json

import httpx
import pytest

from tests.entrypoints.openai.server import chat_body

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
USER = {"role": "user", "content": "Hi"}


def check(response, status, *words, param=...):
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["code"] == status
    for word in words:
        assert word in error["message"], error["message"]
    assert "Traceback" not in response.text and "\n" not in error["message"] and len(error["message"]) < 1000
    if param is not ...:
        assert error["param"] == param


COMMON = [
    ({"temperature": -1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -2.5}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"n": 0}, "n"),
    ({"n": -1}, "n"),
    ({"n": 10**9}, "n"),
    ({"n": 10**40}, "n"),
    ({"n": 2.5}, "n"),
    ({"n": "2"}, "n"),
    ({"max_tokens": -5}, "max_tokens"),
    ({"max_tokens": 1e300}, "max_tokens"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 9, "max_tokens": 3}, "min_tokens"),
    ({"seed": 1 << 70}, "seed"),
    ({"seed": "x"}, "seed"),
    ({"stop": 5}, "stop"),
    ({"stop": [""]}, "stop"),
    ({"stop": [1]}, "stop"),
    ({"stop_token_ids": ["a"]}, "stop_token_ids"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"stop_token_ids": [10**6]}, "stop_token_ids"),
    ({"allowed_token_ids": []}, "allowed_token_ids"),
    ({"allowed_token_ids": [10**12]}, "allowed_token_ids"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"99999999": 1}}, "logit_bias"),
    ({"logit_bias": {"1": "x"}}, "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"stop": ["a"] * 65}, "stop"),
    ({"stop": "a" * 1001}, "stop"),
    ({"bad_words": "x" * 10}, "bad_words"),
    ({"bad_words": ["x" * 1001]}, "bad_words[0]"),
    ({"n": 1000, "allowed_token_ids": [1] * 2000}, "allowed_token_ids"),
    ({"bad_words": [""]}, "bad_words"),
    ({"prompt_logprobs": -3}, "prompt_logprobs"),
    ({"prompt_logprobs": 500}, "prompt_logprobs"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 3}}, "stream_options.include_usage"),
    ({"stream": True, "stream_options": []}, "stream_options"),
    ({"priority": 3}, "priority"),
    ({"priority": "high"}, "priority"),
    ({"request_id": ""}, "request_id"),
    ({"request_id": "a b\n"}, "request_id"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"response_format": {"type": "poem"}}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs"),
    ({"best_of": 3}, "best_of"),
    ({"guided_json": {"type": "object"}}, "structured_outputs"),
    ({"thinking_token_budget": -2}, "thinking_token_budget"),
    ({"use_beam_search": True}, "beam"),
    ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
]


@pytest.mark.parametrize(("fields", "word"), COMMON, ids=lambda value: json.dumps(value)[:60])
def test_a_wrong_field_on_either_route(server, fields, word):
    check(server.post(CHAT, {"messages": [USER], **fields}), 400, word)
    check(server.post(COMPLETION, {"prompt": "Hi", **fields}), 400, word)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, ["messages"]),
        ({"messages": []}, ["messages"]),
        ({"messages": "Hi"}, ["messages"]),
        ({"messages": [5]}, ["messages[0]"]),
        ({"messages": [{"content": "Hi"}]}, ["messages[0].role"]),
        ({"messages": [{"role": "wizard", "content": "Hi"}]}, ["messages[0].role", "wizard"]),
        ({"messages": [{"role": "user", "content": 5}]}, ["messages[0].content"]),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, ["messages[0].content[0]"]),
        ({"messages": [{"role": "user", "content": [{"text": "a"}]}]}, ["messages[0].content[0].type"]),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            ["text only"],
        ),
        ({"messages": [{"role": "system", "content": "Hi"}]}, ["template", "user"]),
        ({"messages": [USER, {"role": "system", "content": "Hi"}]}, ["template", "system"]),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            ["messages[1].tool_calls[0].function.arguments", "JSON"],
        ),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[]"}}]}]},
            ["messages[1].tool_calls[0].function.arguments", "object"],
        ),
        ({"messages": [USER], "tools": [5]}, ["tools[0]"]),
        ({"messages": [USER], "tools": [{"type": "function"}]}, ["tools[0].function"]),
        ({"messages": [USER], "tools": [{"type": "web", "function": {"name": "f"}}]}, ["tools[0].type"]),
        ({"messages": [USER], "tools": [{"type": "function", "function": {"name": ""}}]}, ["tools[0].function.name"]),
        ({"messages": [USER], "tool_choice": "required"}, ["tool_choice", "tools"]),
        ({"messages": [USER], "tool_choice": "required"}, ["tool_choice", "tools"]),
        (
            {"messages": [USER], "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            ["'g'", "tools"],
        ),
        ({"messages": [USER], "tools": [TOOL], "tool_choice": "maybe"}, ["tool_choice"]),
        ({"messages": [USER], "functions": [{"name": "f"}]}, ["functions", "tools"]),
        ({"messages": [USER], "function_call": "auto"}, ["function_call", "tool_choice"]),
        ({"messages": [USER], "modalities": ["audio"]}, ["modalities"]),
        ({"messages": [USER], "top_logprobs": 3}, ["top_logprobs", "logprobs"]),
        ({"messages": [USER], "logprobs": True, "top_logprobs": 21}, ["21", "--max-logprobs"]),
        ({"messages": [USER], "logprobs": 3}, ["logprobs"]),
        ({"messages": [USER], "chat_template": "{{ messages }}"}, ["--trust-request-chat-template"]),
        ({"messages": [USER], "chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, ["chat_template_kwargs"]),
        ({"messages": [USER], "chat_template_kwargs": {"tokenize": True}}, ["chat_template_kwargs", "tokenize"]),
        ({"messages": [USER], "chat_template_kwargs": {"messages": []}}, ["chat_template_kwargs", "messages"]),
        ({"messages": [USER], "chat_template_kwargs": 5}, ["chat_template_kwargs"]),
        ({"messages": [USER], "continue_final_message": True}, ["add_generation_prompt"]),
        (
            {"messages": [USER], "continue_final_message": True, "add_generation_prompt": False},
            ["continue_final_message", "assistant"],
        ),
        ({"messages": [USER], "reasoning_effort": "huge"}, ["reasoning_effort"]),
        ({"messages": [USER], "max_completion_tokens": 0}, ["max_completion_tokens"]),
        ({"messages": [{"role": "user", "content": "a" * 20000}]}, ["maximum context length", "4096"]),
        ({"messages": [USER], "max_tokens": 5000}, ["maximum context length", "max_tokens is 5000"]),
        ({"messages": [USER], "n": 2, "temperature": 0}, ["temperature"]),
    ],
)
def test_a_wrong_conversation(server, body, words):
    check(server.post(CHAT, body), 400, *words)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, ["prompt"]),
        ({"prompt": None}, ["prompt"]),
        ({"prompt": ""}, ["prompt"]),
        ({"prompt": []}, ["prompt"]),
        ({"prompt": [""]}, ["prompt"]),
        ({"prompt": [[]]}, ["prompt"]),
        ({"prompt": 5}, ["prompt"]),
        ({"prompt": {"a": 1}}, ["prompt"]),
        ({"prompt": [1, "a"]}, ["prompt"]),
        ({"prompt": [1.5]}, ["prompt"]),
        ({"prompt": [True]}, ["prompt"]),
        ({"prompt": [-1]}, ["-1"]),
        ({"prompt": [10**9]}, ["1000000000"]),
        ({"prompt": [[1], [10**40]]}, ["prompt"]),
        ({"prompt": ["a"] * 2000}, ["prompts times n"]),
        ({"prompt": ["a"] * 200, "n": 6}, ["prompts times n"]),
        ({"prompt": "a" * 20000}, ["maximum context length"]),
        ({"prompt": "word " * 300000}, ["maximum context length"]),
        ({"prompt": [5] * 4096}, ["maximum context length", "4096"]),
        ({"prompt": "a", "max_tokens": 4096}, ["maximum context length"]),
        ({"prompt": "a", "max_tokens": 0}, ["max_tokens", "echo"]),
        ({"prompt": "a", "logprobs": 21}, ["--max-logprobs"]),
        ({"prompt": "a", "logprobs": -2}, ["logprobs"]),
        ({"prompt": "a", "logprobs": True}, ["logprobs"]),
        ({"prompt": "a", "suffix": "b"}, ["suffix"]),
        ({"prompt": "a", "echo": "yes"}, ["echo"]),
    ],
    ids=lambda value: json.dumps(value)[:60],
)
def test_a_wrong_completion(server, body, words):
    check(server.post(COMPLETION, body), 400, *words)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"5",
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": Infinity}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a"} trailing',
        b"\x00\x01\x02",
        b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"prompt": "a", "logit_bias": ' + b'{"a":' * 500 + b"1" + b"}" * 500 + b"}",
        b'{"prompt": "a", "x": ' + b"[" * 200 + b"]" * 200 + b"}",
    ],
    ids=lambda value: repr(value[:40]),
)
def test_rubbish(server, body):
    for path in (CHAT, COMPLETION, "/tokenize", "/detokenize"):
        check(server.post(path, body), 400)


def test_unknown_models_and_routes(server):
    for path, body in ((CHAT, {"messages": [USER]}), (COMPLETION, {"prompt": "a"}), ("/tokenize", {"prompt": "a"})):
        check(server.post(path, {**body, "model": "gpt-4"}), 404, "gpt-4", "tiny", param="model")
        check(server.post(path, {**body, "model": 5}), 400, "model")
    check(server.http.get("/v1/models/gpt-4"), 404, "gpt-4", "tiny")
    check(server.http.get("/v1/nothing"), 404, "/v1/nothing")
    check(server.http.get(CHAT), 405)
    check(server.http.post("/v1/models"), 405)


def test_a_name_for_the_wrong_field(server):
    """`param` is the path of the field in the body."""
    error = server.post(CHAT, {"messages": [USER, {"role": "user", "content": [{"type": "text", "text": 5}]}]}).json()[
        "error"
    ]
    assert error["param"] == "messages[1].content[0].text" and error["type"] == "BadRequestError"


def test_no_content_type_is_needed_and_headers_may_be_odd(server):
    body = json.dumps(chat_body("What is 12+34?"))
    for headers in (
        {},
        {"Content-Type": "text/plain"},
        {"X-Request-Id": "a" * 500},
        {"X-Request-Id": "\u00e9".encode()},
    ):
        done = httpx.post(server.url + CHAT, content=body, headers=headers)
        assert done.json()["choices"][0]["message"]["content"] == "46"


def test_the_next_good_request_works(server):
    assert server.chat("What is 12+34?")["choices"][0]["message"]["content"] == "46"
    assert server.http.get("/load").json() == {"server_load": 0}
    assert "Traceback" not in server.log
