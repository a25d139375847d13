"""From the text of a parameter to a JSON value, guided by the tool's schema.

Text that does not have the form of a declared type stays a string: a wrong value is the tool's to refuse, not the parser's to
lose. Where several types are allowed the narrowest that fits wins, strings last; a text that the schema's `enum` lists as a
string is that string. Nothing in here raises, whatever the text or the schema.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

_MISSING = object()
_INTEGER = re.compile(r"[+-]?[0-9]+")
_WHOLE = re.compile(r"([+-]?[0-9]+)\.0*")
_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
_SURROGATE = re.compile("[\ud800-\udfff]")
# Strings run to the end of the text if nothing closes them: each character is looked at once.
_PYTHON = re.compile(r"""('(?:[^'\\]|\\.)*(?:'|\\?\Z))|"(?:[^"\\]|\\.)*(?:"|\\?\Z)|\b(True|False|None)\b""", re.DOTALL)
_QUOTE = re.compile(r"\\(.)|\"", re.DOTALL)
_JSON_NAMES = {"True": "true", "False": "false", "None": "null"}


class FunctionSchema:
    """The parameters of one tool, as far as coercion needs them."""

    def __init__(self, parameters: Any) -> None:
        self._root = parameters if isinstance(parameters, Mapping) else {}
        properties = self._root.get("properties")
        self._properties = properties if isinstance(properties, Mapping) else {}
        self._allowed: dict[str, tuple[set[str], set[str]]] = {}

    def is_text(self, name: str) -> bool:
        """Whether the parameter's value is its text whatever it says: declared as a string and nothing else, or not declared."""
        return self._types(name)[0].isdisjoint(_CONVERSIONS)

    def to_json(self, name: str, text: str) -> str:
        """The value of parameter `name` as JSON text."""
        types, words = self._types(name)
        if text not in words:
            for kind, convert in _CONVERSIONS.items():
                if kind in types and (value := convert(text)) is not _MISSING:
                    try:
                        return dump(value)
                    except (ValueError, RecursionError):
                        continue
        return dump(text)

    def _types(self, name: str) -> tuple[set[str], set[str]]:
        """The types that the parameter's schema allows and the strings that it lists."""
        if name not in self._allowed:
            self._allowed[name] = self._collect(self._properties.get(name))
        return self._allowed[name]

    def _collect(self, schema: Any) -> tuple[set[str], set[str]]:
        types: set[str] = set()
        words: set[str] = set()
        seen: set[int] = set()  # schemas may refer to themselves
        pending = [schema]
        while pending:
            schema = pending.pop()
            if not isinstance(schema, Mapping) or id(schema) in seen:
                continue
            seen.add(id(schema))
            declared = schema.get("type")
            kinds = declared if isinstance(declared, list) else [declared]
            types.update(kind for kind in kinds if isinstance(kind, str))
            listed = [*_branches(schema, "enum"), *([schema["const"]] if "const" in schema else ())]
            words.update(value for value in listed if isinstance(value, str))
            if declared is None:
                types.update(_type_of(value) for value in listed)
            for key in ("anyOf", "oneOf", "allOf"):
                pending += _branches(schema, key)
            pending.append(self._resolve(schema.get("$ref")))
        return types, words

    def _resolve(self, reference: Any) -> Any:
        """What a reference inside the tool's own schema points to; None for any other."""
        if not isinstance(reference, str) or not reference.startswith("#/"):
            return None
        target: Any = self._root
        for step in reference[2:].split("/"):
            target = target.get(step) if isinstance(target, Mapping) else None
        return target


def _branches(schema: Mapping, key: str) -> list:
    found = schema.get(key)
    return found if isinstance(found, list) else []


def read_tools(tools: list[dict] | None) -> dict[str, FunctionSchema]:
    """Function name -> schema, from OpenAI tool definitions. Anything that is not one is passed over."""
    schemas = {}
    for tool in tools or ():
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if isinstance(function, Mapping) and isinstance(function.get("name"), str):
            schemas[function["name"]] = FunctionSchema(function.get("parameters"))
    return schemas


def dump(value: Any) -> str:
    """JSON text that can be sent. Raises ValueError for NaN and infinities."""
    return sendable(_ENCODER.encode(value))


def sendable(text: str) -> str:
    """The text with half surrogate pairs, which JSON escapes can spell and UTF-8 cannot, replaced."""
    return _SURROGATE.sub("\ufffd", text)


def load(text: str) -> Any:
    """The JSON value of `text`; raw control characters inside strings pass. Raises ValueError or RecursionError."""
    return _DECODER.decode(text)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)
_DECODER = json.JSONDecoder(strict=False, parse_constant=_refuse_constant)


def _type_of(value: Any) -> str:
    if value is None:
        return "null"
    for kind, name in ((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string"), (list, "array")):
        if isinstance(value, kind):
            return name
    return "object"


def _null(text: str) -> Any:
    return None if text.strip() in ("null", "None") else _MISSING


def _boolean(text: str) -> Any:
    return {"true": True, "false": False}.get(text.strip().lower(), _MISSING)


def _integer(text: str) -> Any:
    text = text.strip()
    whole = _WHOLE.fullmatch(text)
    text = whole[1] if whole else text
    return _parse(int, text) if _INTEGER.fullmatch(text) else _MISSING


def _number(text: str) -> Any:
    text = text.strip()
    if _INTEGER.fullmatch(text):
        return _parse(int, text)
    return _parse(float, text) if _NUMBER.fullmatch(text) else _MISSING


def _parse(convert: Callable[[str], Any], text: str) -> Any:
    try:
        return convert(text)
    except ValueError:  # Python refuses integers of more than 4300 digits
        return _MISSING


def _composite(kind: type) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        for spelling in (lambda: text, lambda: _PYTHON.sub(_as_json, text)):
            try:
                value = load(spelling())
            except (ValueError, RecursionError):
                continue
            if isinstance(value, kind):
                return value
        return _MISSING

    return convert


def _as_json(match: re.Match) -> str:
    """One token of a Python literal in JSON's spelling."""
    if match[1]:
        inner = _QUOTE.sub(lambda quote: {'"': '\\"', "\\'": "'"}.get(quote[0], quote[0]), match[1][1:-1])
        return f'"{inner}"'
    return _JSON_NAMES.get(match[0], match[0])


# In the order in which they are tried.
_CONVERSIONS: dict[str, Callable[[str], Any]] = {
    "null": _null,
    "boolean": _boolean,
    "integer": _integer,
    "number": _number,
    "object": _composite(dict),
    "array": _composite(list),
}
