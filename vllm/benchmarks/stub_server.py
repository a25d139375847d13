"""`vllm serve` in front of a core without a model: quick to start, and what it answers is known beforehand.

python -m vllm.benchmarks.stub_server slow|scheduled|paced|fast MODEL [flags of vllm serve]
"""

from __future__ import annotations

import sys

from vllm.benchmarks.stub_core import PacedStubCore, ScheduledStubCore, SlowStubCore, StubCore
from vllm.engine.arg_parser import ArgumentParser
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.openai.cli_args import add_server_args, server_args
from vllm.entrypoints.openai.launcher import serve

CORES = {"slow": SlowStubCore, "scheduled": ScheduledStubCore, "paced": PacedStubCore, "fast": StubCore}


def main() -> int:
    """Serve until a signal ends it."""
    core, *flags = sys.argv[1:]
    args = add_server_args(ArgumentParser(prog="stub_server")).parse_args(flags)
    return serve(EngineArgs.from_cli_args(args), server_args(args), core_class=CORES[core])


if __name__ == "__main__":
    sys.exit(main())
