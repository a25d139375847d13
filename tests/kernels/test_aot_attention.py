"""The attention kernels compile for Hopper and consumer Blackwell without either at hand, and fit the smaller one's shared memory."""

import json
import os
import subprocess
import sys

import pytest

from tests.kernels.test_aot import ROOT, SHARED_LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("heads", ["16x2x256", "6x2x128", "8x8x64"])
def test_compiles_and_fits(heads):
    command = [sys.executable, "-W", "ignore", "-m", "tests.kernels.aot_attention", "--heads", heads]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    kernels = {"_decode_kernel", "_add_kernel", "_prepare_kernel", "_prefill_kernel"}
    found = {(line["kernel"], line["arch"], line["pages"]) for line in lines}
    assert found == {
        (k, a, p) for k in kernels for a in SHARED_LIMIT for p in ("torch.bfloat16", "torch.float8_e4m3fn")
    }
    for line in lines:
        assert line["shared"] <= SHARED_LIMIT[line["arch"]], line
        assert line["in_flight"] == 0, line
