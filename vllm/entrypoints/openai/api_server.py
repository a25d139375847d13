"""The web application: its routes, and `python -m vllm.entrypoints.openai.api_server`, which works like `vllm serve`."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import PlainTextResponse, Response

from vllm import envs
from vllm.entrypoints.openai.cli_args import ServerArgs
from vllm.entrypoints.openai.context import ServerContext
from vllm.entrypoints.openai.dev_routes import add_dev_routes
from vllm.entrypoints.openai.errors import add_error_handlers, json_response
from vllm.entrypoints.openai.middleware import Authentication, HeadAsGet, RootPath
from vllm.entrypoints.openai.openapi import STREAMED, body_of, complete_schema
from vllm.entrypoints.openai.protocol.chat import ChatCompletionRequest
from vllm.entrypoints.openai.protocol.completion import CompletionRequest
from vllm.entrypoints.openai.protocol.tokenize import (
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeCompletionRequest,
)
from vllm.entrypoints.openai.serving_chat import ChatServing
from vllm.entrypoints.openai.serving_completion import CompletionServing
from vllm.entrypoints.openai.serving_models import ModelServing
from vllm.entrypoints.openai.serving_tokenization import TokenizationServing
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.version import __version__


def build_app(engine: AsyncLLM, args: ServerArgs) -> FastAPI:
    """The application on an AsyncLLM that is started before the first request; `app.state.context` holds what routes share.

    Raises:
        ValueError, FileNotFoundError: a template, parser or default that cannot be.
    """
    context = ServerContext(engine, args)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        context.renderer.close()

    docs = {"docs_url": None, "redoc_url": None, "openapi_url": None} if args.disable_fastapi_docs else {}
    app = FastAPI(title="vllm", version=__version__, lifespan=lifespan, **docs)
    app.state.context = context
    _add_openai_routes(app, context)
    _add_tokenizer_routes(app, context)
    _add_service_routes(app, context)
    if envs.VLLM_SERVER_DEV_MODE:
        add_dev_routes(app, context)
    add_error_handlers(app)
    complete_schema(app)
    if args.api_keys:
        app.add_middleware(Authentication, keys=args.api_keys)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=args.allowed_origins,
        allow_methods=args.allowed_methods,
        allow_headers=args.allowed_headers,
        allow_credentials=args.allow_credentials,
    )
    if args.root_path:
        app.add_middleware(RootPath, root_path=args.root_path)
    app.add_middleware(HeadAsGet)
    return app


def _add_openai_routes(app: FastAPI, context: ServerContext) -> None:
    chat, completion, models = ChatServing(context), CompletionServing(context), ModelServing(context)

    @app.post("/v1/chat/completions", openapi_extra=body_of(ChatCompletionRequest), responses=STREAMED)
    async def create_chat_completion(http: Request) -> Response:
        return await chat(http)

    @app.post("/v1/completions", openapi_extra=body_of(CompletionRequest), responses=STREAMED)
    async def create_completion(http: Request) -> Response:
        return await completion(http)

    @app.get("/v1/models/", include_in_schema=False)
    @app.get("/v1/models")
    async def list_models() -> Response:
        return json_response(models.list())

    @app.get("/v1/models/{name:path}")
    async def retrieve_model(name: str) -> Response:
        return json_response(models.one(name))


def _add_tokenizer_routes(app: FastAPI, context: ServerContext) -> None:
    tokenization = TokenizationServing(context)

    @app.post("/tokenize", openapi_extra=body_of(TokenizeCompletionRequest, TokenizeChatRequest))
    async def tokenize(http: Request) -> Response:
        return await tokenization.tokenize(http)

    @app.post("/detokenize", openapi_extra=body_of(DetokenizeRequest))
    async def detokenize(http: Request) -> Response:
        return await tokenization.detokenize(http)

    if context.args.enable_tokenizer_info_endpoint:

        @app.get("/tokenizer_info")
        async def tokenizer_info() -> Response:
            return json_response(await tokenization.info())


def _add_service_routes(app: FastAPI, context: ServerContext) -> None:
    engine = context.engine

    @app.get("/health", response_class=Response)
    async def health() -> Response:
        """200 while requests are answered; 503 when the engine has died or hangs, or the server is shutting down."""
        context.check_accepting()
        await engine.check_health()
        return Response()

    @app.get("/ping", operation_id="ping", response_class=Response)
    @app.post("/ping", operation_id="ping_by_post", response_class=Response)
    async def ping() -> Response:
        return await health()

    @app.get("/version")
    async def version() -> Response:
        return json_response({"version": __version__})

    @app.get("/load")
    async def load() -> Response:
        """Requests that are not finished."""
        return json_response({"server_load": engine.num_unfinished_requests})

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(engine.metrics.render(), media_type=engine.metrics.content_type)


def main() -> int:
    """`vllm serve` under its other name."""
    from vllm.entrypoints.cli.main import main as command

    return command(["serve", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
