"""Errors as clients see them: OpenAI's error object, the right status, one line that says what to change. Never a traceback."""

from __future__ import annotations

from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.routing import Match

from vllm.logger import init_logger
from vllm.v1.engine.exceptions import EngineDeadError, EngineOverloadedError, EngineStalledError

logger = init_logger(__name__)

_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    413: "RequestTooLargeError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}


class APIError(Exception):
    """What a request is answered with in place of a result.

    Args:
        status: of HTTP.
        message: one line for the person who sent the request.
        param: the field that is wrong, where there is one.
        retry_after: seconds after which trying again may help.
    """

    def __init__(self, status: int, message: str, param: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "BadRequestError" if self.status < 500 else "InternalServerError")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.status}}

    def response(self) -> Response:
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.status == 413:
            headers["Connection"] = "close"  # the rest of the body is not going to be read
        return json_response(self.body(), self.status, headers)


class ClientGone(APIError):
    """The client has closed the connection: nobody reads an answer."""

    def __init__(self) -> None:
        super().__init__(499, "the client has closed the connection")


def bad_request(message: str, param: str | None = None) -> APIError:
    """Something that the client sent cannot be."""
    return APIError(400, message, param)


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """`content` as JSON; keys need not be strings."""
    return Response(
        orjson.dumps(content, option=orjson.OPT_NON_STR_KEYS), status, headers, media_type="application/json"
    )


def as_api_error(error: Exception) -> APIError:
    """The one place that decides what an exception means to a client."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, EngineOverloadedError):
        return APIError(503, str(error), retry_after=error.retry_after)
    if isinstance(error, (EngineDeadError, EngineStalledError)):
        return APIError(503, str(error) or "the engine has ended")
    if isinstance(error, ValueError):
        return bad_request(" ".join(str(error).split()))
    if isinstance(error, HTTPException):
        return APIError(error.status_code, str(error.detail))
    logger.error("Internal error", exc_info=error)
    return APIError(500, "internal error; the server's log says more")


def _methods_of(request: Request) -> str:
    """What a route may be asked with that was asked with something else."""
    routes = [route for route in request.app.routes if route.matches(request.scope)[0] is Match.PARTIAL]
    return ", ".join(sorted({method for route in routes for method in route.methods}))


def add_error_handlers(app: FastAPI) -> None:
    """Answer every exception, of routing and of ours, with an error object."""

    async def answer(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException) and error.status_code == 404:
            error = APIError(404, f"no route {request.method} {request.url.path}")
        response = as_api_error(error).response()
        if response.status_code == 405:
            response.headers["Allow"] = _methods_of(request)
        return response

    for kind in (
        *(APIError, EngineOverloadedError, EngineDeadError, EngineStalledError),
        *(ValueError, HTTPException, Exception),
    ):
        app.add_exception_handler(kind, answer)
