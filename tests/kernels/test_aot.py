"""All kernels compile for Hopper and consumer Blackwell without either at hand, and fit the smaller one's shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED_LIMIT = {90: 227 * 1024, 120: 99 * 1024}


@pytest.mark.slow
@pytest.mark.parametrize("case", ["bf16-128", "bf16-64", "fp32-128"])
def test_compiles_and_fits(case):
    command = [sys.executable, "-W", "ignore", "-m", "tests.kernels.aot", "--case", case]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["arch"] for line in lines} == set(SHARED_LIMIT)
    # the skinny GEMM is for 16-bit weights alone
    assert len({line["kernel"] for line in lines}) == (12 if case.startswith("fp32") else 14)
    for line in lines:
        assert line["shared"] <= SHARED_LIMIT[line["arch"]], line
        assert line["in_flight"] == 0, line
