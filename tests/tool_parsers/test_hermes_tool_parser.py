"""`hermes`: calls as JSON objects."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tool_parsers.streams import JSON_CALL, SCRAPS, TAGS, TOOLS, check_pieces, cuts, feed_all, hostile_texts, ids
from vllm.tool_parsers.calls import join_deltas
from vllm.tool_parsers.hermes_tool_parser import Hermes2ProToolParser

F = ("f", {"a": "x", "n": 5})


def parse(text):
    """(content, [(name, arguments)]) of the whole text, after every cut in two and the cut into characters gave the same."""
    whole = Hermes2ProToolParser(TOOLS, ids()).extract_tool_calls(text)
    for deltas in [list(text), *([text[:place], text[place:]] for place in range(len(text) + 1))]:
        made = feed_all(Hermes2ProToolParser(TOOLS, ids()), deltas)
        assert join_deltas(made) == whole
        check_pieces([piece for delta in made for piece in delta.tool_calls])
    return whole.content, [(call.name, json.loads(call.arguments)) for call in whole.tool_calls]


def test_calls_and_the_content_around_them():
    assert parse(JSON_CALL) == (None, [F])
    assert parse(f"Look:\n\n{JSON_CALL}\n{JSON_CALL}\n") == ("Look:", [F, F])
    assert parse(f"one\n{JSON_CALL}\n\ntwo {JSON_CALL}three") == ("one\ntwo three", [F, F])
    assert parse(" No call. ") == (" No call. ", [])


@pytest.mark.parametrize(
    ("body", "call"),
    [
        ('{"name": "f"}', ("f", {})),
        ('{"name": "f", "arguments": null}', ("f", {})),
        ('{"arguments": {}, "name": "f"}', ("f", {})),
        ('{"name": "f", "arguments": "{\\"a\\": 1}"}', ("f", {"a": 1})),
        ('{"name":"f","arguments":{"a":"</tool_call> {[ \\\\ \\" ]"}}', ("f", {"a": '</tool_call> {[ \\ " ]'})),
        ('{"name": "f", "arguments": {"a": "one\ntwo"}}', ("f", {"a": "one\ntwo"})),
        ('{"name": "f", "arguments": {"a": "\\u00e9 \\ud83c\\udf89 \\ud800"}}', ("f", {"a": "é 🎉 \ufffd"})),
        ('{\n  "name": "f",\n  "arguments": {\n    "a": [1, {"b": null}]\n  }\n}', ("f", {"a": [1, {"b": None}]})),
    ],
)
def test_objects(body, call):
    assert parse(f"<tool_call>\n{body}\n</tool_call>") == (None, [call])
    assert parse(f"<tool_call>{body}</tool_call>{JSON_CALL}") == (None, [call, F])
    assert parse(f"<tool_call>\n{body}") == (None, [call])
    assert parse(f"<tool_call>\n{body}\nDone.") == ("Done.", [call])


@pytest.mark.parametrize(
    "body",
    [
        '{"name": "f", "arguments": {}',
        '{"name": "f", "arguments": []}',
        '{"name": "f", "arguments": "x"}',
        '{"name": 5, "arguments": {}}',
        '{"name": ""}',
        '{"arguments": {}}',
        '{"name": "f", "arguments": {"a": NaN}}',
        '{"name": "f", "arguments": {"a": 1e999}}',
        "{'name': 'f'}",
        '{"name": "f, "arguments": {}}',
        "{}",
        "{]",
        '{"name": "f", "arguments": {"a": ' + "[" * 2000 + "]" * 2000 + "}}",
        '{"name": "f", "arguments": {"a": ' + "9" * 5000 + "}}",
        "no object",
    ],
    ids=lambda body: body[:40],
)
def test_what_is_not_a_call_is_content(body):
    text = f"<tool_call>\n{body}\n</tool_call>"
    if len(text) < 1000:
        assert parse(text) == (text, [])
        assert parse(f"{text}\n{JSON_CALL}") == (text, [F])
    whole = Hermes2ProToolParser().extract_tool_calls(text)
    assert (whole.content, whole.tool_calls) == (text, [])


def test_an_output_that_ends_inside_a_call():
    for end in range(len(JSON_CALL)):
        complete = end > JSON_CALL.rindex("}")
        assert parse("Hi\n" + JSON_CALL[:end]) == (("Hi", [F]) if complete else ("Hi\n" + JSON_CALL[:end], []))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_stream_gives_what_the_whole_text_gives(data):
    text = data.draw(hostile_texts())
    whole = Hermes2ProToolParser(TOOLS, ids()).extract_tool_calls(text)
    made = feed_all(Hermes2ProToolParser(TOOLS, ids()), data.draw(cuts(text)))
    assert join_deltas(made) == whole
    check_pieces([piece for delta in made for piece in delta.tool_calls])
    for call in whole.tool_calls:
        assert json.dumps(json.loads(call.arguments), ensure_ascii=False) == call.arguments
    if not whole.tool_calls:
        assert (whole.content or "") == text


STRINGS = st.lists(st.sampled_from([*TAGS, *SCRAPS]) | st.text(max_size=6), max_size=6).map("".join)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | STRINGS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(STRINGS, inner, max_size=3),
    max_leaves=8,
)
CALLS = st.tuples(STRINGS.filter(bool), st.dictionaries(STRINGS, VALUES, max_size=4))


@settings(max_examples=200, deadline=None)
@given(st.data(), st.lists(CALLS, max_size=3), st.booleans(), st.sampled_from([None, 2]))
def test_what_json_writes_is_read_back(data, calls, ascii_only, indent):
    blocks = [
        json.dumps({"name": name, "arguments": arguments}, ensure_ascii=ascii_only, indent=indent)
        for name, arguments in calls
    ]
    content = data.draw(
        st.text(st.characters(blacklist_characters="<", blacklist_categories=("Cs",)), max_size=10).map(str.strip)
    )
    text = "\n".join([content, *(f"<tool_call>\n{block}\n</tool_call>" for block in blocks)])
    made = join_deltas(feed_all(Hermes2ProToolParser(), data.draw(cuts(text))))
    if calls:
        assert (made.content or "") == content
    assert [(call.name, call.arguments) for call in made.tool_calls] == [
        (name, json.dumps(arguments, ensure_ascii=False)) for name, arguments in calls
    ]
