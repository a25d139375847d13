"""The expert kernels compile for Hopper and consumer Blackwell without either at hand, and fit the smaller one's shared memory."""

import json
import os
import subprocess
import sys

import pytest

from tests.kernels.test_aot import ROOT, SHARED_LIMIT

CASES = ["35b-int4", "35b-plain", "35b-fp8", "122b-int4", "next-fp4", "next-int8"]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_compiles_and_fits(case):
    command = [sys.executable, "-W", "ignore", "-m", "tests.kernels.aot_moe", "--case", case]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["arch"] for line in lines} == set(SHARED_LIMIT)
    # two forms of the front, gate_up, down, route, place, the grouped two, combine; planes where a word holds several elements
    words = case.endswith(("int4", "int8", "fp4"))
    assert len({line["kernel"] for line in lines}) == 9 + words
    for line in lines:
        assert line["shared"] <= SHARED_LIMIT[line["arch"]], line
        assert line["in_flight"] == 0, line
        assert line.get("stack", 0) <= 1024, f"spills: {line}"
