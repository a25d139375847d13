"""Measure again what benchmarks/results holds, each result by the command that it was made with.

    python benchmarks/again.py                  list results and commands
    python benchmarks/again.py NAME [NAME ...]  run those of these results, one after the other; "all": every one

Results replace those that are there. They name the commit that is checked out, or that GIT_HASH names where the tree has no history.
Exits with 1 where a command failed; the others have run all the same.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from pages import ROOT

from vllm.benchmarks.environment import git_hash

RESULTS = ROOT / "benchmarks" / "results"
PROGRAMS = {"python": [sys.executable], "vllm": [sys.executable, "-m", "vllm.entrypoints.cli.main"]}


def recorded(folder: Path = RESULTS) -> dict[str, str]:
    """Name -> command. A result of `vllm bench` has its folder's name, any other its file's."""
    found = {}
    for path in sorted(folder.rglob("*.json")):
        result = json.loads(path.read_text())
        name = path.stem if path.parent == folder else path.parent.name
        if isinstance(result, dict) and result.get("command"):
            found[name] = result["command"]
    return found


def words(command: str, git: str) -> list[str]:
    """What to execute; a commit that the command names is replaced."""
    program, *rest = shlex.split(command)
    return [*PROGRAMS[program], *(git if before == "--git" else word for before, word in zip(["", *rest], rest))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="results to measure again, or all; none: list them")
    names, commands = parser.parse_args().names, recorded()
    if not names:
        print("\n".join(f"{name:24} {command}" for name, command in commands.items()))
        return 0
    names = list(commands) if names == ["all"] else names
    if unknown := [name for name in names if name not in commands]:
        parser.error(f"no result has a command and the name {unknown[0]}; without names, all are listed")
    git = os.environ.get("GIT_HASH") or git_hash(ROOT) or "unknown"
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"GIT_HASH": git, "PYTHONPATH": os.pathsep.join(paths)}
    failed = []
    for name in names:
        print(f"{name}: {commands[name]}", flush=True)
        start = time.perf_counter()
        code = subprocess.run(words(commands[name], git), cwd=ROOT, env=environment, check=False).returncode
        print(
            f"{name}: {'done' if code == 0 else f'FAILED ({code})'} after {time.perf_counter() - start:.0f} s",
            flush=True,
        )
        failed += [name] * (code != 0)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
