"""The `qwen3` reasoning parser: what is thinking, what is answer, and the same for every cut of the text."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tool_parsers.streams import cuts, feed_all, hostile_texts
from vllm.reasoning import ReasoningParser, ReasoningParserManager
from vllm.reasoning.qwen3_reasoning_parser import Qwen3ReasoningParser


def stream(parser, deltas):
    reasoning, content = zip(*feed_all(parser, deltas))
    return "".join(reasoning) or None, "".join(content) or None


THINKING = {
    "I think\n</think>\n\nYes.": ("I think", "Yes."),
    "I think</think>Yes.": ("I think", "Yes."),
    "\n\nI think\n\n\n</think>\n\n\n\nYes.\n": ("I think", "Yes.\n"),
    "  indented \n</think>\n\n  Yes. ": ("  indented ", "  Yes. "),
    "a\n\nb\n</think>\n\nc\n\nd": ("a\n\nb", "c\n\nd"),
    "<think>\nI think\n</think>\n\nYes.": ("I think", "Yes."),
    "\n <think>\nI think\n</think>\n\nYes.": ("I think", "Yes."),
    "a <think> b\n</think>\n\nc </think> <think>": ("a <think> b", "c </think> <think>"),
    "\n</think>\n\nYes.": (None, "Yes."),
    "</think>\n\n": (None, None),
    "never ends\n\n": ("never ends", None),
    "cut in the marker\n</thi": ("cut in the marker\n</thi", None),
    "call it\n\n<tool_call>\n<function=f>": ("call it", "<tool_call>\n<function=f>"),
    "call it\n<tool_call>x</tool_call>\n</think>\n\ny": ("call it", "<tool_call>x</tool_call>\n</think>\n\ny"),
    "a\n</think>\n\n<tool_call>x": ("a", "<tool_call>x"),
    "<tool_call>x": (None, "<tool_call>x"),
    "a < b <tool_cal </thin <\n</think>\n\nc": ("a < b <tool_cal </thin <", "c"),
    "": (None, None),
    "\n": (None, None),
    "<thi": ("<thi", None),
    " " * 65 + "<think>x</think>y": (" " * 65 + "<think>x", "y"),
}  # fmt: skip

CLOSED = {
    "Yes.": (None, "Yes."),
    "\n\nYes.\n": (None, "\n\nYes.\n"),
    "a </think> b": (None, "a </think> b"),
    "<tool_call>x</tool_call>": (None, "<tool_call>x</tool_call>"),
    "<think>\nI think\n</think>\n\nYes.": ("I think", "Yes."),
    "\n\n<think>I think</think>Yes.": ("I think", "Yes."),
    "No <think> here": (None, "No <think> here"),
    "<thi": (None, "<thi"),
    "  <th": (None, "  <th"),
    "": (None, None),
}


@pytest.mark.parametrize(
    ("thinking", "text", "expected"),
    [(True, text, parts) for text, parts in THINKING.items()]
    + [(False, text, parts) for text, parts in CLOSED.items()],
)
def test_whole_texts_and_every_cut_in_two(thinking, text, expected):
    assert Qwen3ReasoningParser(thinking).extract_reasoning(text) == expected
    assert stream(Qwen3ReasoningParser(thinking), text) == expected
    for place in range(len(text) + 1):
        assert stream(Qwen3ReasoningParser(thinking), [text[:place], text[place:]]) == expected


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_stream_gives_what_the_whole_text_gives(data):
    text = data.draw(hostile_texts())
    options = data.draw(st.tuples(st.booleans(), st.booleans()))
    whole = Qwen3ReasoningParser(*options).extract_reasoning(text)
    assert stream(Qwen3ReasoningParser(*options), data.draw(cuts(text))) == whole


def reference(text: str, thinking: bool, calls_end: bool) -> tuple[str, str]:
    """The documented rules, on a whole text."""
    head = text.lstrip()
    if len(text) - len(head) <= 64 and head.startswith("<think>"):
        thinking, text = True, head[len("<think>") :]
    if not thinking:
        return "", text
    ends = [text.find("</think>")] + ([text.find("<tool_call>")] if calls_end else [])
    end = min([place for place in ends if place >= 0], default=len(text))
    rest = text[end:]
    if rest.startswith("</think>"):
        rest = rest[len("</think>") :].lstrip("\n")
    return text[:end].strip("\n"), rest


@settings(max_examples=200, deadline=None)
@given(hostile_texts(), st.booleans(), st.booleans())
def test_whole_texts_follow_the_rules(text, thinking, calls_end):
    reasoning, content = Qwen3ReasoningParser(thinking, calls_end).extract_reasoning(text)
    assert (reasoning or "", content or "") == reference(text, thinking, calls_end)


def test_only_a_possible_marker_is_held_back():
    parser = Qwen3ReasoningParser()
    assert parser.feed("I thi") == ("I thi", "")
    assert parser.feed("nk, so\n") == ("nk, so", "")
    assert parser.feed("that <") == ("\nthat ", "")
    assert parser.feed("b </t") == ("<b ", "")
    assert parser.in_reasoning
    assert parser.feed("hink>\n\nYes") == ("", "Yes")
    assert not parser.in_reasoning and not parser.ended_by_call
    assert parser.feed(" <tool_c") == ("", " <tool_c")
    assert parser.finish() == ("", "")


def test_extracting_leaves_a_stream_alone():
    parser = Qwen3ReasoningParser()
    parser.feed("a </th")
    assert parser.extract_reasoning("x</think>y") == ("x", "y")
    assert parser.feed("ink>b") == ("", "b")


def test_a_call_ends_the_block_only_where_tools_are_offered():
    parser = Qwen3ReasoningParser(calls_end_reasoning=False)
    assert parser.extract_reasoning("a <tool_call> is a word\n</think>\n\nb") == ("a <tool_call> is a word", "b")
    parser = Qwen3ReasoningParser()
    parser.feed("a <tool_call>")
    assert parser.ended_by_call and not parser.in_reasoning


@pytest.mark.parametrize(
    ("prompt", "opens"),
    [
        ("<|im_start|>assistant\n<think>\n", True),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("<|im_start|>assistant\n", False),
    ],
)
def test_the_prompt_tells_whether_the_block_is_open(prompt, opens):
    assert Qwen3ReasoningParser.prompt_opens_thinking(prompt) is opens


@pytest.mark.parametrize(
    "text",
    [
        "so it goes. " * 25_000,
        "\n" * 300_000,
        "<" * 300_000,
        "</think" * 40_000,
        " " * 300_000,
        "a</think>" + "\n" * 300_000,
    ],
    ids=["prose", "newlines", "angles", "markers", "spaces", "gap"],
)
def test_time_is_linear(text):
    start = time.process_time()
    parser = Qwen3ReasoningParser()
    for char in text:
        parser.feed(char)
    parser.finish()
    assert time.process_time() - start < 1.5  # 5 s a million characters


def test_names():
    assert ReasoningParserManager.get_reasoning_parser("qwen3") is Qwen3ReasoningParser
    with pytest.raises(ValueError, match=r"unknown reasoning parser 'deepseek_r1'; known: qwen3"):
        ReasoningParserManager.get_reasoning_parser("deepseek_r1")
    assert issubclass(Qwen3ReasoningParser, ReasoningParser)
