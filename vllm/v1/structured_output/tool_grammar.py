"""Tool calls that must be made (tool_choice "required" or a name), as constraints in the format that the parser reads.

`qwen3_coder` and `qwen3_xml`, one call:

    <tool_call>
    <function=NAME>
    <parameter=KEY>
    VALUE
    </parameter>
    </function>
    </tool_call>

Parameters come in the order in which they are declared, the required ones always. A value whose schema allows a string is any text
in which no `</parameter>` and no `</tool_call>` stands, because the parser could take those for the value's end; listed strings
come verbatim, and everything else is JSON under the parameter's schema, whose strings spell `</` as `<\\/`. `hermes`: `{"name": NAME, "arguments": JSON}`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.structured_output.schema import dump_json, prepare_schema

BEGIN, END = "<tool_call>", "</tool_call>"
_VALUE_ENDS = ["</parameter>", END]
_NOT_IN_JSON = [
    "</"
]  # one short text: the grammar of JSON's strings grows with it, and takes seconds to compile for two tags
_NOT_IN_NAMES = "<>\n"
_LONGEST_NAME = 256
MOST_BLANKS = 16
"""White space in a row inside of a JSON value."""


def tool_call_constraint(
    tools: Iterable[Any], tool_choice: Any, parser_name: str, *, parallel: bool = True, begin_after: str | None = None
) -> StructuredOutputsParams | None:
    """The constraint under which the text is made of tool calls and nothing else.

    Args:
        tools: OpenAI's tool definitions, as dictionaries or as models of pydantic's.
        tool_choice: "required", or {"type": "function", "function": {"name": ...}} for exactly one call of that function.
        parser_name: of --tool-call-parser: the format.
        parallel: several calls may be made under "required".
        begin_after: the end of the model's thinking, where it thinks first. A call inside of the thinking ends it too.

    Returns:
        None for "auto" and "none", which constrain nothing.

    Raises:
        ValueError: one line: a format that is not known, or a name that cannot be written in it.
    """
    if tool_choice in (None, "auto", "none"):
        return None
    if parser_name not in _FORMATS:
        raise ValueError(
            f"tool_choice {_describe(tool_choice)} is not supported with the tool call parser {parser_name!r}"
        )
    functions = _functions(tools)
    if tool_choice != "required":
        name = _named(tool_choice)
        if name not in functions:
            raise ValueError(f"tool_choice names {name!r:.80}, which is not among tools")
        functions, parallel = {name: functions[name]}, False
    if not functions:
        raise ValueError('tool_choice "required" needs tools')
    calls = [_FORMATS[parser_name](name, parameters) for name, parameters in functions.items()]
    call = calls[0] if len(calls) == 1 else {"type": "or", "elements": calls}
    if parallel:
        more = {"type": "star", "content": _sequence(_const("\n"), call)}
        call = _sequence(call, more)
    tag = {"type": "structural_tag", "format": call}
    return StructuredOutputsParams(
        structural_tag=tag, begin_after=begin_after, begin_at=BEGIN if begin_after is not None else None
    )


def _functions(tools: Iterable[Any]) -> dict[str, Any]:
    """Name -> schema of the parameters, the first of one name."""
    functions: dict[str, Any] = {}
    for tool in tools:
        tool = _plain(tool)
        function = _plain(tool.get("function", tool)) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(f"tools must hold functions with names; got {tool!r:.80}")
        functions.setdefault(function["name"], function.get("parameters"))
    return functions


def _plain(value: Any) -> Any:
    return value.model_dump() if hasattr(value, "model_dump") else value


def _named(tool_choice: Any) -> str:
    choice = _plain(tool_choice)
    function = choice.get("function") if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise ValueError(f'tool_choice must be "auto", "none", "required" or name a function; got {choice!r:.80}')
    return name


def _describe(tool_choice: Any) -> str:
    return '"required"' if tool_choice == "required" else f"{_named(tool_choice)!r:.80}"


def _const(text: str) -> dict[str, Any]:
    return {"type": "const_string", "value": text}


def _sequence(*elements: dict[str, Any]) -> dict[str, Any]:
    return {"type": "sequence", "elements": list(elements)}


def _json(schema: Any, excludes: list[str]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": schema, "max_whitespace_cnt": MOST_BLANKS, "excludes": excludes}


def _hermes(name: str, parameters: Any) -> dict[str, Any]:
    schema = prepare_schema(parameters or {"type": "object", "properties": {}}, lenient=True)
    head = f'{BEGIN}\n{{"name": {dump_json("tools", name)}, "arguments": '
    return _sequence(_const(head), _json(schema, []), _const(f"}}\n{END}"))


def _qwen3(name: str, parameters: Any) -> dict[str, Any]:
    _check_name("function", name)
    root = parameters if isinstance(parameters, Mapping) else {}
    dump_json(f"the parameters of {name!r:.80}", root)
    described = _resolve(root, root)
    properties = described.get("properties")
    properties = dict(properties) if isinstance(properties, Mapping) else {}
    required = [key for key in described.get("required") or () if isinstance(key, str)]
    properties |= {key: {} for key in required if key not in properties}
    parts = [_const(f"{BEGIN}\n<function={name}>\n")]
    for key, schema in properties.items():
        _check_name("parameter", key)
        part = _sequence(_const(f"<parameter={key}>\n"), _value(schema, root), _const("\n</parameter>\n"))
        parts.append(part if key in required else {"type": "optional", "content": part})
    return _sequence(*parts, _const(f"</function>\n{END}"))


_FORMATS = {"hermes": _hermes, "qwen3_coder": _qwen3, "qwen3_xml": _qwen3}


def _check_name(kind: str, name: str) -> None:
    if not 0 < len(name) <= _LONGEST_NAME or any(char in name for char in _NOT_IN_NAMES):
        raise ValueError(f"the {kind} name {name!r:.80} cannot be written as a tool call")


def _value(schema: Any, root: Mapping[str, Any]) -> dict[str, Any]:
    kinds, listed = _allowed(schema, root)
    if listed is not None:
        texts = list(dict.fromkeys(v if isinstance(v, str) else dump_json("tools", v) for v in listed))
        texts = [text for text in texts if not any(end in text for end in _VALUE_ENDS)]
        if texts:
            return _const(texts[0]) if len(texts) == 1 else {"type": "or", "elements": [_const(text) for text in texts]}
    if not kinds or "string" in kinds or listed is not None:
        return {"type": "any_text", "excludes": _VALUE_ENDS}
    shared = {key: root[key] for key in ("$defs", "definitions") if isinstance(root.get(key), Mapping)}
    try:
        return _json(prepare_schema({**shared, **_local(schema)}, lenient=True), _NOT_IN_JSON)
    except ValueError:  # what it says beyond the type cannot be honoured
        anything = (
            {"type": sorted(kinds), "additionalProperties": True} if "object" in kinds else {"type": sorted(kinds)}
        )
        return _json(anything, _NOT_IN_JSON)


def _local(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema, unless a reference in it leads to a place that does not come along."""
    pending: list[Any] = [schema]
    while pending:
        item = pending.pop()
        if isinstance(item, Mapping):
            reference = item.get("$ref")
            if isinstance(reference, str) and not reference.startswith(("#/$defs/", "#/definitions/")):
                raise ValueError(f"a reference to {reference!r:.80}")
            pending += item.values()
        elif isinstance(item, list):
            pending += item
    return dict(schema)


def _resolve(schema: Any, root: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema that a chain of references inside the tool's own schema leads to; empty for any other."""
    for _ in range(16):
        reference = schema.get("$ref") if isinstance(schema, Mapping) else None
        if reference is None:
            return schema if isinstance(schema, Mapping) else {}
        schema = root
        for step in str(reference).removeprefix("#/").split("/"):
            schema = schema.get(step) if isinstance(schema, Mapping) else None
    return {}


def _allowed(schema: Any, root: Mapping[str, Any], depth: int = 0) -> tuple[set[str], list[Any] | None]:
    """The types that a schema allows, none if it does not say; and the values, if it lists them all."""
    schema = _resolve(schema, root)
    if depth > 16:
        return set(), None
    if isinstance(schema.get("enum"), list) and schema["enum"]:
        return set(), schema["enum"]
    if "const" in schema:
        return set(), [schema["const"]]
    for key in ("anyOf", "oneOf", "allOf"):
        branches = schema.get(key)
        if isinstance(branches, list) and branches:
            found = [_allowed(branch, root, depth + 1) for branch in branches]
            if all(listed is not None for _, listed in found):
                return set(), [value for _, listed in found for value in listed]
            kinds = [{_type_of(value) for value in listed} if listed is not None else kinds for kinds, listed in found]
            return (set().union(*kinds) if all(kinds) else set()), None
    declared = schema.get("type")
    kinds = {kind for kind in (declared if isinstance(declared, list) else [declared]) if isinstance(kind, str)}
    return (kinds if kinds <= _TYPES else set()), None


_TYPES = {"string", "integer", "number", "boolean", "null", "array", "object"}


def _type_of(value: Any) -> str:
    if value is None:
        return "null"
    for kind, name in ((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string"), (list, "array")):
        if isinstance(value, kind):
            return name
    return "object"
