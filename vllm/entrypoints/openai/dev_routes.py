"""Routes for whoever works on the server, with VLLM_SERVER_DEV_MODE=1. They change what runs and ask for no key."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.responses import Response

from vllm.entrypoints.openai.context import ServerContext
from vllm.entrypoints.openai.errors import json_response
from vllm.logger import init_logger

logger = init_logger(__name__)


def add_dev_routes(app: FastAPI, context: ServerContext) -> None:
    """Add them, and say so in the log."""
    engine = context.engine
    logger.warning(
        "VLLM_SERVER_DEV_MODE is on: /reset_prefix_cache, /start_profile and /stop_profile are open to everybody"
    )

    @app.post("/reset_prefix_cache")
    async def reset_prefix_cache() -> Response:
        """Forget what is cached of prompts, which is nothing in this version."""
        return json_response({"success": await engine.reset_prefix_cache()})

    @app.post("/start_profile")
    async def start_profile() -> Response:
        """Record what the engine does; 400 where it is being recorded."""
        await engine.start_profile()
        return json_response({"success": True})

    @app.post("/stop_profile")
    async def stop_profile() -> Response:
        """End the record; the answer names the file, on the server's machine. 400 where nothing is being recorded."""
        return json_response({"success": True, "trace": await engine.stop_profile()})
