"""`vllm bench ab` on the bundled checkpoint, on whatever device there is."""

import json
import subprocess
import sys

import pytest

from vllm.benchmarks import ab_engine
from vllm.benchmarks.ab_engine import agreement, agreements
from vllm.benchmarks.stats import FASTER, NO_DIFFERENCE, SLOWER
from vllm.benchmarks.variants import parse_variant
from vllm.entrypoints.cli import main as cli

SMALL = ("preset:tiny", "--input-len", "8", "--output-len", "8", "--check-len", "6")


def bench(*words):
    return cli.main(["bench", "ab", *map(str, words)])


def verdicts(result):
    return [found["decode_tok_s"]["verdict"] for point in result["points"] for found in point["comparisons"].values()]


def test_a_thing_beside_itself_shows_no_difference(tmp_path, capsys):
    """The whole command, on a machine that may be doing other things. How often the defaults are wrong is in test_stats.py: one time in a hundred,
    which is too often for a test that always runs."""
    variants = ("--a", "gdn_in_proj=fused", "--b", "gdn_in_proj=fused", "--concurrency", "1,2")
    sure = ("--rounds", 12, "--confidence", 0.999, "--min-effect", 0.05)
    assert bench(*SMALL, *variants, *sure, "--output-dir", tmp_path, "--no-plots") == 0
    result = json.loads((tmp_path / "ab.json").read_text())
    assert verdicts(result) == [NO_DIFFERENCE] * 2
    assert result["complete"] and [point["concurrency"] for point in result["points"]] == [1, 2]
    assert all(len(point["rounds"]) == 12 for point in result["points"])
    assert capsys.readouterr().out.count(NO_DIFFERENCE) == 2


@pytest.mark.parametrize(("factor", "verdict"), [(20, FASTER), (1 / 20, SLOWER)])
def test_a_slower_variant_is_seen(monkeypatch, tmp_path, factor, verdict):
    """The same, with one variant's clock changed: the verdict is not always the same words."""
    real, current = ab_engine.run_batch, []
    switch = ab_engine.SharedEngine.switch

    def remember(self, variant):
        current[:] = [variant.label]
        return switch(self, variant)

    def changed(engine, prompts, output_len):
        found = real(engine, prompts, output_len)
        return found if current == ["A"] else type(found)(**{**vars(found), "seconds": found.seconds / factor})

    monkeypatch.setattr(ab_engine.SharedEngine, "switch", remember)
    monkeypatch.setattr(ab_engine, "run_batch", changed)
    assert (
        bench(*SMALL, "--a", "base", "--b", "gdn_in_proj=serial", "--rounds", 8, "--output-dir", tmp_path, "--no-plots")
        == 0
    )
    assert verdicts(json.loads((tmp_path / "ab.json").read_text())) == [verdict]


def test_variants_alternate_on_one_engine_and_say_the_same(monkeypatch, tmp_path):
    """Roofline, profile and accuracy come with it, and every page and plot."""
    order = []
    real = ab_engine.run_batch

    def noted(engine, prompts, output_len):
        (variants,) = {tuple(layer.variants) for layer in engine.core.worker.runner.model.stateful_layers().gdn}
        order.append((id(engine), *variants[:2], len(prompts)))
        return real(engine, prompts, output_len)

    monkeypatch.setattr(ab_engine, "run_batch", noted)
    variants = ("--a", "gdn_in_proj=serial,gdn_decode=unpacked", "--b", "gdn_decode=packed")
    more = (
        "--gdn-in-proj",
        "fused",
        "--roofline",
        "--profile",
        "--accuracy",
        "--accuracy-items",
        1,
        "--max-logprob-difference",
        0.1,
    )
    assert bench(*SMALL, *variants, *more, "--concurrency", 3, "--rounds", 2, "--output-dir", tmp_path) == 0
    pattern = [("serial", "unpacked"), ("fused", "packed")] * 3
    assert [entry[1:] for entry in order] == [(*names, 3) for names in pattern]
    assert len({entry[0] for entry in order}) == 1

    result = json.loads((tmp_path / "ab.json").read_text())
    assert [(row["concurrency"], row["variant"], row["same"]) for row in result["agreement"]] == [(3, "B", 3)]
    exact = result["environment"]["gpu"] is None  # float32
    assert all(0 < row["largest_logprob_difference"] < (0.01 if exact else 0.5) for row in result["agreement"])
    for point in result["points"]:
        for values in point["variants"].values():
            total, each = (values[name]["median"] for name in ("decode_tok_s", "tok_s_a_request"))
            assert total == pytest.approx(each * point["concurrency"], rel=1e-4)
            assert values["ttft_ms"]["median"] > 0
        # in each round, since one median is not the inverse of the other
        for found in (found for row in point["rounds"] for found in row.values()):
            assert found["step_ms"] == pytest.approx(1e3 / found["tok_s_a_request"], rel=0.2)
        assert [found["decode_tok_s"]["verdict"] for found in point["comparisons"].values()] == [NO_DIFFERENCE]
    rows = result["roofline"]["rows"]
    assert len(rows) == 2 and all(0 < row["share"] < 1 and row["bytes"]["GDN state"] > 0 for row in rows)
    assert result["roofline"]["read_bytes_s"] > 1e8
    assert [(found["variant"], found["concurrency"]) for found in result["profile"]] == [
        ("A", 3),
        ("B", 3),
    ]
    for found in result["profile"]:
        names = {part["name"] for part in found["components"]}
        assert {"GDN in_proj", "GDN core", "GDN out_proj", "attention", "routed experts", "lm_head", "norms"} <= names
        assert "unknown" not in names and found["kernels_a_step"] > 50
    scores = result["accuracy"]["scores"]
    assert len(scores) == 2 and all(sum(tasks.values()) >= 6 for tasks in scores.values())
    page = (tmp_path / "ab.md").read_text()
    assert all(f"## {name}\n" in page for name in ("Speed", "Agreement", "Roofline", "Where a step goes", "Accuracy"))
    images = sorted(path.name for path in tmp_path.glob("*.png"))
    assert {"ab-speed.png", "ab-roofline.png", "ab-components-at-3.png", "ab-components-flame-B-at-3.png"} <= set(
        images
    )
    assert all(f"({name})" in page for name in images)


@pytest.mark.gpu
def test_kernels_of_graphs_find_their_components(tmp_path):
    """Decode steps are CUDA graphs here, so the components come from a run without, in a process of its own."""
    words = (
        "--a",
        "gdn_in_proj=fused",
        "--b",
        "gdn_in_proj=dual_stream",
        "--rounds",
        1,
        "--concurrency",
        "1,4",
        "--profile",
        "--roofline",
    )
    assert bench(*SMALL, *words, "--output-dir", tmp_path, "--no-plots") == 0
    result = json.loads((tmp_path / "ab.json").read_text())
    assert result["roofline"]["read_bytes_s"] > 1e11
    for found in result["profile"]:
        shares = {part["name"]: part["share"] for part in found["components"]}
        assert shares.get("unknown", 0) < 0.05 and {"GDN in_proj", "GDN core", "routed experts", "lm_head"} <= set(
            shares
        )


def test_what_needs_a_restart_gets_fresh_processes(tmp_path, capsys):
    variants = ("--a", "mamba_ssm_cache_dtype=float32", "--b", "mamba_ssm_cache_dtype=bfloat16")
    assert (
        bench(
            *SMALL, *variants, "--rounds", 1, "--concurrency", 2, "--roofline", "--output-dir", tmp_path, "--no-plots"
        )
        == 0
    )
    result = json.loads((tmp_path / "ab.json").read_text())
    assert result["fresh_processes"] and verdicts(result) == [NO_DIFFERENCE]
    (agreed,) = result["agreement"]
    assert agreed["prompts"] == 2 and agreed["largest_logprob_difference"] > 0
    state = {row["variant"]: row["bytes"]["GDN state"] for row in result["roofline"]["rows"]}
    assert state["A"] > 1.5 * state["B"]
    assert "too few rounds" in capsys.readouterr().out


def test_an_interrupted_run_keeps_what_it_has(monkeypatch, tmp_path, capsys):
    real, calls = ab_engine.run_batch, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 15:  # in the second round at the second concurrency
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(ab_engine, "run_batch", interrupted)
    words = (
        "--a",
        "base",
        "--b",
        "gdn_in_proj=serial",
        "--concurrency",
        "1,2,4",
        "--rounds",
        3,
        "--output-dir",
        tmp_path,
    )
    assert bench(*SMALL, *words) == 130
    result = json.loads((tmp_path / "ab.json").read_text())
    assert result["interrupted"] and not result["complete"]
    assert [(point["concurrency"], len(point["rounds"])) for point in result["points"]] == [(1, 3), (2, 2)]
    assert "Not complete" in (tmp_path / "ab.md").read_text()
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--a", "gdn_in_proj=seriel", "--b", "base"],
            "--a gdn_in_proj=seriel: argument --gdn-in-proj: invalid choice: 'seriel'",
        ),
        (["--a", "gdn_inproj=fused", "--b", "base"], "did you mean --gdn-in-proj?"),
        (["--a", "fused", "--b", "base"], "expected name=value"),
        (["--a", "base"], "the following arguments are required: --b"),
        (["--a", "base", "--b", "base", "--concurrency", "1,x"], "--concurrency 1,x: expected whole numbers"),
        (["--a", "base", "--b", "base", "--rounds", "0"], "--rounds must be at least 1"),
        (["--a", "base", "--b", "base", "--confidence", "2"], "--confidence must lie in 0.5 to 1"),
        (
            ["--a", "base", "--b", "base", "--concurrency", "9", "--max-num-seqs", "4"],
            "a concurrency of 9 with 16 tokens each does not fit: state slots allow 4",
        ),
        (
            ["--a", "base", "--b", "base", "--concurrency", "16", "--kv-cache-memory-bytes", "4M"],
            "--max-num-seqs 16 needs 13.3 MiB of GDN state",
        ),
        (
            ["--a", "base", "--b", "base", "--concurrency", "4", "--num-gpu-blocks-override", "4"],
            "attention pages allow 3",
        ),
        (["--a", "base", "--b", "base", "--output-len", "3"], "raise --output-len"),
        (["--a", "base", "--b", "gdn_in_proj=serial", "--max-logprob-difference", "0"], "log-probabilities differ by"),
    ],
)
def test_mistakes_are_one_line(capsys, words, message):
    assert bench(*SMALL, *words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines()[-1].startswith("error: ") and message in err.splitlines()[-1]
    assert "Traceback" not in err


def test_a_variant_that_fails_in_its_process_is_one_line(capsys):
    words = ("--a", "max_num_seqs=1", "--b", "base", "--concurrency", 2, "--rounds", 1)
    assert bench(*SMALL, *words) == 2
    assert (
        "a concurrency of 2 with 16 tokens each does not fit: state slots allow 1"
        in capsys.readouterr().err.splitlines()[-1]
    )


def test_variants():
    parsed = parse_variant(
        "B", 'gdn-decode=packed, VLLM_X=1,hf_overrides={"a":1,"b":[2,3]},enable_chunked_prefill=false'
    )
    assert parsed.settings == {
        "gdn_decode": "packed",
        "hf_overrides": {"a": 1, "b": [2, 3]},
        "enable_chunked_prefill": False,
    }
    assert parsed.env == {"VLLM_X": "1"} and parsed.needs_restart and parsed.label == "B"
    assert not parse_variant("A", "gdn_decode=auto,gdn_prefill_backend=torch").needs_restart
    assert parse_variant("A", "gdn_decode=auto").settings == {"gdn_decode": "auto"}  # a default that is named is meant
    assert parse_variant("A", "base").settings == {} and not parse_variant("A", "base").needs_restart
    assert parse_variant("A", "dtype=float32").needs_restart and parse_variant("A", "VLLM_X=0").needs_restart


def output(tokens, *logprobs):
    return {"tokens": tokens, "logprobs": list(logprobs)}


def test_agreement():
    a = [output([1, 2, 3], {"1": -0.1}, {"2": -0.2, "9": -3.0}, {"3": -0.3}), output([5, 6], {"5": -1.0}, {"6": -1.0})]
    b = [output([1, 9, 3], {"1": -0.1}, {"9": -0.5, "2": -0.7}, {"3": -9.0}), output([5, 6], {"5": -1.25}, {"6": -1.0})]
    # After the first token that differs the texts are others, and so are their probabilities.
    assert agreement(a, b) == {"prompts": 2, "same": 1, "first_difference": 1, "largest_logprob_difference": 2.5}
    assert agreement(a, a) == {"prompts": 2, "same": 2, "first_difference": None, "largest_logprob_difference": 0.0}
    assert [row["variant"] for row in agreements({"A": a, "B": b, "C": a}, 2)] == ["B", "C"]


def test_help_needs_no_torch():
    code = "import sys; from vllm.entrypoints.cli.main import main; main(['bench', 'ab', '--help']); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
