"""Runs client programs in the environment that `make test` sets up for them (requirements/clients.txt)."""

import json
import os
import subprocess
import sys
from pathlib import Path

BIN = Path(sys.prefix) / "clients" / "bin"
HERE = Path(__file__).resolve().parent

# No client may reach for a network: models are local, and so is what they look up about them.
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "GUIDELLM__MAX_WORKER_PROCESSES": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "NO_PROXY": "*",
    "OMP_NUM_THREADS": "1",
    "OPENAI_API_KEY": "none",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONPATH": "",
}


def run(program: str, *args: object, folder: Path, timeout: float = 240) -> str:
    """What a program prints. It runs in `folder`, where its caches go too.

    Args:
        program: the name of one that requirements/clients.txt installs, or of a file of this folder.
    """
    assert BIN.is_dir(), f"no client programs in {BIN}: `make test` installs them"
    start = [BIN / "python", HERE / program] if program.endswith(".py") else [BIN / program]
    env = {**os.environ, **OFFLINE, "HOME": str(folder), "HF_HOME": str(folder / "hf")}
    done = subprocess.run(
        [*map(str, start), *map(str, args)], cwd=folder, env=env, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"{program} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def run_json(program: str, *args: object, folder: Path) -> dict:
    """The JSON object on the last line that a program prints."""
    return json.loads(run(program, *args, folder=folder).splitlines()[-1])


def write_lines(path: Path, records: list[dict]) -> Path:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
