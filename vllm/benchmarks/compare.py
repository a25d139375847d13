"""`vllm bench compare old.json new.json`: what became faster and what slower between two versions, images or drivers.

Each side is a file, a folder of files, or several of either with commas between: runs of the same command, whose medians are compared. Every
ratio says how many times as good the new side is, so that below 1 is worse whether the measure is a speed or a time.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm.benchmarks.report import table
from vllm.benchmarks.stats import compare_groups

Result = dict[str, Any]
Measures = dict[str, tuple[float, bool]]
"""Name -> (value, whether higher is better)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """This command's flags."""
    parser.add_argument("old", metavar="OLD", help="result file or folder, or several with commas between")
    parser.add_argument("new", metavar="NEW", help="the same of the new version")
    parser.add_argument(
        "--fail-under", type=float, metavar="X", help="exit with 1 where a ratio is below this, such as 0.97"
    )
    parser.add_argument(
        "--confidence",
        type=float,
        default=0.95,
        metavar="X",
        help="of the intervals, where a side has several runs [0.95]",
    )
    parser.add_argument("--force", action="store_true", help="compare although models, devices or workloads differ")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    """0; 1 where a ratio is below --fail-under; 2 where the sides cannot be compared."""
    if args.fail_under is not None and args.fail_under <= 0:
        raise ValueError(f"--fail-under must be above 0; got {args.fail_under:g}")
    old, new = read_side(args.old), read_side(args.new)
    check_alike(old, new, args.force)
    rows = compare(old, new, args.confidence)
    failed = [row for row in rows if args.fail_under is not None and row["ratio"] < args.fail_under]
    if args.json:
        print(
            json.dumps(
                {
                    "old_runs": len(old),
                    "new_runs": len(new),
                    "rows": rows,
                    "failed": [row["measure"] for row in failed],
                },
                indent=1,
            )
        )
    else:
        print(f"{len(old)} old and {len(new)} new runs of vllm bench {old[0]['benchmark']}\n\n{as_table(rows)}")
    for row in failed:
        print(f"FAILED {row['measure']}: {row['ratio']:.3f} times as good, below {args.fail_under:g}", file=sys.stderr)
    return 1 if failed else 0


def read_side(text: str) -> list[Result]:
    """The results that a side names.

    Raises:
        FileNotFoundError, ValueError: no such file, not a complete result of `vllm bench`, or results of several commands.
    """
    files: list[Path] = []
    for word in text.split(","):
        path = Path(word).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"{word}: no such file or folder")
        files += sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"{text}: no *.json in it")
    results = [_read(path) for path in files]
    kinds = sorted({result["benchmark"] for result in results})
    if len(kinds) > 1:
        raise ValueError(f"{text}: results of several commands: {', '.join(kinds)}")
    return results


def _read(path: Path) -> Result:
    try:
        result = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(result, dict) or result.get("benchmark") not in _MEASURES:
        raise ValueError(f"{path}: not a result of vllm bench {', '.join(_MEASURES)}")
    if not result.get("complete", True):
        raise ValueError(f"{path}: the run was interrupted, and its result is not complete")
    return result


def check_alike(old: list[Result], new: list[Result], force: bool) -> None:
    """Raise ValueError, or warn with `force`, where the sides did not measure the same thing on the same device."""
    if old[0]["benchmark"] != new[0]["benchmark"]:
        raise ValueError(f"the old side is of bench {old[0]['benchmark']}, the new one of bench {new[0]['benchmark']}")
    for name, find in _CONDITIONS.items():
        seen = [{json.dumps(find(result), sort_keys=True) for result in side} for side in (old, new)]
        if seen[0] | seen[1] != seen[0] or len(seen[0]) > 1:
            message = f"{name} differs: {', '.join(sorted(seen[0]))} and {', '.join(sorted(seen[1]))}"
            if not force:
                raise ValueError(f"{message}; --force compares all the same")
            print(f"warning: {message}", file=sys.stderr)


def compare(old: list[Result], new: list[Result], confidence: float = 0.95) -> list[dict[str, Any]]:
    """One row a measure that both sides have."""
    read = _MEASURES[old[0]["benchmark"]]
    before, after = [[read(result) for result in side] for side in (old, new)]
    rows = []
    for name, (_, higher) in before[0].items():
        if not all(name in run for run in before + after):
            continue
        x, y = ([run[name][0] for run in side] for side in (before, after))
        if min(x + y) <= 0:
            continue  # a time of 0 is one that was not measured
        found = compare_groups(x, y, confidence=confidence) if higher else compare_groups(y, x, confidence=confidence)
        known = found.low > 0 and math.isfinite(found.high)
        rows.append(
            {
                "measure": name,
                "old": statistics.median(x),
                "new": statistics.median(y),
                "ratio": found.value,
                "low": found.low if known else None,
                "high": found.high if known else None,
                "verdict": found.verdict if known else None,
            }
        )
    return rows


def as_table(rows: list[dict[str, Any]]) -> str:
    """One line a measure."""
    lines = [
        [
            row["measure"],
            f"{row['old']:.4g}",
            f"{row['new']:.4g}",
            f"{row['ratio']:.3f}",
            "too few runs" if row["low"] is None else f"{row['low']:.3f} to {row['high']:.3f}",
            row["verdict"] or "",
        ]
        for row in rows
    ]
    return table(["measure", "old", "new", "times as good", "interval", "verdict"], lines)


def _latency(result: Result) -> Measures:
    return {"avg_latency": (result["avg_latency"], False), "median latency": (result["percentiles"]["50"], False)}


def _throughput(result: Result) -> Measures:
    return {name: (result[name], True) for name in ("requests_per_second", "tokens_per_second")}


def _serve(result: Result) -> Measures:
    speeds = {name: (result[name], True) for name in ("request_throughput", "output_throughput")}
    times = ("mean_ttft_ms", "median_ttft_ms", "mean_tpot_ms", "median_tpot_ms", "mean_itl_ms", "mean_e2el_ms")
    return speeds | {name: (result[name], False) for name in times if name in result}


def _startup(result: Result) -> Measures:
    return {name: (result[name], False) for name in ("cold_seconds", "warm_seconds") if name in result}


def _ab(result: Result) -> Measures:
    found = {}
    for point in result["points"]:
        for label, values in point["variants"].items():
            name = f"{result['variants'][label]['text']} at {point['concurrency']}"
            found[f"{name}, tok/s"] = (values["decode_tok_s"]["median"], True)
            found[f"{name}, TTFT ms"] = (values["ttft_ms"]["median"], False)
    return found


_MEASURES: dict[str, Callable[[Result], Measures]] = {
    "latency": _latency,
    "throughput": _throughput,
    "serve": _serve,
    "startup": _startup,
    "ab": _ab,
}
_WORKLOAD = (
    *("input_len", "output_len", "batch_size", "dataset_name", "num_prompts", "random_input_len", "random_output_len"),
    *("request_rate", "burstiness", "max_concurrency", "concurrency"),
)
_CONDITIONS: dict[str, Callable[[Result], Any]] = {
    "the model": lambda result: result.get("model") or result.get("model_id"),
    "the device": lambda result: (
        result.get("environment", {}).get("gpu") or result.get("environment", {}).get("cpu", {}).get("name")
    ),
    "the workload": lambda result: {
        name: result.get("flags", {}).get(name) for name in _WORKLOAD if name in result.get("flags", {})
    },
}
