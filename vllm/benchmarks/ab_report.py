"""What the numbers of `vllm bench ab` say, as tables for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vllm.benchmarks.report import markdown_table, table
from vllm.benchmarks.stats import compare_rounds, median_with_bounds

Table = Callable[[list[str], list[list[str]]], str]
MEASURES = ("decode_tok_s", "tok_s_a_request", "step_ms", "ttft_ms")
HEAD = ["concurrency, variant", "tok/s", "a request", "ms a step", "TTFT ms", "x A", "interval", "verdict"]


def summarise_point(
    concurrency: int, rounds: Sequence[dict[str, dict[str, float]]], confidence: float, min_effect: float
) -> dict[str, Any]:
    """Medians with bounds of each variant, and each variant's decode speed and time to first token beside the first one's."""
    first, *others = rounds[0]
    column = lambda label, name: [row[label][name] for row in rounds]
    comparisons = {}
    for label in others:
        found = {}
        for name, invert in (("decode_tok_s", False), ("ttft_ms", True)):
            a, b = column(first, name), column(label, name)
            # A time is compared upside down, so that above 1 is better everywhere.
            ratio = compare_rounds(b, a, confidence=confidence, min_effect=min_effect) if invert else None
            ratio = ratio or compare_rounds(a, b, confidence=confidence, min_effect=min_effect)
            found[name] = {"ratio": ratio.value, "low": ratio.low, "high": ratio.high, "verdict": ratio.verdict}
        comparisons[label] = found
    return {
        "concurrency": concurrency,
        "variants": {
            label: {name: median_with_bounds(column(label, name), confidence) for name in MEASURES}
            for label in rounds[0]
        },
        "comparisons": comparisons,
        "rounds": list(rounds),
    }


def point_rows(point: dict[str, Any], names: dict[str, str]) -> list[list[str]]:
    """One row a variant."""
    rows = []
    for label, values in point["variants"].items():
        total, each, step, ttft = (values[name]["median"] for name in MEASURES)
        row = [
            f"{point['concurrency']:>4}  {names[label]}",
            f"{total:.1f}",
            f"{each:.1f}",
            f"{step:.2f}",
            f"{ttft:.1f}",
        ]
        compared = point["comparisons"].get(label)
        rows.append([*row, *(["", "", ""] if compared is None else _verdict(compared["decode_tok_s"]))])
    return rows


def _verdict(found: dict[str, Any]) -> list[str]:
    low, high = found["low"], found["high"]
    known = low and high is not None and high != float("inf")
    return [f"{found['ratio']:.3f}", f"{low:.3f} to {high:.3f}" if known else "too few rounds", found["verdict"]]


def speed(result: dict[str, Any], make: Table = table) -> str:
    """All points."""
    names = {label: f"{label}: {variant['text']}" for label, variant in result["variants"].items()}
    return make(HEAD, [row for point in result["points"] for row in point_rows(point, names)])


def agreement(result: dict[str, Any], make: Table = table) -> str:
    """Whether the variants said the same."""
    head = ["concurrency", "variants", "same tokens", "first difference", "largest log-probability difference"]
    rows = []
    for found in result["agreement"]:
        first = found["first_difference"]
        rows.append(
            [
                str(found["concurrency"]),
                f"{found['variant']} and {found['base']}",
                f"{found['same']} of {found['prompts']}",
                "none" if first is None else f"token {first + 1}",
                f"{found['largest_logprob_difference']:.2g}",
            ]
        )
    return make(head, rows)


def rooflines(result: dict[str, Any], make: Table = table) -> str:
    """Bytes a step by component, and the share of the read bandwidth that each variant reaches."""
    found = result["roofline"]
    rows = found["rows"]
    head = ["concurrency, variant", "MB a step", "floor ms", "ms a step", "share"]
    lines = [
        [
            f"{row['concurrency']:>4}  {row['variant']}",
            f"{row['total'] / 1e6:,.1f}",
            f"{row['floor_ms']:.3f}",
            f"{row['step_ms']:.3f}",
            f"{row['share']:.1%}",
        ]
        for row in rows
    ]
    first = [row for row in rows if row["variant"] == rows[0]["variant"]]
    names = list(dict.fromkeys(name for row in first for name in row["bytes"]))
    parts = [[name, *(f"{row['bytes'].get(name, 0) / 1e6:,.2f}" for row in first)] for name in names]
    bytes_head = [f"MB a step of {rows[0]['variant']}, by concurrency", *(str(row["concurrency"]) for row in first)]
    speed = f"Reading alone reaches {found['read_bytes_s'] / 1e9:,.1f} GB/s here."
    return "\n\n".join([speed, make(head, lines), make(bytes_head, parts)])


def profiles(result: dict[str, Any], make: Table = table) -> str:
    """Time by component of each profiled variant."""
    unit = "kernels" if result["environment"]["gpu"] else "operators"
    head = ["variant, component", "us a step", "share", f"{unit} a step", "largest"]
    rows = []
    for found in result["profile"]:
        name = f"{found['variant']} at {found['concurrency']}" if "variant" in found else f"at {found['concurrency']}"
        rows.append([f"{name}: all", f"{found['busy_us_a_step']:.1f}", "", f"{found['kernels_a_step']:.0f}", ""])
        if "idle_share" in found:
            rows.append(["    GPU idle, of the time", "", f"{found['idle_share']:.1%}", "", ""])
        for part in found["components"]:
            largest = part["kernels"][0]["name"][:48] if part["kernels"] else ""
            rows.append(
                [
                    f"    {part['name']}",
                    f"{part['us_a_step']:.1f}",
                    f"{part['share']:.1%}",
                    f"{part['kernels_a_step']:.1f}",
                    largest,
                ]
            )
    return make(head, rows)


def accuracies(result: dict[str, Any], make: Table = table) -> str:
    """Scores of the bundled checkpoint's tasks."""
    found = result["accuracy"]
    tasks = list(next(iter(found["scores"].values())))
    rows = [[label, *(f"{scores[task]:.1%}" for task in tasks)] for label, scores in found["scores"].items()]
    return f"{found['count']} held-out items a task, answered exactly.\n\n{make(['variant', *tasks], rows)}"


def sections(result: dict[str, Any], make: Table = markdown_table) -> list[tuple[str, str]]:
    """(heading, text) of what the result holds."""
    there = [
        ("Speed", "points", speed),
        ("Agreement", "agreement", agreement),
        ("Roofline", "roofline", rooflines),
        ("Where a step goes", "profile", profiles),
        ("Accuracy", "accuracy", accuracies),
    ]
    return [(heading, write(result, make)) for heading, key, write in there if result.get(key)]
