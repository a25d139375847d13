"""Every schema that is accepted holds: what is generated under it validates. The others are refused by name."""

import copy
import json
import random

import jsonschema
import pytest

from tests.v1.structured_output.vocabularies import grammars as make_grammars
from tests.v1.structured_output.vocabularies import random_text
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.structured_output.schema import DEEPEST, prepare_schema
from vllm.v1.structured_output.spec import LONGEST, spec_of

PAIR = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}
TREE = {
    "$defs": {
        "n": {
            "type": "object",
            "properties": {"c": {"type": "array", "items": {"$ref": "#/$defs/n"}}},
            "required": ["c"],
        }
    },
    "$ref": "#/$defs/n",
}

HONOURED = {
    "minimum": {"type": "integer", "minimum": 5, "exclusiveMaximum": 900},
    "number range": {"type": "number", "minimum": 1.25, "maximum": 5.5},
    "multiple": {"type": "integer", "multipleOf": 7},
    "meant for a number": {"minimum": 3},
    "meant for a string": {"minLength": 2, "maxLength": 4},
    "pattern": {"type": "string", "pattern": "^[a-c]{2,3}$"},
    "pattern of anything": {"type": "string", "pattern": "^.{3}$"},
    "pattern of all but": {"type": "string", "pattern": "[^a-z]+"},
    "length": {"type": "string", "minLength": 2, "maxLength": 3},
    "date": {"type": "string", "format": "date"},
    "format and length": {"type": "string", "format": "email", "maxLength": 5},
    "unknown format": {"type": "string", "format": "foo"},
    "enumeration": {"type": "integer", "enum": [1, "a", 2.0, True, 3.5]},
    "mixed enumeration": {"enum": [1, "x\n\"é", None, {"k": [1]}]},
    "constant": {"const": {"a": [1, None]}},
    "constant of a type": {"type": "string", "const": "x"},
    "types": {"type": ["integer", "null"]},
    "items": {"type": "array", "items": {"enum": [1, 2]}, "minItems": 2, "maxItems": 3},
    "prefix items": {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "boolean"}], "items": False},
    "object": {**PAIR, "required": ["b"]},
    "no properties": {"type": "object"},
    "least properties": {**PAIR, "minProperties": 1},
    "most properties": {**PAIR, "maxProperties": 1},
    "other properties": {**PAIR, "additionalProperties": {"type": "boolean"}},
    "required, not described": {**PAIR, "required": ["zz"]},
    "property names": {"type": "object", "properties": {'a"b/c': {"enum": [1]}, "é": {"enum": [2]}}, "required": ['a"b/c', "é"]},
    "pattern properties": {"type": "object", "patternProperties": {"^a[0-9]$": {"type": "integer"}}, "additionalProperties": False},
    "any of": {"anyOf": [{"type": "integer"}, {"type": "boolean"}]},
    "any of, with a type": {"type": "integer", "anyOf": [{"minimum": 5}, {"maximum": 1}]},
    "one of": {"oneOf": [{"type": "object", "properties": {"k": {"const": k}}, "required": ["k"]} for k in ("x", "y")]},
    "one of allOf": {"description": "as pydantic writes it", "allOf": [{"$ref": "#/$defs/i"}], "$defs": {"i": {"type": "integer"}}},
    "reference": {"type": "object", "properties": {"q": {"type": "integer"}, "r": {"$ref": "#/properties/q"}}, "required": ["r"]},
    "tree": TREE,
    "anything": {},
    "numbers": {"type": "array", "items": {"type": "number"}, "minItems": 3},
}  # fmt: skip

REFUSED = {
    "uniqueItems": {"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": True},
    "contains": {"type": "array", "contains": {"const": 3}},
    "not": {"type": "integer", "not": {"const": 0}},
    "if": {**PAIR, "if": {"required": ["a"]}, "then": {"required": ["b"]}},
    "dependentRequired": {**PAIR, "dependentRequired": {"a": ["b"]}},
    "dependentSchemas": {**PAIR, "dependentSchemas": {"a": {"required": ["b"]}}},
    "allOf": {"allOf": [{"minimum": 5}, {"maximum": 7}]},
    "beside anyOf": {**PAIR, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
    "beside $ref": {"$ref": "#/$defs/i", "minimum": 3, "$defs": {"i": {"type": "integer"}}},
    "minimum beside enum": {"enum": [1, 2], "minimum": 2},
    "pattern and a length": {"type": "string", "pattern": "a+", "maxLength": 3},
    "#/...": {"$ref": "http://example.org/schema"},
    "requires 'zz'": {**PAIR, "required": ["zz"], "additionalProperties": False},
    "holds no value": {"type": "integer", "enum": ["a"]},
    "$dynamicRef": {"properties": {"x": {"$dynamicRef": "#a"}}},
    "must have an object": {"properties": {"x": 5}},
    "anyOf at #/properties/x must be a list": {"properties": {"x": {"anyOf": {"type": "null"}}}},
    "properties at # must be an object": {"properties": [1]},
}


@pytest.fixture(scope="module")
def grammars():
    return make_grammars()


@pytest.mark.parametrize("name", HONOURED)
def test_what_is_generated_validates(grammars, name):
    schema = HONOURED[name]
    before = copy.deepcopy(schema)
    params = StructuredOutputsParams(json=schema)
    texts = [random_text(grammars, params, random.Random(seed)) for seed in range(40)]
    assert sum(text is not None for text in texts) >= 20
    for text in texts:
        if text is not None:
            value = json.loads(text)
            jsonschema.Draft202012Validator(schema).validate(value)
            json.dumps(value, allow_nan=False)
    assert schema == before


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_not_be_honoured_is_refused(name):
    with pytest.raises(ValueError) as error:
        spec_of(StructuredOutputsParams(json=REFUSED[name]))
    assert name in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 300
    json.dumps(prepare_schema(REFUSED[name], lenient=True)) if name in ("uniqueItems", "not", "allOf", "if") else None


def test_a_schema_is_the_same_as_text_and_as_dictionary():
    assert spec_of(StructuredOutputsParams(json=PAIR)) == spec_of(
        StructuredOutputsParams(json=json.dumps(PAIR, indent=3))
    )
    assert spec_of(StructuredOutputsParams(json=PAIR)).digest != spec_of(StructuredOutputsParams(json=TREE)).digest


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"json": "{"}, "is not JSON"),
        ({"json": '{"minimum": NaN}'}, "NaN"),
        ({"json": '{"a":' * 50000 + "1" + "}" * 50000}, "characters"),
        ({"json": '{"a":' * 5000 + "1" + "}" * 5000}, "deep"),
        ({"json": '{"items":' * DEEPEST + "{}" + "}" * DEEPEST}, "levels"),
        ({"json": {"enum": [float("inf")]}}, "not JSON"),
        ({"json": {"enum": ["\ud800"]}}, "surrogate"),
        ({"json": {"enum": ["x" * LONGEST]}}, "characters"),
        ({"json": "5"}, "must have an object"),
        ({"choice": ["\udfff"]}, "surrogate"),
        ({"regex": "a\0b"}, "NUL"),
        ({"regex": "a" * (LONGEST + 1)}, "characters"),
        ({"structural_tag": {"type": "structural_tag"}}, "format"),
        ({"structural_tag": {"structures": [{"begin": "x"}], "triggers": []}}, "structures"),
    ],
)
def test_what_cannot_be_is_one_line(params, words):
    with pytest.raises(ValueError, match=words) as error:
        spec_of(StructuredOutputsParams(**params))
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"regex": "a", "choice": ["b"]},
        {"json_object": False},
        {"json": False},
        {"json": 5},
        {"regex": 5},
        {"choice": []},
        {"choice": [""]},
        {"choice": "ab"},
        {"choice": [1]},
        {"grammar": ["root"]},
        {"json_object": 1},
        {"structural_tag": 1},
        {"regex": "a", "begin_after": ""},
    ],
)
def test_exactly_one_constraint_of_the_right_kind(params):
    with pytest.raises(ValueError) as error:
        StructuredOutputsParams(**params)
    assert str(error.value).startswith("structured_outputs") and "\n" not in str(error.value)
