"""Reasoning and tool parsers together, as the chat endpoint uses them."""

import json
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tool_parsers.streams import CALL, JSON_CALL, TOOLS, check_pieces, cuts, feed_all, hostile_texts, ids
from vllm.reasoning import ReasoningParserManager
from vllm.reasoning.output_parser import ChatDelta, ChatOutput, ChatOutputParser, join_chat
from vllm.tool_parsers import ToolParserManager

NAMES = ToolParserManager.list_registered()


def make(tool_parser=None, thinking=True, reasoning=True, tools=TOOLS):
    return ChatOutputParser(
        ReasoningParserManager.get_reasoning_parser("qwen3") if reasoning else None,
        ToolParserManager.get_tool_parser(tool_parser) if tool_parser else None,
        tools,
        thinking,
        ids(),
    )


def summary(output: ChatOutput):
    return output.reasoning, output.content, [(call.name, json.loads(call.arguments)) for call in output.tool_calls]


F = ("f", {"a": "x", "n": 5})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hm.\n</think>\n\nHello.\n\n{call}\n{call}", ("Hm.", "Hello.", [F, F])),
        ("Hm.\n</think>\n\n{call}", ("Hm.", None, [F])),
        ("Hm.\n\n{call}", ("Hm.", None, [F])),
        ("Hm.\n{call}\n</think>\n\n", ("Hm.", None, [F])),
        ("Hm.\n{call}\n</think>\n\nDone.", ("Hm.", "Done.", [F])),
        ("Hm.\n{call}\nmore </think>\n{call}\nb </think>", ("Hm.", "more b </think>", [F, F])),
        ("{call}", (None, None, [F])),
        ("Hm.\n</think>\n\nNo calls. ", ("Hm.", "No calls. ", [])),
        ("Hm.\n</think>\n\nYes {call} </think>", ("Hm.", "Yes </think>", [F])),
        ("Hm. <tool_call> is a tag.\n</think>\n\nYes", ("Hm. ", "<tool_call> is a tag.\nYes", [])),
        ("Hm. <tool_call> {call} </thi", ("Hm. ", "<tool_call> </thi", [F])),
    ],
)
def test_thinking_then_calls(name, text, expected):
    text = text.replace("{call}", JSON_CALL if name == "hermes" else CALL)
    assert summary(make(name).parse(text)) == expected
    for place in range(len(text) + 1):
        deltas = feed_all(make(name), [text[:place], text[place:]])
        assert summary(join_chat(deltas)) == expected


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_stream_gives_what_the_whole_text_gives(data):
    text = data.draw(hostile_texts())
    options = {
        "tool_parser": data.draw(st.sampled_from([None, *NAMES])),
        "thinking": data.draw(st.booleans()),
        "reasoning": data.draw(st.booleans()),
        "tools": data.draw(st.sampled_from([None, TOOLS])),
    }
    whole = make(**options).parse(text)
    parser = make(**options)
    deltas = feed_all(parser, data.draw(cuts(text)))
    assert join_chat(deltas) == whole
    check_pieces([piece for delta in deltas for piece in delta.tool_calls])
    for delta in deltas:
        indices = [piece.index for piece in delta.tool_calls]
        assert len(set(indices)) == len(indices)
    assert parser.call_count == len(whole.tool_calls)
    assert all(isinstance(json.loads(call.arguments), dict) for call in whole.tool_calls)


def test_without_parsers_everything_is_content():
    text = f"a</think>\n{CALL}"
    assert make(reasoning=False).parse(text) == ChatOutput(None, text, [])


def test_without_tools_a_marker_is_a_word():
    parser = make(tools=None)
    assert parser.parse("it is <tool_call>\n</think>\n\nYes.") == ChatOutput("it is <tool_call>", "Yes.", [])
    assert make(tools=TOOLS).parse("so\n<tool_call>x") == ChatOutput("so", "<tool_call>x", [])


def test_deltas_are_as_early_as_can_be():
    parser = make("qwen3_coder")
    assert parser.feed("Hm") == ChatDelta("Hm")
    assert not parser.feed("\n</think>")
    assert not parser.feed("\n\n")
    assert parser.feed("Well") == ChatDelta(content="Well")
    assert not parser.feed("\n\n<tool_call>\n<function=f>\n<parameter")
    (head,) = parser.feed("=a>\nx").tool_calls
    assert (head.index, head.id, head.name, head.arguments) == (0, "id0", "f", "")
    (piece,) = parser.feed("\n</parameter>\n</function>").tool_calls
    assert (piece.index, piece.id, piece.name, piece.arguments) == (0, None, None, '{"a": "x"}')
    assert not parser.feed("\n</tool_call>")
    assert not parser.finish()
    assert parser.call_count == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_million_characters_one_by_one_take_less_than_five_seconds(name):
    call = JSON_CALL.replace('"x"', '"' + "long line <of> code\\n" * 5000 + '"')
    if name != "hermes":
        call = CALL.replace("\nx\n", "\n" + "long line <of> code\n" * 5000 + "\n")
    text = "so it goes\n" * 20_000 + "</think>\n\n" + "and on it goes. " * 15_000 + (call + "\n") * 5
    text = text[:1_000_000]
    assert len(text) > 900_000
    parser = make(name)
    start = time.process_time()
    for char in text:
        parser.feed(char)
    parser.finish()
    assert time.process_time() - start < 5
    assert parser.call_count == len(make(name).parse(text).tool_calls) > 0


def test_parsers_need_no_library():
    """They are imported by name; none of them, nor the packages, reach for torch or a web library."""
    code = (
        "import sys\n"
        "from vllm.reasoning.output_parser import ChatOutputParser\n"
        "from vllm.reasoning import ReasoningParserManager as R\n"
        "from vllm.tool_parsers import ToolParserManager as T\n"
        "assert not any('hermes' in name for name in sys.modules)\n"
        "R.get_reasoning_parser('qwen3'); [T.get_tool_parser(name) for name in T.list_registered()]\n"
        "assert not {'torch', 'pydantic', 'fastapi', 'transformers'} & set(sys.modules), sorted(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
