import json

import pytest

from vllm.entrypoints.cli import main as cli


def result(**changes):
    found = {
        "benchmark": "latency",
        "complete": True,
        "model": "preset:tiny",
        "flags": {"input_len": 32, "output_len": 128, "batch_size": 8, "port": 8000},
        "environment": {"gpu": "NVIDIA H200", "cpu": {"name": "x"}},
        "avg_latency": 2.0,
        "percentiles": {"50": 1.9},
    }
    return found | changes


def write(path, **changes):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result(**changes)))
    return path


def bench(*words):
    return cli.main(["bench", "compare", *map(str, words)])


def test_below_the_limit_fails(tmp_path, capsys):
    old, new = write(tmp_path / "old.json"), write(tmp_path / "new.json", avg_latency=2.2)
    assert bench(old, new) == 0
    assert bench(old, new, "--fail-under", 0.97) == 1
    out, err = capsys.readouterr()
    assert "avg_latency" in out and "0.909" in out
    assert err == "FAILED avg_latency: 0.909 times as good, below 0.97\n"
    assert bench(new, old, "--fail-under", 0.97) == 0


def test_several_runs_a_side(tmp_path, capsys):
    for i, value in enumerate((2.0, 2.02, 1.99, 2.01, 9.0)):
        write(tmp_path / "old" / f"{i}.json", avg_latency=value)
        write(tmp_path / "new" / f"{i}.json", avg_latency=value / 1.25)
    assert bench(tmp_path / "old", tmp_path / "new", "--json", "--fail-under", "0.97") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["old_runs"], found["new_runs"]) == (5, 5)
    row = found["rows"][0]
    assert row["ratio"] == pytest.approx(1.25) and row["old"] == 2.01 and row["low"] is not None
    listed = ",".join(str(tmp_path / "old" / f"{i}.json") for i in range(3))
    assert bench(listed, tmp_path / "new") == 0
    assert capsys.readouterr().out.startswith("3 old and 5 new runs of vllm bench latency")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "other"}, "the model differs"),
        ({"environment": {"gpu": "NVIDIA H100"}}, "the device differs"),
        ({"flags": {"input_len": 64}}, "the workload differs"),
    ],
)
def test_what_was_measured_must_be_alike(tmp_path, capsys, changes, message):
    old, new = write(tmp_path / "old.json"), write(tmp_path / "new.json", **changes)
    assert bench(old, new) == 2
    assert message in capsys.readouterr().err
    assert bench(old, new, "--force") == 0
    assert f"warning: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "not a result of vllm bench"),
        (json.dumps(result(complete=False)), "the run was interrupted"),
        (json.dumps(result(benchmark="serve")), "the old side is of bench latency, the new one of bench serve"),
    ],
)
def test_wrong_files(tmp_path, capsys, content, message):
    old, new = write(tmp_path / "old.json"), tmp_path / "new.json"
    new.write_text(content)
    assert bench(old, new) == 2
    assert message in capsys.readouterr().err
    assert bench(old, tmp_path / "none.json") == 2
    assert "no such file" in capsys.readouterr().err


def test_every_kind_of_result_has_measures(tmp_path, capsys):
    median = {"median": 5.0, "low": None, "high": None}
    point = {"concurrency": 2, "variants": {"A": {"decode_tok_s": median, "ttft_ms": median}}}
    kinds = {
        "throughput": {"requests_per_second": 3.0, "tokens_per_second": 4.0},
        "serve": {"request_throughput": 3.0, "output_throughput": 4.0, "mean_ttft_ms": 5.0},
        "startup": {"cold_seconds": 9.0, "warm_seconds": 4.0},
        "ab": {"variants": {"A": {"text": "base"}}, "points": [point]},
    }
    for kind, values in kinds.items():
        path = write(tmp_path / f"{kind}.json", benchmark=kind, **values)
        assert bench(path, path, "--json", "--fail-under", 1) == 0
        rows = json.loads(capsys.readouterr().out)["rows"]
        assert len(rows) >= 2 and all(row["ratio"] == 1 for row in rows)
