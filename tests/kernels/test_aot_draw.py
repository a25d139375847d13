"""The sampler's kernels compile for Hopper and consumer Blackwell without either at hand."""

import json
import os
import subprocess
import sys

import pytest

from tests.kernels.test_aot import ROOT, SHARED_LIMIT


@pytest.mark.slow
def test_compiles_and_fits():
    command = [sys.executable, "-W", "ignore", "-m", "tests.kernels.aot_draw"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    kernels = {"_best_kernel", "_pick_kernel", "_lowest_kernel"}
    assert {(line["kernel"], line["arch"]) for line in lines} == {(k, a) for k in kernels for a in SHARED_LIMIT}
    for line in lines:
        assert line["shared"] <= SHARED_LIMIT[line["arch"]], line
