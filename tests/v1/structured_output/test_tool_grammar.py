"""Whatever is generated under a tool constraint is read by the parser as calls whose arguments fit the tools' schemas."""

import json
import random

import jsonschema
import pytest

from tests.v1.structured_output.vocabularies import grammars as make_grammars
from tests.v1.structured_output.vocabularies import random_text
from vllm.tool_parsers import ToolParserManager
from vllm.v1.structured_output.tool_grammar import tool_call_constraint

EVERYTHING = {
    "type": "object",
    "properties": {
        "text": {"type": "string", "maxLength": 5},
        "count": {"type": "integer"},
        "share": {"type": "number"},
        "yes": {"type": "boolean"},
        "unit": {"enum": ["degrees C", "F", "a</parameter>"]},
        "level": {"enum": [1, 2, None]},
        "only": {"const": "x"},
        "where": {
            "type": "object",
            "properties": {"k": {"type": "string"}, "n": {"type": "integer"}},
            "required": ["k"],
        },
        "list": {"type": "array", "items": {"type": "integer"}},
        "maybe": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        "any text": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "tree": {"$ref": "#/$defs/T"},
        "set": {"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": True},
        "undescribed": {},
    },
    "required": ["text", "count", "where"],
    "$defs": {"T": {"type": "object", "properties": {"c": {"type": "array", "items": {"$ref": "#/$defs/T"}}}}},
}
FULL = {"type": "function", "function": {"name": "everything", "parameters": EVERYTHING}}
PLAIN = {"type": "function", "function": {"name": "get.time-now", "description": "no parameters"}}
FORMATS = ("qwen3_coder", "qwen3_xml", "hermes")
NAMED = {"type": "function", "function": {"name": "get.time-now"}}

# What the random texts are checked against: the schema without what a call of this form does not promise.
PROMISED = json.loads(json.dumps(EVERYTHING))
del PROMISED["properties"]["text"]["maxLength"], PROMISED["properties"]["set"]["uniqueItems"]


@pytest.fixture(scope="module")
def grammars():
    return make_grammars()


def parsed(name: str, text: str):
    return ToolParserManager.get_tool_parser(name)([FULL, PLAIN]).extract_tool_calls(text)


def fits(grammars, params, text: str) -> bool:
    constraint = grammars.constraint(params)
    return all(constraint.accept(byte) for byte in text.encode()) and constraint._matcher.is_completed()


def written(format_name: str, name: str, arguments: dict) -> str:
    if format_name == "hermes":
        return "<tool_call>\n" + json.dumps({"name": name, "arguments": arguments}) + "\n</tool_call>"
    lines = [
        f"<parameter={key}>\n{value if isinstance(value, str) else json.dumps(value)}\n</parameter>\n"
        for key, value in arguments.items()
    ]
    return f"<tool_call>\n<function={name}>\n{''.join(lines)}</function>\n</tool_call>"


@pytest.mark.parametrize("format_name", FORMATS)
def test_whatever_is_generated_is_calls(grammars, format_name):
    params = tool_call_constraint([FULL, PLAIN], "required", format_name)
    num_ended, names, most = 0, set(), 0
    for seed in range(60):
        text = random_text(grammars, params, random.Random(seed), longest=1500)
        if text is None:
            continue
        num_ended += 1
        result = parsed(format_name, text)
        assert result.content is None and result.tool_calls, text
        most = max(most, len(result.tool_calls))
        for call in result.tool_calls:
            names.add(call.name)
            schema = PROMISED if call.name == "everything" else {"type": "object", "maxProperties": 0}
            jsonschema.Draft202012Validator(schema).validate(json.loads(call.arguments))
    assert num_ended >= 15 and names == {"everything", "get.time-now"} and most > 1


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_named_function_is_called_once(grammars, format_name):
    params = tool_call_constraint([FULL, PLAIN], NAMED, format_name)
    one = written(format_name, "get.time-now", {})
    assert fits(grammars, params, one)
    assert not fits(grammars, params, f"{one}\n{one}")
    assert not fits(grammars, params, written(format_name, "everything", {"text": "", "count": 1, "where": {"k": ""}}))
    for seed in range(10):
        [call] = parsed(format_name, random_text(grammars, params, random.Random(seed))).tool_calls
        assert (call.name, call.arguments) == ("get.time-now", "{}")


@pytest.mark.parametrize("format_name", FORMATS)
def test_the_form_that_the_template_writes_fits(grammars, format_name):
    arguments = {
        "text": "a\nb </function> <b>\n",
        "count": -3,
        "where": {"k": "é <b>", "n": 5},
        "list": [1, 2],
        "maybe": None,
    }
    if format_name == "hermes":
        arguments["text"] = "a b"
    params = tool_call_constraint([FULL, PLAIN], "required", format_name)
    text = written(format_name, "everything", arguments)
    assert fits(grammars, params, text)
    assert json.loads(parsed(format_name, text).tool_calls[0].arguments) == arguments
    two = f"{text}\n{written(format_name, 'get.time-now', {})}"
    assert fits(grammars, params, two)
    assert not fits(grammars, tool_call_constraint([FULL, PLAIN], "required", format_name, parallel=False), two)
    for other in ("hello", f"hello {text}", f"{text} bye", written(format_name, "nothing", {})):
        assert not fits(grammars, params, other)
    for missing in ("text", "count", "where"):
        fewer = {key: value for key, value in arguments.items() if key != missing}
        assert not fits(grammars, params, written(format_name, "everything", fewer))
    assert not fits(grammars, params, written(format_name, "everything", {**arguments, "count": 1.5}))


def test_auto_and_none_constrain_nothing():
    for choice in (None, "auto", "none"):
        assert tool_call_constraint([FULL], choice, "hermes") is None


def test_thinking_comes_first():
    params = tool_call_constraint([FULL], "required", "qwen3_coder", begin_after="</think>")
    assert (params.begin_after, params.begin_at) == ("</think>", "<tool_call>")
    assert tool_call_constraint([FULL], "required", "qwen3_coder").begin_at is None


@pytest.mark.parametrize(
    ("tools", "choice", "format_name", "words"),
    [
        ([FULL], "required", "pythonic", "pythonic"),
        ([FULL], NAMED, "hermes", "not among tools"),
        ([], "required", "hermes", "needs tools"),
        ([FULL], "sometimes", "hermes", "sometimes"),
        ([FULL], {"type": "function"}, "hermes", "name a function"),
        ([{"type": "function", "function": {"name": "a>b"}}], "required", "qwen3_coder", "cannot be written"),
        (
            [{"function": {"name": "f", "parameters": {"properties": {"a\nb": {}}}}}],
            "required",
            "qwen3_xml",
            "cannot be written",
        ),
        (
            [{"function": {"name": "f", "parameters": {"properties": {"a": [[]]}, "x": float("nan")}}}],
            "required",
            "qwen3_xml",
            "JSON",
        ),
        ([{"no": "name"}], "required", "hermes", "with names"),
    ],
)
def test_what_cannot_be_is_one_line(tools, choice, format_name, words):
    with pytest.raises(ValueError, match=words) as error:
        tool_call_constraint(tools, choice, format_name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize(
    "parameters",
    [
        None,
        {},
        {"type": "object"},
        {"type": "object", "properties": {"a": {"type": "integer", "minimum": 10**30}}, "required": ["a", "b"]},
        {"type": "object", "properties": {"a": {"$ref": "#/properties/b"}, "b": {"type": "array", "items": {"$ref": "#/properties/a"}}}},
        {"type": "object", "properties": {"a": {"enum": ["", "</tool_call>"]}, "b": {"type": "array", "contains": {}}}},
        {"type": "object", "properties": {"a": {"allOf": [{"type": "object"}, {"required": ["x"]}]}}, "required": ["a"]},
        {"$ref": "#/$defs/p", "$defs": {"p": {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}}},
    ],
)  # fmt: skip
def test_odd_parameters_still_make_calls_or_one_line(grammars, format_name, parameters):
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    try:
        params = tool_call_constraint(tools, "required", format_name, parallel=False)
        grammars.constraint(params)
    except ValueError as error:
        assert "\n" not in str(error) and "minimum" in json.dumps(parameters)
        return
    texts = [random_text(grammars, params, random.Random(seed), longest=600) for seed in range(20)]
    assert any(texts)
    for text in filter(None, texts):
        parser = ToolParserManager.get_tool_parser(format_name)(tools)
        assert [call.name for call in parser.extract_tool_calls(text).tool_calls] == ["f"], text
