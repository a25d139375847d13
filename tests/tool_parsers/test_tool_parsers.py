"""What holds for every tool parser: names, tags, time."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tool_parsers.streams import CALL, TOOLS
from vllm.tool_parsers import ToolParser, ToolParserManager
from vllm.tool_parsers.calls import new_call_id
from vllm.tool_parsers.qwen3coder_tool_parser import _VALUE_ENDS
from vllm.tool_parsers.tags import GAP, NAME, Run, Tag

NAMES = ["hermes", "qwen3_coder", "qwen3_xml"]


def test_names():
    assert ToolParserManager.list_registered() == NAMES
    for name in NAMES:
        assert issubclass(ToolParserManager.get_tool_parser(name), ToolParser)
    with pytest.raises(ValueError, match="unknown tool call parser 'llama3'; known: hermes, qwen3_coder, qwen3_xml"):
        ToolParserManager.get_tool_parser("llama3")


def test_registering(monkeypatch):
    monkeypatch.setattr(ToolParserManager, "_known", dict(ToolParserManager._known))
    hermes = ToolParserManager.get_tool_parser("hermes")

    @ToolParserManager.register_module("mine")
    class Mine(hermes):
        pass

    ToolParserManager.register_module("other", "vllm.tool_parsers.hermes_tool_parser:Hermes2ProToolParser")
    assert ToolParserManager.get_tool_parser("mine") is Mine
    assert ToolParserManager.get_tool_parser("other") is hermes


def test_ids_differ():
    made = {new_call_id() for _ in range(1000)}
    assert len(made) == 1000 and all(re.fullmatch(r"call_[0-9a-f]{24}", name) for name in made)


EXAMPLES = {GAP: st.text(" \t\r\n", max_size=64), NAME: st.text("abc =/'é", min_size=1, max_size=256)}


def spell(data, parts) -> str:
    """A text that is the tag."""
    text = ""
    for part in parts:
        if isinstance(part, list):
            text += spell(data, data.draw(st.sampled_from(part)))
        else:
            text += data.draw(EXAMPLES[part]) if isinstance(part, Run) else part
    return text


@settings(deadline=None)
@given(st.data())
def test_every_beginning_of_a_tag_may_be_one(data):
    tag = Tag(_VALUE_ENDS)
    text = spell(data, [_VALUE_ENDS])
    for end in range(1, len(text)):
        assert tag.match(text[:end], 0) == (None, True)
        assert tag.find("a < b " + text[:end], 0) == (False, 6)
    assert tag.match(text + "<", 0) == (len(text), True)
    assert tag.find(f"<< {text}", 0) == (True, 3)
    assert tag.match(text[1:], 0) == (None, False)
    assert tag.find(text[1:].replace("<", ""), 0) == (False, len(text[1:].replace("<", "")))


N = 100_000
HOSTILE = {
    "angles": "<" * N,
    "opening tags": "<tool_call>" * (N // 11),
    "white space": " \n" * (N // 2),
    "almost calls": ("<tool_call>" + " " * 64 + "<function=" + "f" * 256) * (N // 341),
    "value with angles": CALL[:40] + "<" * N,
    "value with ends": CALL[:45] + ("</parameter>" + " " * 64) * (N // 76),
    "value with long names": CALL[:45] + ("</parameter>" + " " * 64 + "<parameter=" + "p" * 256) * (N // 343),
    "newlines in a value": CALL[:45] + "\n" * N,
    "calls": CALL * (N // len(CALL)),
    "repeated parameters": CALL[:27] + "<parameter=a>\n1\n</parameter>\n" * (N // 30),
    "open braces": "<tool_call>{" + "{" * N,
    "open string": '<tool_call>{"' + "\\" * N,
    "newlines in a string": '<tool_call>{"' + "\n</tool_cal" * (N // 11),
    "balanced": "<tool_call>{" + "[" * (N // 2) + "]" * (N // 2) + "}",
    "empty objects": "<tool_call>{}" * (N // 13),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", HOSTILE)
def test_time_is_linear(name, case):
    """100,000 characters in deltas of one, and all at once; the limit is 5 s a million for each."""
    for deltas in (HOSTILE[case], [HOSTILE[case]]):
        parser = ToolParserManager.get_tool_parser(name)(TOOLS)
        start = time.process_time()
        for delta in deltas:
            parser.feed(delta)
        parser.finish()
        assert time.process_time() - start < 0.5
