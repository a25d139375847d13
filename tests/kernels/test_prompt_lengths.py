"""No prompt, of whatever length, makes a kernel compile after the warm-up."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_warm_up_compiles_what_any_prompt_needs():
    command = [sys.executable, "-W", "ignore", "-m", "tests.kernels.prompt_lengths"]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == ""
