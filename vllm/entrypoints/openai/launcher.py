"""The life of a server process: take the port, load the model, serve, and end in the way that the end calls for.

Exit codes: 0 after SIGTERM or Ctrl-C; 1 when the engine died; 130 after a second Ctrl-C, or one while the model loads.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterator

import uvicorn
import uvloop
from fastapi import FastAPI

from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.openai.api_server import build_app
from vllm.entrypoints.openai.cli_args import ServerArgs
from vllm.entrypoints.openai.context import ServerContext
from vllm.entrypoints.openai.http_protocol import BoundedHttp
from vllm.logger import init_logger
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineStalledError

logger = init_logger(__name__)

_HEALTH_PERIOD = 0.25  # seconds between looks at the engine
_LAST_WORDS = 2  # seconds for answers to reach their clients once nothing is left to wait for
_HURRY = 0.5  # the same after a second Ctrl-C
_BACKLOG = 2048  # connections that wait to be accepted
_OPEN_FILES = 65536


def serve(engine_args: EngineArgs, args: ServerArgs, core_class: type | None = None) -> int:
    """Run a server until a signal or a failure ends it; returns the exit code.

    Args:
        core_class: stands in for EngineCore, in tests and measurements.

    Raises:
        ValueError, FileNotFoundError: a flag or the model is wrong; or the port cannot be had, which shows before anything is
            loaded.
    """
    listener = _listen(args.host, args.port)
    # Until something is served Ctrl-C ends the process as it stands; the engine's sees that and goes too. As an exception it
    # would wait for the event loop, or get lost in a library that is being imported and tries what it can do without.
    before = signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    try:
        _allow_many_connections()
        engine = AsyncLLM(engine_args.create_engine_config(), core_class=core_class)
        try:
            app = build_app(engine, args)  # a template that cannot be shows here, while the model is still being loaded
            return uvloop.run(_serve(engine, app, listener))
        finally:
            engine.shutdown()
    finally:
        signal.signal(signal.SIGINT, before)
        listener.close()


async def _serve(engine: AsyncLLM, app: FastAPI, listener: socket.socket) -> int:
    context = app.state.context
    try:
        await engine.start()
        try:
            listener.listen(_BACKLOG)
        except OSError as error:  # another server had bound the port too, and was quicker
            raise _no_port(context.args.host, context.args.port, error) from None
        return await Server(context, _uvicorn_config(app, context.args)).run(listener)
    finally:
        engine.shutdown()


def _uvicorn_config(app: FastAPI, args: ServerArgs) -> uvicorn.Config:
    _log_like_ours(args.uvicorn_log_level)
    return uvicorn.Config(
        app,
        http=BoundedHttp,
        ws="none",
        lifespan="on",
        log_config=None,
        log_level=args.uvicorn_log_level,
        access_log=not args.disable_uvicorn_access_log,
        timeout_keep_alive=args.timeout_keep_alive,
        timeout_graceful_shutdown=_LAST_WORDS,
        backlog=_BACKLOG,
        server_header=False,
    )


class Server(uvicorn.Server):
    """uvicorn, with signals that drain, and an eye on the engine.

    Args:
        context: of the application.
        config: of uvicorn, for that application.
    """

    def __init__(self, context: ServerContext, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._context = context
        self._exit_code = 0
        self._ending: asyncio.Task[None] | None = None

    async def run(self, listener: socket.socket) -> int:
        """Serve on a bound socket until the end; returns the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal, number)
        self._watcher = asyncio.ensure_future(self._watch_engine())
        try:
            await self.serve(sockets=[listener])
        finally:
            self._watcher.cancel()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)
        return self._exit_code

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are ours: uvicorn's handlers would end the process with the signal, not with 0."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host, port = sockets[0].getsockname()[:2]
        _print_welcome(host, port, self._context)

    def _on_signal(self, number: int) -> None:
        if self._ending is not None:
            logger.warning("Stopping at once")
            self._exit_code = 128 + number
            self._watcher.cancel()
            self.config.timeout_graceful_shutdown = _HURRY
            self.should_exit = True
            self._context.engine.shutdown()  # open streams still get to say why they end
            return
        self._ending = asyncio.ensure_future(self._drain(signal.Signals(number).name))

    async def _drain(self, why: str) -> None:
        """Refuse what is new, let what runs finish in the time it has, then stop."""
        running, seconds = self._context.engine.num_unfinished_requests, self._context.args.shutdown_timeout
        self._context.draining = True
        if running:
            logger.info(
                "%s: finishing what runs (%d), for at most %d s; once more stops at once", why, running, seconds
            )
        else:
            logger.info("%s: stopping", why)
        if not await self._context.engine.drain(seconds):
            logger.warning("Requests that were not finished in time have been aborted")
        self.should_exit = True

    async def _watch_engine(self) -> None:
        """End the server when the engine dies: by then every open request has got its error."""
        stalled = False
        while True:
            await asyncio.sleep(_HEALTH_PERIOD)
            try:
                await self._context.engine.check_health()
                if stalled:
                    logger.warning("The engine gets on again")
                stalled = False
            except EngineStalledError as error:  # it may come back, and whoever looks at /health decides
                if not stalled:
                    logger.error("/health answers 503: %s", error)
                stalled = True
            except EngineDeadError as error:
                logger.error("The server stops, because the engine is dead: %s", error)
                self._exit_code = 1
                await asyncio.sleep(_HEALTH_PERIOD)
                self.should_exit = True
                return


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket. Connections are refused until the server listens: then it can answer."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, proto)
    except OSError as error:
        raise ValueError(f"--host {host}: {error.strerror or error}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _no_port(host, port, error) from None
    return listener


def _no_port(host: str, port: int, error: OSError) -> ValueError:
    return ValueError(f"--port {port}: cannot listen on {host}: {error.strerror or error}")


def _allow_many_connections() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _log_like_ours(level: str) -> None:
    """uvicorn's messages in our format, without those about its own start and end, and about answers that an end cuts off."""
    ours = logging.getLogger("vllm").handlers
    for name in ("uvicorn.error", "uvicorn.access"):
        theirs = logging.getLogger(name)
        theirs.handlers, theirs.propagate = list(ours), False
    quiet = level != "debug" and level != "trace"

    def is_news(record: logging.LogRecord) -> bool:
        cut_off = record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError)
        return not quiet or (record.levelno > logging.INFO and not cut_off)

    logging.getLogger("uvicorn.error").addFilter(is_news)


def _print_welcome(host: str, port: int, context: ServerContext) -> None:
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    url = f"http://{shown}:{port}{context.args.root_path}"
    body = json.dumps({"messages": [{"role": "user", "content": "What is 12+34?"}]})
    key = " -H 'Authorization: Bearer YOUR_KEY'" if context.args.api_keys else ""
    try:
        print(f"Serving {', '.join(context.model_names)} at {url}. Try:", flush=True)
        print(f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'", flush=True)
    except BrokenPipeError:  # nobody reads this, as in `vllm serve | head -1`; what is served has other readers
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
