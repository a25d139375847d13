"""JSON schemas: refuse what would be passed over in silence, and rewrite what has an equal that is not.

xgrammar leaves out keywords that it does not know, and then the text would not validate. So a keyword that matters is either
honoured or named in an error.
"""

from __future__ import annotations

import json
import re
from typing import Any

DEEPEST = 64
"""Levels of nesting that a schema (or another constraint in JSON) may have."""

_REFUSED = {
    *("not", "if", "then", "else", "dependentRequired", "dependentSchemas", "dependencies"),
    *("contains", "minContains", "maxContains", "unevaluatedItems", "$dynamicRef", "$recursiveRef"),
}
_ALONE = ("$ref", "anyOf", "oneOf", "allOf")
_ONE = ("items", "additionalProperties", "propertyNames", "unevaluatedProperties")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
# What may stand beside a keyword that is read alone: words about a schema, and places where other schemas are kept.
_ANNOTATIONS = {
    *("title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly", "nullable"),
    *("$schema", "$id", "$comment", "$defs", "definitions", "discriminator", "strict", "name"),
}
# A schema without a type that has one of these is meant for that type.
_MEANT_FOR = {
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"), "number"),
    **dict.fromkeys(("minLength", "maxLength", "pattern", "format"), "string"),
    **dict.fromkeys(("items", "prefixItems", "minItems", "maxItems"), "array"),
    **dict.fromkeys(("properties", "required", "additionalProperties", "patternProperties"), "object"),
    **dict.fromkeys(("minProperties", "maxProperties", "propertyNames"), "object"),
}
_TYPES = {
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
    "number": lambda value: isinstance(value, (int, float)) and not isinstance(value, bool),
    "integer": lambda value: isinstance(value, (int, float)) and not isinstance(value, bool) and value == int(value),
}


def parse_json(name: str, text: str) -> Any:
    """The value of a JSON text. Raises ValueError, in one line that begins with `name`."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{name} is not JSON: {error}") from None


def dump_json(name: str, value: Any) -> str:
    """The JSON text of a value. Raises ValueError, in one line that begins with `name`."""
    check_depth(name, value)
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{name} holds half of a surrogate pair") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is not JSON: {error}") from None
    return text


def check_depth(name: str, value: Any) -> None:
    """Raise ValueError for more than DEEPEST levels, which also keeps what walks the value from running out of stack."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > DEEPEST:
            raise ValueError(f"{name} is nested more than {DEEPEST} levels deep")
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += item.values()
            elif isinstance(item, (list, tuple)):
                below += item
        level = [item for item in below if isinstance(item, (dict, list, tuple))]


def prepare_schema(schema: Any, *, lenient: bool = False) -> Any:
    """A schema that means the same to xgrammar as `schema`, which is left as it is, means to a validator.

    Objects have the properties that the schema names and no others, unless it says `additionalProperties`. Of branches of oneOf
    several may be satisfied. Unknown keywords and formats are annotations.

    Args:
        lenient: leave keywords out that cannot be honoured, for whom a text that parses is enough.

    Raises:
        ValueError: a keyword that would be passed over; the message names it.
    """
    dump_json("the JSON schema", schema)
    return _prepare(schema, "#", lenient)


def _prepare(schema: Any, place: str, lenient: bool) -> Any:
    if not isinstance(schema, dict):
        if isinstance(schema, bool):
            return schema
        raise ValueError(f"the JSON schema must have an object at {place}; got {schema!r:.80}")
    schema = dict(schema)
    if lenient:
        _leave_out(schema)
    _share_type(schema)
    _refuse(schema, place)
    _enumerate(schema)
    _infer_type(schema)
    if schema.get("format") is not None and {"minLength", "maxLength", "pattern"} & schema.keys():
        del schema["format"]  # an annotation, by the standard; the others are not
    _declare_required(schema)
    for key in _ONE:
        if key in schema:
            schema[key] = _prepare(schema[key], f"{place}/{key}", lenient)
    for key in _LISTS:
        if key in schema:
            children = _typed(schema, key, list, place)
            schema[key] = [_prepare(child, f"{place}/{key}/{i}", lenient) for i, child in enumerate(children)]
    for key in _MAPS:
        if key in schema:
            children = _typed(schema, key, dict, place)
            schema[key] = {name: _prepare(child, f"{place}/{key}/{name}", lenient) for name, child in children.items()}
    return schema


def _typed(schema: dict[str, Any], key: str, kind: type, place: str) -> Any:
    if not isinstance(schema[key], kind):
        raise ValueError(f"the JSON schema's {key} at {place} must be {'a list' if kind is list else 'an object'}")
    return schema[key]


def _refuse(schema: dict[str, Any], place: str) -> None:
    unsupported = _unsupported(schema)
    if unsupported:
        raise ValueError(f"the JSON schema uses {unsupported[0]} at {place}, which is not supported")
    reference = schema.get("$ref")
    if reference is not None and not (isinstance(reference, str) and (reference == "#" or reference.startswith("#/"))):
        raise ValueError(
            f"the JSON schema's $ref at {place} must point into the schema itself (#/...); got {reference!r:.80}"
        )
    if len(_branches(schema, "allOf")) > 1:
        raise ValueError(f"the JSON schema's allOf at {place} has several schemas; write them as one")
    for key in _ALONE:
        beside = _beside(schema, key)
        if beside:
            raise ValueError(
                f"the JSON schema has {beside[0]} beside {key} at {place}, which is not supported; write it inside"
            )
    if "pattern" in schema and {"minLength", "maxLength"} & schema.keys():
        raise ValueError(f"the JSON schema has pattern and a length at {place}, which is not supported together")


def _leave_out(schema: dict[str, Any]) -> None:
    """Take away what `_refuse` would name."""
    for key in _unsupported(schema):
        del schema[key]
    if len(_branches(schema, "allOf")) > 1:
        del schema["allOf"]
    for key in _ALONE:
        for other in _beside(schema, key):
            del schema[other]
    if "pattern" in schema:
        schema.pop("minLength", None)
        schema.pop("maxLength", None)
    if "enum" in schema or "const" in schema:
        for key in [key for key in schema if key in _MEANT_FOR]:
            del schema[key]


def _unsupported(schema: dict[str, Any]) -> list[str]:
    keys = [key for key in schema if key in _REFUSED and not (schema[key] == {} and key.startswith("depend"))]
    return keys + (["uniqueItems"] if schema.get("uniqueItems") else [])


def _branches(schema: dict[str, Any], key: str) -> list[Any]:
    return schema[key] if isinstance(schema.get(key), list) else []


def _beside(schema: dict[str, Any], key: str) -> list[str]:
    """Keywords that stand beside one that is read alone, and matter."""
    if key not in schema:
        return []
    return [other for other in schema if other != key and other not in _ANNOTATIONS and not other.startswith("x-")]


def _share_type(schema: dict[str, Any]) -> None:
    """A type beside anyOf or oneOf becomes the type of those of its branches that have none."""
    key = next((key for key in ("anyOf", "oneOf") if key in schema), None)
    if key is None or "type" not in schema:
        return
    branches, declared = _branches(schema, key), schema["type"]
    if all(
        isinstance(branch, dict) and "$ref" not in branch and branch.get("type", declared) == declared
        for branch in branches
    ):
        schema[key] = [{"type": declared, **branch} for branch in branches]
        del schema["type"]


def _enumerate(schema: dict[str, Any]) -> None:
    """Values that are listed: only those of the declared type remain, and the type says no more."""
    key = "enum" if isinstance(schema.get("enum"), list) else "const" if "const" in schema else None
    if key is None:
        return
    values = schema["enum"] if key == "enum" else [schema["const"]]
    declared = schema.pop("type", None)
    kinds = [declared] if isinstance(declared, str) else declared
    if isinstance(kinds, list) and all(isinstance(kind, str) and kind in _TYPES for kind in kinds):
        values = [value for value in values if any(_TYPES[kind](value) for kind in kinds)]
    if "enum" in schema and "const" in schema:
        values = [value for value in values if value == schema["const"]]
    if not values:
        raise ValueError(f"the JSON schema's {key} holds no value that the rest of the schema allows")
    for other in [other for other in schema if other in _MEANT_FOR or other == "const"]:
        if other != "const" and other != "format":
            raise ValueError(
                f"the JSON schema has {other} beside {key}, which is not supported; list the values that fit"
            )
        del schema[other]
    schema["enum"] = values


def _infer_type(schema: dict[str, Any]) -> None:
    if {"type", "enum", "$ref", "anyOf", "oneOf", "allOf"} & schema.keys():
        return
    meant = {_MEANT_FOR[key] for key in schema if key in _MEANT_FOR}
    if len(meant) == 1:
        schema["type"] = meant.pop()


def _declare_required(schema: dict[str, Any]) -> None:
    """A required property that is not described may have any value."""
    required = schema.get("required")
    if not isinstance(required, list) or not isinstance(schema.get("properties", {}), dict):
        return
    others = schema.get("additionalProperties")
    missing = [name for name in required if isinstance(name, str) and name not in schema.get("properties", {})]
    if missing and (others is False or schema.get("patternProperties")):
        raise ValueError(f"the JSON schema requires {missing[0]!r:.80}, which its properties do not have")
    if missing:
        anything = others if isinstance(others, dict) else {}
        schema["properties"] = {**schema.get("properties", {}), **dict.fromkeys(missing, anything)}


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_LOCATION = re.compile(r"^\[[^\]]*\]\s*\S+:\d+:\s*|Check failed: \(.*?\) is false: ?")


def one_line(error: BaseException) -> str:
    """A compiler's message without its source line and the copy of the input that some have."""
    text = _LOCATION.sub("", _LOCATION.sub("", str(error).strip()))
    return " ".join(text.split())[:300] or type(error).__name__
