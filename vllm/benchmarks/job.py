"""Work that needs a process of its own: other settings of the engine, an empty cache, a start that is timed.

python -m vllm.benchmarks.job KIND SPEC OUT     SPEC and OUT are JSON files
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

KINDS = {
    "ab": "vllm.benchmarks.ab_engine",
    "accuracy": "vllm.benchmarks.accuracy",
    "profile": "vllm.benchmarks.step_profile",
    "startup": "vllm.benchmarks.startup_child",
}
"""Name -> module with `run_job(spec) -> result`, both as JSON knows them."""


class JobFailed(RuntimeError):
    """The process ended without a result; the message is its last word."""


def run_job(kind: str, spec: dict[str, Any], env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run one job in a fresh process and return its result.

    Args:
        env: variables on top of this process's.

    Raises:
        ValueError: the job says that what was asked for is impossible.
        JobFailed: it ended in any other way.
    """
    with tempfile.TemporaryDirectory(prefix="vllm-bench-") as folder:
        given, out, log = (Path(folder) / name for name in ("spec.json", "out.json", "log"))
        given.write_text(json.dumps({**spec, "started": time.time()}))
        with log.open("wb") as stream:
            process = subprocess.Popen(
                [sys.executable, "-m", "vllm.benchmarks.job", kind, str(given), str(out)],
                env={**os.environ, **(env or {})},
                stdout=stream,
                stderr=subprocess.STDOUT,
            )
            try:
                code = process.wait()
            except BaseException:
                process.terminate()
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                raise
        if code == 0 and out.is_file():
            return json.loads(out.read_text())
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        last = lines[-1].removeprefix("error: ") if lines else f"it ended with {code}"
        raise (ValueError if code == 2 else JobFailed)(last)


def main() -> int:
    """The process's side. Exit codes as the `vllm` command's."""
    kind, given, out = sys.argv[1:]
    spec = json.loads(Path(given).read_text())
    try:
        result = importlib.import_module(KINDS[kind]).run_job(spec)
    except (ValueError, FileNotFoundError, TypeError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    Path(out).write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
