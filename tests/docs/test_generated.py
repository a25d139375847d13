"""Pages with tables say what the result files say."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("script", ["gdn_tables.py", "performance_tables.py"])
def test_tables_are_up_to_date(script):
    done = subprocess.run([sys.executable, f"benchmarks/{script}", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
