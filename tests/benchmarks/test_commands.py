"""`vllm bench latency`, `throughput` and `startup` on the bundled checkpoint, and what every command shares."""

import builtins
import json
import os
import signal
import time

import pytest

from vllm.benchmarks import startup, startup_child
from vllm.benchmarks.environment import environment, parse_clocks
from vllm.benchmarks.job import JobFailed, run_job
from vllm.benchmarks.report import rounded, write_json
from vllm.benchmarks.startup_child import COMPILED, FIRST, IMPORT, PHASES, REST, WEIGHTS, Timeline
from vllm.entrypoints.cli import bench as group
from vllm.entrypoints.cli import main as cli
from vllm.entrypoints.llm import LLM

LATENCY = ("latency", "preset:tiny", "--input-len", "8", "--output-len", "8", "--batch-size", "2", "--num-iters", "3")


def bench(*words):
    return cli.main(["bench", *map(str, words)])


def test_latency(tmp_path, capsys):
    more = (
        "--num-iters-warmup",
        1,
        "--roofline",
        "--profile",
        "--output-json",
        tmp_path / "l.json",
        "--output-dir",
        tmp_path / "out",
    )
    assert bench(*LATENCY, *more) == 0
    found = json.loads((tmp_path / "l.json").read_text())
    assert len(found["latencies"]) == 3 and found["complete"]
    assert found["avg_latency"] == pytest.approx(sum(found["latencies"]) / 3, rel=1e-4)
    assert (
        min(found["latencies"]) <= found["percentiles"]["10"] <= found["percentiles"]["99"] <= max(found["latencies"])
    )
    assert found["roofline"]["rows"][0]["share"] < 1 and found["profile"][0]["kernels_a_step"] > 50
    out = capsys.readouterr().out
    assert out.startswith("Avg latency: ") and "99% percentile latency: " in out and "GDN core" in out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("latency.json", "latency.md", "latency-roofline.png", "latency-components-at-2.png"),
        "latency-components-flame-step-at-2.png",
    }


def test_a_latency_run_that_is_told_to_end_keeps_what_it_has(monkeypatch, tmp_path, capsys):
    """SIGTERM counts as Ctrl-C."""
    real, calls, before = LLM.generate, [], signal.getsignal(signal.SIGTERM)

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    monkeypatch.setattr(LLM, "generate", interrupted)
    assert bench(*LATENCY, "--num-iters-warmup", 1, "--output-json", tmp_path / "l.json") == 130
    found = json.loads((tmp_path / "l.json").read_text())
    assert len(found["latencies"]) == 2 and found["interrupted"] and not found["complete"]
    assert "interrupted after 2 of 3 batches" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_throughput(tmp_path, capsys):
    words = ("--num-prompts", 5, "--input-len", 6, "--output-len", 4, "--max-model-len", 64, "--max-num-seqs", 4)
    assert (
        bench("throughput", "preset:tiny", *words, "--output-json", tmp_path / "t.json", "--output-dir", tmp_path) == 0
    )
    found = json.loads((tmp_path / "t.json").read_text())
    assert (found["num_requests"], found["prompt_tokens"], found["output_tokens"], found["total_num_tokens"]) == (
        5,
        30,
        20,
        50,
    )
    assert found["requests_per_second"] * found["elapsed_time"] == pytest.approx(5, rel=1e-3)
    assert found["tokens_per_second"] == pytest.approx(10 * found["requests_per_second"], rel=1e-3)
    assert capsys.readouterr().out.startswith("Throughput: ") and (tmp_path / "throughput.md").is_file()
    path = tmp_path / "c.jsonl"
    path.write_text('{"prompt": "What is 12+34?", "output_tokens": 3}\n')
    words = (
        "--dataset-name",
        "custom",
        "--dataset-path",
        path,
        "--num-prompts",
        2,
        "--max-model-len",
        64,
        "--max-num-seqs",
        4,
    )
    assert bench("throughput", "preset:tiny", *words, "--output-json", tmp_path / "t.json") == 0
    assert json.loads((tmp_path / "t.json").read_text())["output_tokens"] == 6


def test_an_interrupted_throughput_run_counts_what_was_done(monkeypatch, tmp_path):
    from vllm.v1.engine.llm_engine import LLMEngine

    real, calls = LLMEngine.step, []

    def interrupted(self):
        calls.append(1)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(LLMEngine, "step", interrupted)
    words = ("--num-prompts", 5, "--input-len", 6, "--output-len", 4, "--max-model-len", 64, "--max-num-seqs", 2)
    assert bench("throughput", "preset:tiny", *words, "--output-json", tmp_path / "t.json") == 130
    found = json.loads((tmp_path / "t.json").read_text())
    assert (
        1 <= found["num_requests"] < 5 and found["interrupted"] and found["output_tokens"] == 4 * found["num_requests"]
    )


def test_startup(tmp_path, capsys):
    words = ("--num-warm", 1, "--max-model-len", 64, "--max-num-seqs", 2)
    before = time.time()
    assert bench("startup", "preset:tiny", *words, "--output-dir", tmp_path) == 0
    wall = time.time() - before
    found = json.loads((tmp_path / "startup.json").read_text())
    assert [start["kind"] for start in found["starts"]] == ["cold", "warm"] and found["complete"]
    for start in found["starts"]:
        assert tuple(start["phases"]) == PHASES and min(start["phases"].values()) >= 0
        assert start["total"] == pytest.approx(sum(start["phases"].values()), rel=1e-3)
        assert start["phases"][IMPORT] > 0.1 and start["phases"][WEIGHTS] > 0 and start["phases"][FIRST] > 0
    assert found["cold_seconds"] + found["warm_seconds"] <= wall
    assert (tmp_path / "startup-phases.png").is_file() and "cold 1" in capsys.readouterr().out


def test_an_interrupted_startup_keeps_what_it_has(monkeypatch, tmp_path):
    folders = []

    def fake(kind, spec, env):
        folders.append(env)
        assert {"TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH"} <= set(env)
        (own,) = {startup.Path(path).parent for path in env.values()}
        assert own.is_dir() and own.name.startswith("vllm-startup-")
        if len(folders) == 3:
            raise KeyboardInterrupt
        return {"phases": dict.fromkeys(PHASES, 1.0), "total": 7.0, "compiled": 1, "loaded": 0}

    monkeypatch.setattr(startup, "run_job", fake)
    words = ("--num-cold", 2, "--num-warm", 1, "--output-json", tmp_path / "s.json")
    assert bench("startup", "preset:tiny", *words) == 130
    found = json.loads((tmp_path / "s.json").read_text())
    assert (
        [start["kind"] for start in found["starts"]] == ["cold", "cold"]
        and found["interrupted"]
        and not found["complete"]
    )
    # Every cold start has empty caches of its own, and the warm one those of the last cold one; all are gone afterwards.
    assert folders[0] != folders[1] == folders[2]
    assert not any(map(startup.Path.exists, (startup.Path(path).parent for env in folders for path in env.values())))


def test_phases_do_not_overlap(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(startup_child.time, "time", lambda: now[0])
    timeline = Timeline(95.0)
    with timeline.phase(WEIGHTS):
        now[0] += 2
        with timeline.phase(IMPORT):
            now[0] += 3
        now[0] += 1
        timeline.inside(COMPILED, 0.5)
    now[0] += 4
    timeline.switch(now[0])
    found = {name: seconds for name, seconds in timeline.seconds.items() if seconds}
    assert found == {REST: 9, WEIGHTS: 2.5, IMPORT: 3, COMPILED: 0.5}


def test_a_job_that_breaks_says_why():
    with pytest.raises(JobFailed, match="KeyError: 'nothing'"):
        run_job("nothing", {})


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["latncy"], 2, "no command bench 'latncy'; did you mean latency?"),
        (["xyz"], 2, "there are: latency, throughput, serve, startup, ab, compare"),
        (["latency", "--batch-size", "0"], 2, "--batch-size must be at least 1"),
        (["latency", "--num-iters-warmup", "-1"], 2, "--num-iters-warmup must be at least 0"),
        (
            ["latency", "--batch-size", "4", "--max-num-seqs", "2"],
            2,
            "a concurrency of 4 with 160 tokens each does not fit",
        ),
        (["throughput", "--num-prompts", "0"], 2, "--num-prompts must be at least 1"),
        (["startup", "--num-cold", "0"], 2, "--num-cold and --input-len must be at least 1"),
        (["startup", "--model", "preset:none"], 2, "no preset 'none'"),
        (["latency", "--output-dir", "/proc/none"], 2, "--output-dir /proc/none: "),
        (["compare", "a.json"], 2, "required: NEW"),
    ],
)
def test_mistakes_are_one_line(capsys, words, code, message):
    assert bench(*words) == code
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines()[-1].startswith("error: ") and message in err and "Traceback" not in err


def test_help(capsys):
    assert bench() == bench("--help") == 0
    out = capsys.readouterr().out
    assert all(name in out for name in group.COMMANDS)
    for name in group.COMMANDS:
        assert bench(name, "--help") == 0
        assert f"usage: vllm bench {name}" in capsys.readouterr().out


def test_without_matplotlib_the_message_says_what_to_install(monkeypatch, tmp_path, capsys):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    assert bench(*LATENCY, "--output-dir", tmp_path) == 2
    assert "pip install matplotlib, or install vllm[bench]" in capsys.readouterr().err
    assert bench(*LATENCY, "--num-iters-warmup", 0, "--output-dir", tmp_path, "--no-plots", "--git", "abc") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latency.json", "latency.md"]
    assert json.loads((tmp_path / "latency.json").read_text())["environment"]["git"] == "abc"


def test_what_a_result_says_of_the_machine():
    facts = environment()
    assert facts["vllm"] and facts["versions"]["torch"] and facts["cpu"]["cores"] and facts["date"].startswith("20")
    clocks = parse_clocks("1980, 1980, 2619, 121.5, 700.00, [N/A]\n")
    assert clocks == {"sm_mhz": 1980, "max_sm_mhz": 1980, "memory_mhz": 2619, "power_w": 121.5, "power_limit_w": 700}
    assert parse_clocks("") == {}


def test_files_are_written_whole(tmp_path):
    path = tmp_path / "deep" / "x.json"
    write_json(path, {"a": 1.23456789, "b": [float("inf"), {"c": (1, 2)}], "d": True})
    assert json.loads(path.read_text()) == {"a": 1.23457, "b": [None, {"c": [1, 2]}], "d": True}
    assert [p.name for p in path.parent.iterdir()] == ["x.json"] and rounded(7) == 7
