import pytest

from vllm.entrypoints.openai.conversation import conversation, tool_dicts
from vllm.entrypoints.openai.errors import APIError
from vllm.entrypoints.openai.protocol.chat import Message, Tool


def turns(*messages, parts_as_list=False):
    return conversation([Message.model_validate(message) for message in messages], parts_as_list)


def test_plain_messages_stay_as_they_are():
    message = {"role": "user", "content": "Hi", "name": "me", "extra": {"a": None}}
    assert turns(message) == [message]
    assert turns({"role": "assistant", "content": None, "tool_calls": None, "refusal": None}) == [
        {"role": "assistant", "content": ""}
    ]
    assert turns({"role": "developer", "content": "x"}) == [{"role": "system", "content": "x"}]
    tool = {"role": "tool", "content": "x", "tool_call_id": "1"}
    assert turns(tool) == [tool]


def test_parts():
    parts = [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}, {"type": "refusal", "refusal": "c"}]
    message = {"role": "user", "content": parts}
    assert turns(message)[0]["content"] == "a\nb\nc"
    assert turns(message, parts_as_list=True)[0]["content"] == [{"type": "text", "text": text} for text in "abc"]
    for part in (
        {"type": "image_url", "image_url": {}},
        {"type": "text"},
        {"type": "refusal"},
        {"type": "input_audio"},
    ):
        with pytest.raises(APIError, match=r"messages\[0\].content\[0\]"):
            turns({"role": "user", "content": [part]})


def test_reasoning_under_both_names():
    for name in ("reasoning", "reasoning_content"):
        (turn,) = turns({"role": "assistant", "content": "a", name: "b"})
        assert turn["reasoning"] == turn["reasoning_content"] == "b"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [('{"a": {"b": null}}', {"a": {"b": None}}), ({"a": [1]}, {"a": [1]}), ("", {}), (None, {}), ("{}", {})],
)
def test_arguments_become_mappings(arguments, expected):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    (turn,) = turns({"role": "assistant", "tool_calls": [call]})
    assert turn["tool_calls"] == [{"id": "1", "type": "function", "function": {"name": "f", "arguments": expected}}]


@pytest.mark.parametrize("arguments", ["{", "[1]", "5", '{"a": NaN}'])
def test_arguments_that_are_none(arguments):
    with pytest.raises(APIError, match=r"messages\[0\].tool_calls\[0\].function.arguments"):
        turns({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]})


def test_tools_keep_what_was_sent():
    tool = {
        "type": "function",
        "function": {"name": "f", "parameters": {"properties": {"a": {"default": None}}}, "strict": True, "x": 1},
    }
    assert tool_dicts([Tool.model_validate(tool)]) == [tool] and tool_dicts([]) is None and tool_dicts(None) is None
