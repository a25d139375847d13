"""From a parameter's text to a JSON value."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm.tool_parsers.coercion import FunctionSchema, dump, read_tools

INTEGER, NUMBER, STRING = {"type": "integer"}, {"type": "number"}, {"type": "string"}
BOOLEAN, OBJECT, ARRAY = {"type": "boolean"}, {"type": "object"}, {"type": "array"}
NULLABLE = {"type": ["string", "null"]}
EITHER = {"anyOf": [INTEGER, STRING]}


def coerce(schema, text, **root):
    return json.loads(FunctionSchema({"properties": {"p": schema}, **root}).to_json("p", text))


@pytest.mark.parametrize(
    ("schema", "text", "expected"),
    [
        (STRING, "5", "5"), (STRING, "null", "null"), (STRING, "true", "true"), (STRING, '{"a": 1}', '{"a": 1}'), (STRING, "", ""),
        (INTEGER, "5", 5), (INTEGER, " -5\n", -5), (INTEGER, "+5", 5), (INTEGER, "5.0", 5), (INTEGER, "5.", 5), (INTEGER, "0005", 5),
        (INTEGER, "5.5", "5.5"), (INTEGER, "five", "five"), (INTEGER, "1_000", "1_000"), (INTEGER, "٥", "٥"), (INTEGER, "", ""),
        (INTEGER, "True", "True"), (INTEGER, "null", "null"), (INTEGER, "1e3", "1e3"), (INTEGER, "9" * 4301, "9" * 4301),
        (INTEGER, "9" * 40, int("9" * 40)), (INTEGER, "0x10", "0x10"),
        (NUMBER, "5", 5), (NUMBER, "5.50", 5.5), (NUMBER, "-.5", -0.5), (NUMBER, "1e-07", 1e-07), (NUMBER, "1E+16", 1e16),
        (NUMBER, "nan", "nan"), (NUMBER, "Infinity", "Infinity"), (NUMBER, "1e999", "1e999"), (NUMBER, ".", "."),
        (BOOLEAN, "true", True), (BOOLEAN, "False", False), (BOOLEAN, " TRUE ", True), (BOOLEAN, "1", "1"), (BOOLEAN, "yes", "yes"),
        ({"type": "null"}, "None", None), ({"type": "null"}, "x", "x"), (NULLABLE, "null", None), (NULLABLE, "nul", "nul"),
        (OBJECT, '{"a": [1, null]}', {"a": [1, None]}), (OBJECT, "{}", {}), (OBJECT, "[]", "[]"), (OBJECT, "{", "{"), (OBJECT, "5", "5"),
        (OBJECT, "{'a': True, \"b\": None, 'c': 'it\\'s \"x\" True'}", {"a": True, "b": None, "c": 'it\'s "x" True'}),
        (OBJECT, '{"a": NaN}', '{"a": NaN}'), (OBJECT, '{"a": 1e999}', '{"a": 1e999}'), (OBJECT, '{"a": "x\ny"}', {"a": "x\ny"}),
        (OBJECT, '{"a": "\\ud800"}', {"a": "\ufffd"}),
        (ARRAY, '\n["a", 1]\n', ["a", 1]), (ARRAY, "['a', False]", ["a", False]), (ARRAY, "a, b", "a, b"), (ARRAY, "{}", "{}"),
        (ARRAY, "[" * 100_000 + "]" * 100_000, "[" * 100_000 + "]" * 100_000), (ARRAY, "['a\\", "['a\\"), (ARRAY, "(1, 2)", "(1, 2)"),
        (EITHER, "5", 5), (EITHER, "x", "x"), ({"oneOf": [OBJECT, ARRAY]}, "[1]", [1]), ({"allOf": [INTEGER]}, "5", 5),
        ({"anyOf": [{"anyOf": [NUMBER]}, {"type": "null"}]}, "None", None),
        ({"enum": ["a", "b"]}, "a", "a"), ({"enum": [1, 2]}, "2", 2), ({"enum": ["1", 2]}, "1", "1"), ({"enum": ["1", 2]}, "2", 2),
        ({"enum": [True, None]}, "None", None), ({"const": 5}, "5", 5), ({"type": ["integer", "string"], "enum": ["5"]}, "5", "5"),
        ({}, "5", "5"), (True, "5", "5"), (None, "5", "5"), ({"type": "decimal"}, "5", "5"), ({"type": 5}, "5", "5"),
        ({"anyOf": None, "enum": 3, "type": [None]}, "5", "5"),
    ],
    ids=lambda value: repr(value)[:30],
)  # fmt: skip
def test_values(schema, text, expected):
    value = coerce(schema, text)
    assert value == expected and type(value) is type(expected)


def test_references_inside_the_schema():
    node = {"anyOf": [{"$ref": "#/$defs/N"}, {"$ref": "#/$defs/N"}, INTEGER]}
    assert coerce({"$ref": "#/$defs/N"}, "5", **{"$defs": {"N": node}}) == 5
    for reference in ["#/$defs/M", "#/", "https://example.org/x", 5]:
        assert coerce({"$ref": reference}, "5", **{"$defs": {"N": node}}) == "5"


def test_text_that_may_be_sent_early():
    schema = FunctionSchema({"properties": {"s": STRING, "e": {"enum": ["a"]}, "n": NULLABLE, "i": INTEGER}})
    assert [schema.is_text(name) for name in ("s", "e", "n", "i", "unknown")] == [True, True, False, False, True]


def test_tools_of_both_spellings():
    tools = [
        {"type": "function", "function": {"name": "f"}},
        {"type": "function", "name": "g", "parameters": {}},
        {"type": "x"},
    ]
    assert list(read_tools(tools)) == ["f", "g"] and read_tools(None) == {}


def test_python_spelling_takes_linear_time():
    start = time.process_time()
    for text in [
        "'" * 200_001,
        "'" + "\\'" * 100_000,
        "'" + "\\'" * 100_000 + "\\",
        '"' + '\\"' * 100_000 + "\\",
        "True" * 50_000,
    ]:
        assert coerce(ARRAY, f"[{text}") == f"[{text}"
    assert time.process_time() - start < 2


SCHEMAS = st.recursive(
    st.fixed_dictionaries(
        {}, optional={"type": st.sampled_from(["string", "integer", "null", "boolean", "number", "object", "array", 3])}
    ),
    lambda inner: st.fixed_dictionaries({"anyOf": st.lists(inner, max_size=3)}),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None)
@given(SCHEMAS, st.text() | st.from_regex(r"[\[\]{}'\"\\:,0-9.eE+\-TrueFalsNo ]{0,30}", fullmatch=True))
def test_nothing_raises_and_everything_is_json(schema, text):
    value = coerce(schema, text)
    assert isinstance(dump(value), str)
    if isinstance(value, str):
        assert value == text


@settings(max_examples=200, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(st.characters(blacklist_categories=("Cs", "Cc", "Cf", "Zl", "Zp", "Co", "Cn", "Zs"))),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc'\"\\", max_size=4), inner, max_size=3)))  # fmt: skip
def test_what_python_prints_is_read_back(value):
    assert coerce(ARRAY, repr([value])) == [value]
