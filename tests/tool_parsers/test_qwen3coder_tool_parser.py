"""`qwen3_coder` and `qwen3_xml`: one format, one reader, two habits of sending."""

import json
import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.tool_parsers.streams import CALL, TAGS, TOOLS, check_pieces, cuts, feed_all, hostile_texts, ids, render_turn
from vllm.benchmarks import tiny_tasks
from vllm.reasoning.output_parser import ChatOutputParser
from vllm.reasoning.qwen3_reasoning_parser import Qwen3ReasoningParser
from vllm.tool_parsers.calls import ToolCall, join_deltas
from vllm.tool_parsers.qwen3coder_tool_parser import Qwen3CoderToolParser
from vllm.tool_parsers.qwen3xml_tool_parser import Qwen3XMLToolParser

BOTH = pytest.mark.parametrize("parser", [Qwen3CoderToolParser, Qwen3XMLToolParser])
CLOSE = "\n</parameter>\n</function>\n</tool_call>"


def parse(parser, text, tools=TOOLS):
    """(content, [(name, arguments)]) of the whole text, after every cut in two and the cut into characters gave the same."""
    whole = parser(tools, ids()).extract_tool_calls(text)
    for deltas in [list(text), *([text[:place], text[place:]] for place in range(len(text) + 1))]:
        made = feed_all(parser(tools, ids()), deltas)
        assert join_deltas(made) == whole
        check_pieces([piece for delta in made for piece in delta.tool_calls])
    return whole.content, [(call.name, json.loads(call.arguments)) for call in whole.tool_calls]


def value(parser, text, key="a"):
    content, [(_, arguments)] = parse(
        parser, f"<tool_call>\n<function=f>\n<parameter={key}>{text}</parameter>\n</function>\n</tool_call>"
    )
    assert content is None
    return arguments[key]


@BOTH
def test_calls_and_the_content_around_them(parser):
    f = ("f", {"a": "x", "n": 5})
    assert parse(parser, CALL) == (None, [f])
    assert parse(parser, f"Look:\n\n{CALL}\n{CALL}\n") == ("Look:", [f, f])
    assert parse(parser, f"\n\n{CALL}\n\nThat is all. ") == ("That is all.", [f])
    assert parse(parser, f"one\n\n{CALL}\n\ntwo\n{CALL}{CALL}three\n") == ("one\n\ntwo\nthree", [f, f, f])
    assert parse(parser, " No call. \n") == (" No call. \n", [])
    assert parse(parser, " \n") == (" \n", [])
    assert parse(parser, "") == (None, [])


@BOTH
def test_calls_without_parameters(parser):
    assert parse(parser, "<tool_call>\n<function=g>\n</function>\n</tool_call>") == (None, [("g", {})])
    assert parse(parser, "<tool_call><function=g></function></tool_call>") == (None, [("g", {})])
    assert parse(parser, "<tool_call>\n<function=g>\n</tool_call>") == (None, [("g", {})])


@BOTH
def test_one_newline_is_taken_off_each_end(parser):
    assert value(parser, "\nx\n") == "x"
    assert value(parser, "x") == "x"
    assert value(parser, "\n\n x \n\n") == "\n x \n"
    assert value(parser, "\n\n") == ""
    assert value(parser, "\n") == ""
    assert value(parser, "") == ""
    assert value(parser, "\n\n\n") == "\n"


@BOTH
@pytest.mark.parametrize(
    "text",
    [
        "a </param b", "<function", "<function=f>", "<parameter=a>\n1", "</parameter>", "</parameter> and more", "</parameter>\n<b>",
        "</function>", "</tool_call>", CALL.replace("</function>", "").replace("</parameter>", ""), "<tool_call>", "<a><b/></a>",
        "if a < b && c > d:\n\treturn '\\n'", '{"a": "b\\"c"}', "日本語 🎉 \u2028 é", "</think>", "<", "</", "\\", '"', "null", "5", "True",
    ],
)  # fmt: skip
def test_any_text_can_be_a_string(parser, text):
    assert value(parser, f"\n{text}\n") == text
    assert value(parser, f"\n{text}\n", key="unknown") == text


@BOTH
def test_unknown_functions_and_parameters_pass_as_strings(parser):
    assert parse(parser, CALL.replace("=f>", "=g.h-2>")) == (None, [("g.h-2", {"a": "x", "n": "5"})])
    assert parse(parser, CALL.replace("=n>", "=m m>")) == (None, [("f", {"a": "x", "m m": "5"})])
    assert parse(parser, CALL, tools=None) == (None, [("f", {"a": "x", "n": "5"})])
    hostile = [
        None,
        5,
        {},
        {"function": None},
        {"function": {"name": 3}},
        {"function": {"name": "f", "parameters": []}},
    ]
    assert parse(parser, CALL, tools=hostile) == (None, [("f", {"a": "x", "n": "5"})])


@BOTH
def test_of_two_parameters_with_one_name_the_first_counts(parser):
    text = (
        "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n<parameter=a>\n2\n</parameter>\n<parameter=n>\n3"
        + CLOSE
    )
    assert parse(parser, text) == (None, [("f", {"a": "1", "n": 3})])


@BOTH
def test_missing_closing_tags(parser):
    f = ("f", {"a": "1", "n": 2})
    start = "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n<parameter=n>\n2\n"
    assert parse(parser, start + "</function>\n</tool_call>") == (None, [f])
    assert parse(parser, start + "</function>\n</tool_") == (None, [f])
    assert parse(parser, start + "</parameter>\n</tool_call>") == (None, [f])
    assert parse(parser, start + "</parameter>\n</function>\nDone.") == ("Done.", [f])
    assert parse(parser, start + "</parameter>\n" + CALL) == (None, [f, ("f", {"a": "x", "n": 5})])
    sibling = "</parameter>\n</function>\n<function=g>\n<parameter=b>\n3" + CLOSE
    assert parse(parser, start + sibling) == (None, [f, ("g", {"b": "3"})])


def test_an_output_that_ends_inside_a_call():
    """At every place: before the call is known to be one the text is content, then the call has what is complete."""
    text = "Hi\n" + CALL
    seen = []
    for end in range(3, len(text)):
        content, calls = parse(Qwen3CoderToolParser, text[:end])
        if not calls:
            assert content == text[:end]
        else:
            assert content == "Hi"
        if calls not in seen:
            seen.append(calls)
    assert seen == [[], [("f", {})], [("f", {"a": "x"})], [("f", {"a": "x", "n": 5})]]
    assert text.index("<parameter=a>") + len("<parameter=a>") == next(
        end for end in range(len(text)) if parse(Qwen3CoderToolParser, text[:end])[1]
    )


def test_qwen3_xml_keeps_what_it_has_sent_of_a_value():
    start = "<tool_call>\n<function=f>\n<parameter=a>\nline 1\nli"
    assert parse(Qwen3XMLToolParser, start) == (None, [("f", {"a": "line 1\nli"})])
    assert parse(Qwen3CoderToolParser, start) == (None, [("f", {})])
    assert parse(Qwen3XMLToolParser, start + "\n</param") == (None, [("f", {"a": "line 1\nli"})])
    assert parse(Qwen3XMLToolParser, start.replace("=a>", "=n>")) == (None, [("f", {})])


def test_qwen3_xml_sends_strings_as_they_come():
    parser = Qwen3XMLToolParser(TOOLS, ids())
    sent = []
    for delta in ["<tool_call>\n<function=f>\n<parameter=a>", "\n", 'on"e\n', "two", " </par", "am\n", CLOSE.lstrip()]:
        sent.append("".join(piece.arguments for piece in parser.feed(delta).tool_calls))
    assert sent == ['{"a": "', "", 'on\\"e', "\\ntwo", " ", "</param", '"}']


@BOTH
@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>", "<tool_call>\n</tool_call>", "<tool_call>\n<function=>\n</function>\n</tool_call>", "<tool_call>\n<function=f",
        "<tool_call>\nHello <function=f>\n</function>", "<tool_call>\n<function=f>\nHello\n</function>\n</tool_call>",
        "<tool_call>\n<function=f>\n<parameter=>\n1\n</parameter>\n</function>\n</tool_call>", "</tool_call>\n</function>",
        "<tool_call>" + " " * 65 + "<function=f></function></tool_call>", "<tool_call><function=" + "f" * 257 + "></function>",
        '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>', "<function=f>\n<parameter=a>\n1\n</parameter>\n</function>",
    ],
)  # fmt: skip
def test_what_is_not_a_call_is_content(parser, text):
    assert parse(parser, text) == (text, [])
    assert parse(parser, text + CALL) == (text.rstrip(), [("f", {"a": "x", "n": 5})])


@settings(max_examples=200, deadline=None)
@given(st.data(), st.sampled_from([Qwen3CoderToolParser, Qwen3XMLToolParser]))
def test_a_stream_gives_what_the_whole_text_gives(data, parser):
    text = data.draw(hostile_texts())
    whole = parser(TOOLS, ids()).extract_tool_calls(text)
    made = feed_all(parser(TOOLS, ids()), data.draw(cuts(text)))
    assert join_deltas(made) == whole
    check_pieces([piece for delta in made for piece in delta.tool_calls])
    for call in whole.tool_calls:
        assert json.dumps(json.loads(call.arguments), ensure_ascii=False) == call.arguments
    if not whole.tool_calls:
        assert (whole.content or "") == text


GAP, NAME = r"[ \t\r\n]{0,64}", r"[^<>\n]{1,256}"
FUNCTION = rf"<function=({NAME})>(?={GAP}(?:<parameter={NAME}>|</function>|</tool_call>))"
PARAMETER = re.compile(rf"{GAP}<parameter=({NAME})>")
VALUE_END = re.compile(
    rf"</parameter>(?={GAP}(?:<parameter={NAME}>|</function>|</tool_call>|<tool_call>{GAP}{FUNCTION}))|(?=</function>{GAP}</tool_call>)"
)


def reference(text: str):
    """The documented rules by backtracking expressions on a whole text in which every value is closed."""
    segments, calls, place = [""], [], 0
    while opened := re.compile(rf"<tool_call>(?={GAP}{FUNCTION})").search(text, place):
        segments += [text[place : opened.start()], None]
        place = opened.end()
        while function := re.compile(GAP + FUNCTION).match(text, place):
            arguments, place = {}, function.end()
            while parameter := PARAMETER.match(text, place):
                end = VALUE_END.search(text, parameter.end())
                raw = text[parameter.end() : end.start()].removeprefix("\n").removesuffix("\n")
                arguments.setdefault(parameter[1], raw)
                place = end.end()
            calls.append((function[1], arguments))
            if not (done := re.compile(rf"{GAP}</function>").match(text, place)):
                break
            place = done.end()
        if closed := re.compile(rf"{GAP}</tool_call>").match(text, place):
            place = closed.end()
    segments.append(text[place:])
    if not calls:
        return text, []
    content, blank, after = "", "", False
    for segment in segments:
        if segment is None:
            after, blank = True, blank if content else ""
            continue
        segment = segment.lstrip() if after else segment
        after = after and not segment
        if segment.strip():
            content, blank = content + blank + segment.rstrip(), ""
        blank += segment[len(segment.rstrip()) :]
    return content, calls


@settings(max_examples=200, deadline=None)
@given(hostile_texts(40))
def test_whole_texts_follow_the_rules(text):
    text += CLOSE + "#"  # so that no rule about the output's end applies
    made = Qwen3CoderToolParser(None, ids()).extract_tool_calls(text)
    calls = [(call.name, json.loads(call.arguments)) for call in made.tool_calls]
    assert (made.content or "", calls) == reference(text)


# Values as a tool may declare them, with schemas under which the text that the template writes is unambiguous.
WORDS = st.lists(
    st.sampled_from([*TAGS, "\n", " ", "<", ">", '"', "\\", "é", "🎉", "1", "null"]) | st.text(max_size=6), max_size=6
).map("".join)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
ARGUMENTS = st.one_of(
    st.tuples(st.just({"type": "string"}), WORDS),
    st.tuples(st.just({"type": ["integer", "null"]}), st.none() | st.integers()),
    st.tuples(
        st.just({"anyOf": [{"type": "number"}, {"type": "null"}]}), st.floats(allow_nan=False, allow_infinity=False)
    ),
    st.tuples(st.just({"type": "boolean"}), st.booleans()),
    st.tuples(st.just({"type": "object"}), st.dictionaries(st.text(max_size=6), JSON_VALUES, max_size=3)),
    st.tuples(st.just({"type": "array"}), st.lists(JSON_VALUES, max_size=3)),
    st.tuples(st.just({"enum": ["5", 6, None, True]}), st.sampled_from(["5", 6, None, True])),
)
KEYS = st.text(st.characters(blacklist_characters="<>\n", blacklist_categories=("Cs",)), min_size=1, max_size=8)
PLAIN = st.text(st.characters(blacklist_characters="<", blacklist_categories=("Cs",)), max_size=20).map(str.strip)


def has_an_end(text: str) -> bool:
    """Whether a value holds a sequence that the format cannot quote."""
    ends = r"</parameter>\s*(<parameter=|</function>|</tool_call>|<tool_call>)|</function>\s*</tool_call>"
    return re.search(ends, text) is not None


@settings(max_examples=200, deadline=None)
@given(st.data(), st.sampled_from([Qwen3CoderToolParser, Qwen3XMLToolParser]))
def test_what_the_chat_template_writes_is_read_back(data, parser):
    drawn = data.draw(st.lists(st.tuples(KEYS, st.dictionaries(KEYS, ARGUMENTS, max_size=4)), max_size=3))
    names = [name for name, _ in drawn]
    assume(len(set(names)) == len(names))
    calls = [(name, {key: value for key, (_, value) in arguments.items()}) for name, arguments in drawn]
    assume(not any(has_an_end(v if isinstance(v, str) else json.dumps(v)) for _, call in calls for v in call.values()))
    tools = [
        {"type": "function", "function": {"name": name, "parameters": {"properties": {key: schema for key, (schema, _) in arguments.items()}}}}
        for name, arguments in drawn
    ]  # fmt: skip
    content, reasoning = data.draw(PLAIN), data.draw(PLAIN)
    text = render_turn(content, calls, reasoning)
    made = ChatOutputParser(Qwen3ReasoningParser, parser, tools, True, ids()).parse(text)
    assert ((made.reasoning or ""), (made.content or "")) == (reasoning, content)
    assert made.tool_calls == [
        ToolCall(f"id{i}", name, json.dumps(arguments, ensure_ascii=False)) for i, (name, arguments) in enumerate(calls)
    ]


@BOTH
@pytest.mark.parametrize("kind", ["tool", "parallel"])
def test_the_bundled_tasks_are_read_right(parser, kind):
    for item in tiny_tasks.generate(kind, 50):
        made = parser(item.tools, ids()).extract_tool_calls(item.expected)
        assert made.content is None
        assert item.score_calls(
            [{"name": call.name, "arguments": json.loads(call.arguments)} for call in made.tool_calls]
        )
