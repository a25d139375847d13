"""Results are measured again by the commands that they hold."""

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT

SCRIPT = ROOT / "benchmarks/again.py"


@pytest.fixture
def again(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import again

    return again


def test_every_result_on_a_gpu_can_be_measured_again(again):
    """Its command names a program that is known, and writes to the file that holds it."""
    commands = again.recorded()
    assert {"gdn_in_proj_h200", "memory_35b", "ab_in_proj_35b_h200", "startup_35b_h200"} <= commands.keys()
    for name, command in commands.items():
        assert again.words(command, "abc")[0] == sys.executable
        where = [word for word in command.split() if word.startswith("benchmarks/results/")]
        assert all(name in word for word in where), command
    for path in (ROOT / "benchmarks/results/bench").iterdir():
        assert path.name in commands


def test_a_commit_is_replaced(again):
    assert again.words("python x.py --git old --out 'a b'", "new") == [
        sys.executable,
        "x.py",
        "--git",
        "new",
        "--out",
        "a b",
    ]
    assert again.words("vllm bench ab", "new")[1:] == ["-m", "vllm.entrypoints.cli.main", "bench", "ab"]


def test_one_that_fails_keeps_none_from_running(again, tmp_path, monkeypatch, capfd):
    (tmp_path / "bench" / "second").mkdir(parents=True)
    write = "import os, pathlib; pathlib.Path(os.environ['OUT']).write_text(os.environ['GIT_HASH'])"
    (tmp_path / "first.json").write_text(json.dumps({"command": "python -c 'raise SystemExit(3)'"}))
    (tmp_path / "bench" / "second" / "ab.json").write_text(json.dumps({"command": f'python -c "{write}"'}))
    (tmp_path / "no_command.json").write_text("[]")
    original = again.recorded
    monkeypatch.setattr(again, "recorded", lambda: original(tmp_path))
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setenv("GIT_HASH", "abc")
    monkeypatch.setattr(sys, "argv", ["again.py", "all"])
    assert again.main() == 1 and (tmp_path / "out").read_text() == "abc"
    out = capfd.readouterr().out
    assert "first: FAILED (3) after" in out and "second: done after" in out
    monkeypatch.setattr(sys, "argv", ["again.py", "third"])
    with pytest.raises(SystemExit, match="2"):
        again.main()
    assert "no result has a command and the name third" in capfd.readouterr().err


def test_without_names_it_lists():
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=True)
    assert "\nmoe_h200 " in done.stdout and "--json benchmarks/results/moe_h200.json" in done.stdout
