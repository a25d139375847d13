"""Write the results in docs/benchmarks.md from what `vllm bench ... --output-dir benchmarks/results/bench/NAME` has left.

python benchmarks/bench_tables.py [--check | --plots]

Everything between the two bench-results marks is replaced. --check changes nothing and exits with 1 where the page is out of date. --plots first
draws the plots of every result again, for those that were measured with --no-plots.
"""

import json
import os
from pathlib import Path
from typing import Any

from pages import ROOT, arguments, rewrite

from vllm.benchmarks import ab_report
from vllm.benchmarks.environment import device_name
from vllm.benchmarks.report import markdown_table
from vllm.benchmarks.startup import phase_table

PAGE = ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "benchmarks" / "results" / "bench"


def numbers(result: dict[str, Any], names: tuple[str, ...]) -> str:
    return markdown_table(["", "value"], [[name, f"{result[name]:,.4g}"] for name in names if result.get(name)])


def sections(result: dict[str, Any]) -> list[tuple[str, str]]:
    """(heading, Markdown) of one result."""
    kind = result["benchmark"]
    if kind == "startup":
        return [("Seconds to the first token", markdown_table(*phase_table(result)))]
    own = {
        "latency": ("avg_latency",),
        "throughput": ("requests_per_second", "tokens_per_second", "output_tokens_per_second"),
        "serve": (
            "request_throughput",
            "output_throughput",
            "median_ttft_ms",
            "median_tpot_ms",
            "p99_ttft_ms",
            "p99_tpot_ms",
        ),
    }
    head = [("Result", numbers(result, own[kind]))] if kind in own else []
    return head + ab_report.sections(result)


def chapter(path: Path) -> str:
    """One result: what and where, its tables, its plots."""
    result = json.loads(path.read_text())
    facts, model = result["environment"], result.get("model") or result.get("model_id")
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    state = "" if result["complete"] else " **Not complete: the run ended early.**"
    source = (
        f"`{path.relative_to(ROOT)}`, vllm {facts['vllm']} ({facts['git']}), {versions}, {facts['date'][:10]}.{state}"
    )
    lines = [f"### {path.parent.name}: {model} on {device_name(facts)}", "", f"`{result['command']}`", "", source, ""]
    for heading, text in sections(result):
        lines += [f"#### {heading}", "", text, ""]
    for image in sorted(path.parent.glob(f"{result['benchmark']}-*.png")):
        lines += [f"![{image.stem}]({os.path.relpath(image, PAGE.parent)})", ""]
    return "\n".join(lines)


def result_files() -> list[Path]:
    return [
        path
        for path in sorted(RESULTS.glob("*/*.json"))
        if path.stem in ("ab", "latency", "throughput", "serve", "startup")
    ]


def generated() -> str:
    """The text between the marks."""
    chapters = "\n".join(map(chapter, result_files()))
    return f"\n{chapters or 'No results are in the repository yet.'}\n\n"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--plots", action="store_true", help="draw every result's plots again first")
    args = parser.parse_args()
    if args.plots:
        from vllm.benchmarks.plots import draw

        for path in result_files():
            draw(json.loads(path.read_text()), path.parent)
    rewrite(PAGE, generated, args.check)


if __name__ == "__main__":
    main()
