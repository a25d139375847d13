"""`vllm COMMAND ...`: picks the subcommand's module and imports nothing else, so that help and mistakes cost no seconds.

Exit codes: 0 done; 1 something failed while running; 2 the command line or the model was wrong; 130 Ctrl-C.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import traceback

from vllm import envs
from vllm.engine.arg_parser import ArgumentParser
from vllm.version import __version__

COMMANDS = {
    "serve": ("vllm.entrypoints.cli.serve", "answer OpenAI requests over HTTP"),
    "plan": ("vllm.entrypoints.cli.plan", "show where a GPU's memory goes and how long contexts can be, without a GPU"),
    "chat": ("vllm.entrypoints.cli.chat", "talk to a model in the terminal"),
    "bench": ("vllm.entrypoints.cli.bench", "measure speed, compare variants, and hold both against the memory's"),
    "collect-env": ("vllm.entrypoints.cli.collect_env", "print versions and hardware, for a bug report"),
}
"""Name -> (module, one line of help)."""


def main(argv: list[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if words[0] in ("-v", "-V", "--version"):
        print(__version__)
        return 0
    name = words[0].replace("_", "-")
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else "there are: " + ", ".join(COMMANDS)
        print(f"error: no command {words[0]!r}; {hint}", file=sys.stderr)
        return 2
    try:
        return _run(name, words[1:])
    except SystemExit as stop:  # argparse: --help or a wrong flag
        return stop.code if isinstance(stop.code, int) else 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as in `vllm plan ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, FileNotFoundError) as error:
        return _fail(_one_line(error), 2)
    except Exception as error:
        hint = "" if _debugging() else " (VLLM_LOGGING_LEVEL=DEBUG shows where)"
        return _fail(f"{type(error).__name__}: {_one_line(error)}{hint}", 1)


def _run(name: str, words: list[str]) -> int:
    path, summary = COMMANDS[name]
    module = importlib.import_module(path)
    if hasattr(module, "dispatch"):  # a command of commands
        return module.dispatch(words)
    parser = ArgumentParser(prog=f"vllm {name}", description=summary[0].upper() + summary[1:] + ".")
    module.add_arguments(parser)
    prepare = getattr(module, "prepare", list)
    return module.run(parser.parse_args(prepare(words)))


def _fail(message: str, code: int) -> int:
    if _debugging():
        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)
    return code


def _debugging() -> bool:
    try:
        return envs.VLLM_LOGGING_LEVEL == "DEBUG"
    except ValueError:  # the variable itself is what is wrong
        return False


def _one_line(error: BaseException) -> str:
    """A missing file's OSError carries its text in pieces; str() joins them."""
    return " ".join(str(error).split()) or type(error).__name__


def _help() -> str:
    lines = [
        f"vllm {__version__}: an inference server for Gated DeltaNet language models",
        "",
        "usage: vllm COMMAND ...",
        "",
    ]
    lines += [f"  {name:<12} {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [*lines, "", "`vllm COMMAND --help` lists a command's flags; `vllm --version` prints the version."]
    )


if __name__ == "__main__":
    sys.exit(main())
