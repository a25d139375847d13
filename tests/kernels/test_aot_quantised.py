"""Products of many rows with quantised weights compile for Hopper and consumer Blackwell without either at hand, and fit their memories."""

import json
import os
import subprocess
import sys

import pytest

from tests.kernels.test_aot import ROOT, SHARED_LIMIT

FORMS = {
    **dict.fromkeys(
        ("int4", "int4 zero", "int4 128", "int8 row", "int8", "fp4 nv"), 3
    ),  # x is brought into order, dense copies
    **dict.fromkeys(("fp8 block", "fp8 inputs", "fp8 inputs block", "experts"), 2),  # dense copies, or x is quantised
}
"""Form -> the product and the kernels that go with it."""


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_compiles_and_fits(form):
    command = [sys.executable, "-W", "ignore", "-m", "tests.kernels.aot_quantised", "--form", form]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["arch"] for line in lines} == set(SHARED_LIMIT)
    assert len({line["kernel"] for line in lines}) == FORMS[form]
    for line in lines:
        assert line["shared"] <= SHARED_LIMIT[line["arch"]], line
        assert line["in_flight"] == 0, line
        assert line.get("stack", 0) <= 64, f"spills: {line}"
