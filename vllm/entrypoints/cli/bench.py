"""`vllm bench COMMAND`: measurements. Each command's module is imported only when it is asked for."""

from __future__ import annotations

import difflib
import importlib
import signal
import sys

from vllm.engine.arg_parser import ArgumentParser

COMMANDS = {
    "latency": ("vllm.benchmarks.latency", "time one batch from prompt to last token"),
    "throughput": ("vllm.benchmarks.throughput", "time many requests that are all there at once"),
    "serve": ("vllm.benchmarks.serve", "drive a running OpenAI server, ours or another's"),
    "startup": ("vllm.benchmarks.startup", "time the start to the first token, with caches empty and full"),
    "ab": ("vllm.benchmarks.ab", "compare settings of the engine, alternated, with intervals and a verdict"),
    "compare": ("vllm.benchmarks.compare", "compare results of two versions, for use in CI"),
}
"""Name -> (module with `add_arguments` and `run`, one line of help)."""


def dispatch(words: list[str]) -> int:
    """Run `vllm bench words...` and return its exit code."""
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    name = words[0]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else "there are: " + ", ".join(COMMANDS)
        print(f"error: no command bench {name!r}; {hint}", file=sys.stderr)
        return 2
    path, summary = COMMANDS[name]
    module = importlib.import_module(path)
    parser = ArgumentParser(prog=f"vllm bench {name}", description=summary[0].upper() + summary[1:] + ".")
    module.add_arguments(parser)
    args = parser.parse_args(words[1:])
    # A job that is told to end keeps what it has measured, as it does after Ctrl-C.
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return module.run(args)
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def _help() -> str:
    lines = ["usage: vllm bench COMMAND ...", ""]
    lines += [f"  {name:<12} {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [*lines, "", "`vllm bench COMMAND --help` lists a command's flags; docs/benchmarks.md explains them."]
    )
