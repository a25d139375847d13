"""/openapi.json. Bodies are read and checked by `body.py`, so their schemas are put in here."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

_REF = "#/components/schemas/{model}"
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
"""`responses` of a route that may also answer with events."""

_bodies: dict[str, type[BaseModel]] = {}


def body_of(*models: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` of a route whose body is one of `models`."""
    _bodies.update({model.__name__: model for model in models})
    schemas = [{"$ref": _REF.format(model=model.__name__)} for model in models]
    schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def complete_schema(app: FastAPI) -> None:
    """Make `app.openapi()` hold the models that its routes name, and the errors that any route may answer with."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            pairs = [(model, "validation") for model in _bodies.values()]
            _, definitions = models_json_schema(pairs, ref_template=_REF)
            schema.setdefault("components", {}).setdefault("schemas", {}).update(definitions["$defs"])
            schema["components"]["schemas"]["Error"] = _ERROR
            for operations in schema["paths"].values():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
                    operation["responses"].update(_ERRORS)
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi


_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                "code": {"type": "integer"},
            },
        }
    },
}
_ERRORS = {
    status: {
        "description": description,
        "content": {"application/json": {"schema": {"$ref": _REF.format(model="Error")}}},
    }
    for status, description in {
        "400": "The request cannot be.",
        "401": "The API key is missing or wrong.",
        "404": "There is no such model or route.",
        "413": "The body is too large.",
        "503": "The server is overloaded, shutting down or dead; Retry-After says when to try again.",
    }.items()
}
