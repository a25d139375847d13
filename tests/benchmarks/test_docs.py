"""docs/benchmarks.md: its commands parse, and its results are those of the files."""

import importlib
import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.structure.tree import ROOT
from vllm.benchmarks import ab_report
from vllm.benchmarks.plots import draw
from vllm.engine.arg_parser import ArgumentParser
from vllm.entrypoints.cli.bench import COMMANDS

PAGE = ROOT / "docs" / "benchmarks.md"
LINES = [
    line
    for block in re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)
    for line in block.splitlines()
    if line.startswith("vllm bench")
]


@pytest.mark.parametrize("line", LINES)
def test_commands_parse(line):
    _, _, name, *words = shlex.split(line)
    module = importlib.import_module(COMMANDS[name][0])
    parser = ArgumentParser(prog=name)
    module.add_arguments(parser)
    args = parser.parse_args(words)
    if name == "ab":
        assert len(module.variants_of(args)) >= 2


def test_every_command_is_on_the_page():
    assert {line.split()[2] for line in LINES} | {"latency", "throughput"} == set(COMMANDS)
    assert all(f"`vllm bench {name}`" in PAGE.read_text() for name in COMMANDS)


def test_results_are_those_of_the_files():
    command = [sys.executable, "benchmarks/bench_tables.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def median(value):
    return {"median": value, "low": 0.99 * value, "high": 1.01 * value}


def gpu_result():
    """A result as a GPU gives it, with numbers made up for the test."""
    concurrency, names = (1, 4, 64), ("serial", "dual_stream", "fused")
    points, rows, profile = [], [], []
    for n in concurrency:
        values, compared = {}, {}
        for i, label in enumerate("ABC"):
            speed = 200 * n**0.8 * (1 + 0.02 * i)
            values[label] = {
                **{"decode_tok_s": median(speed), "tok_s_a_request": median(speed / n)},
                **{"step_ms": median(1e3 * n / speed), "ttft_ms": median(30.0 + n)},
            }
            ratio = {"ratio": 1 + 0.02 * i, "low": 1 + 0.01 * i, "high": 1 + 0.03 * i, "verdict": "faster"}
            compared |= {} if label == "A" else {label: {"decode_tok_s": ratio, "ttft_ms": ratio}}
            parts = {"GDN projections": 2_000_000_000, "routed experts": 500_000_000 * n, "lm_head": 1_000_000_000}
            moved = {
                "bytes": parts,
                "total": sum(parts.values()),
                "floor_ms": 0.9,
                "step_ms": 1e3 * n / speed,
                "share": 0.3 + i / 10,
            }
            rows.append({"concurrency": n, "variant": label, **moved})
            kernel = {"name": f"void gemm<a | {'b' * 60}>", "calls_a_step": 40.0, "us_a_step": 900.0 - i}
            part = {
                "name": "GDN in_proj",
                "us_a_step": 900.0 - i,
                "share": 1.0,
                "kernels_a_step": 40.0,
                "kernels": [kernel],
            }
            profile.append(
                {
                    "variant": label,
                    "concurrency": n,
                    "steps": 8,
                    "busy_us_a_step": 900.0,
                    "kernels_a_step": 40.0,
                    "components": [part],
                }
            )
        points.append({"concurrency": n, "variants": values, "comparisons": compared, "rounds": []})
    return {
        "benchmark": "ab",
        "complete": True,
        "command": "vllm bench ab x",
        "model": "preset:x",
        "environment": {
            "gpu": "NVIDIA X",
            "vllm": "1",
            "git": "abc",
            "versions": {"torch": "2"},
            "date": "2026-01-02T03:04:05+00:00",
        },
        "variants": {label: {"text": f"gdn_in_proj={name}"} for label, name in zip("ABC", names)},
        "agreement": [
            {
                "concurrency": 1,
                "base": "A",
                "variant": "B",
                "prompts": 1,
                "same": 0,
                "first_difference": 3,
                "largest_logprob_difference": 0.01,
            }
        ],
        "points": points,
        "roofline": {"read_bytes_s": 4.5e12, "rows": rows},
        "profile": profile,
        "accuracy": {"count": 100, "scores": {"A": {"add2": 0.99}, "B": {"add2": 1.0}}},
    }


def test_a_chapter_has_every_table_and_plot(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    tables = runpy.run_path(str(ROOT / "benchmarks" / "bench_tables.py"))
    folder = tmp_path / "ab_x"
    folder.mkdir()
    (folder / "ab.json").write_text(json.dumps(gpu_result()))
    images = draw(gpu_result(), folder)
    assert len(images) == 2 + 3 + 9 and all(image.stat().st_size > 5000 for image in images)
    monkeypatch.setitem(tables["chapter"].__globals__, "ROOT", tmp_path)
    text = tables["chapter"](folder / "ab.json")
    assert text.startswith("### ab_x: preset:x on NVIDIA X\n\n`vllm bench ab x`\n")
    assert "| 64 C: gdn_in_proj=fused |" in " ".join(text.split()).replace("  ", " ")
    assert "1.040 | 1.020 to 1.060 | faster |" in text and "token 4" in text and "4,500.0 GB/s" in text
    assert all(Path(name).name in {image.name for image in images} for name in re.findall(r"!\[.*?\]\((.*?)\)", text))
    # A bar in a kernel's name is not the table's.
    columns = {
        line.count("|") - line.count("\\|")
        for line in text.splitlines()
        if "GDN in_proj" in line and line.startswith("|")
    }
    assert columns == {6}
    assert ab_report.sections(gpu_result())[0][0] == "Speed"
