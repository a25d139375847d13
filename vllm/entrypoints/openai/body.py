"""From the bytes of a request to a checked model of it: bounded in size and depth, strict about types."""

from __future__ import annotations

from typing import Any, TypeVar

import orjson
from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from vllm.entrypoints.openai.errors import APIError, ClientGone, bad_request

MAX_DEPTH = 128
"""Of lists and objects within each other: no honest schema comes near, and nothing that walks a body overflows its stack."""

_SHOWN = 3  # mistakes named in one message

Model = TypeVar("Model", bound=BaseModel)


async def read_request(request: Request, model: type[Model], max_size: int) -> Model:
    """The request's body as `model`. Raises APIError: 413 for too many bytes, else 400."""
    return parse_model(await read_json(request, max_size), model)


async def read_json(request: Request, max_size: int) -> Any:
    """The same, as plain JSON."""
    return parse_json(await _read(request, max_size))


async def _read(request: Request, max_size: int) -> bytes:
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > max_size:
        raise _too_large(max_size)
    pieces, size = [], 0
    try:
        async for piece in request.stream():
            size += len(piece)
            if size > max_size:
                raise _too_large(max_size)
            pieces.append(piece)
    except ClientDisconnect:
        raise ClientGone from None
    return b"".join(pieces)


def _too_large(max_size: int) -> APIError:
    return APIError(413, f"the request's body is larger than {max_size} bytes (--max-body-size)")


def parse_json(body: bytes) -> Any:
    """JSON of bounded depth; NaN, infinities and invalid UTF-8 are not JSON."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise bad_request(f"the request's body is not JSON: {error}") from None
    if body.count(b"[") + body.count(b"{") > MAX_DEPTH and _deeper_than(value, MAX_DEPTH):
        raise bad_request(f"the request's body has more than {MAX_DEPTH} levels of lists and objects")
    return value


def _deeper_than(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth):
        level = [
            child
            for parent in level
            for child in (parent.values() if type(parent) is dict else parent)
            if type(child) in (dict, list)
        ]
        if not level:
            return False
    return True


def parse_model(value: Any, model: type[Model]) -> Model:
    """`value` as `model`, or an APIError that names the fields."""
    if not isinstance(value, dict):
        raise bad_request(f"the request's body must be a JSON object; got {_kind(value)}")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        mistakes = error.errors(include_url=False, include_context=False)
        named = _deepest([(_field(mistake["loc"], value), mistake) for mistake in mistakes])
        shown = dict.fromkeys(
            f"{field}: {_sentence(mistake)}" if field else _sentence(mistake) for field, mistake in named
        )
        raise bad_request("; ".join(list(shown)[:_SHOWN]), named[0][0] or None) from None


def _deepest(named: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Without what is said of a field that has a mistake further inside: that comes from other readings of the field."""
    return [
        (field, mistake)
        for field, mistake in named
        if not any(other.startswith((f"{field}.", f"{field}[")) for other, _ in named)
    ]


def _field(location: tuple[int | str, ...], value: Any) -> str:
    """messages[0].content: the part of pydantic's location that is in the body, without the names of union members."""
    path = ""
    for key in location:
        if isinstance(key, int) and isinstance(value, list):
            path += f"[{key}]"
            value = value[key] if key < len(value) else None
        elif isinstance(key, str) and isinstance(value, dict) and (key in value or key == location[-1]):
            if key not in value and not key.isidentifier():
                break
            path += f".{key}" if path else key
            value = value.get(key)
    return path


def _sentence(mistake: Any) -> str:
    text = mistake["msg"].removeprefix("Value error, ")
    if mistake["type"] in ("missing", "value_error"):
        return text
    return f"{text}; got {_brief(mistake['input'])}"


def _brief(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return _kind(value)
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
