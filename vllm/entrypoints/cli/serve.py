"""`vllm serve`: the OpenAI server."""

from __future__ import annotations

import argparse

from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.cli.config_file import with_config_file
from vllm.entrypoints.openai.cli_args import add_server_args, server_args

prepare = with_config_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The server's flags and the engine's."""
    add_server_args(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal ends it; the exit code is 0 unless something failed."""
    server, engine = server_args(args), EngineArgs.from_cli_args(args)
    from vllm.entrypoints.openai.launcher import serve  # the web libraries, once the flags are known to be right

    return serve(engine, server)
