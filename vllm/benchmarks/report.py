"""Where results go: one JSON file that says how it came about, a Markdown page made from it, and plots where matplotlib is there."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm.benchmarks.environment import device_name, environment
from vllm.entrypoints.cli.plan import table

__all__ = ["begin", "check_output_dir", "markdown_page", "markdown_table", "table", "write_json", "write_report"]


def add_output_dir(parser: argparse.ArgumentParser) -> None:
    """The flag that every command has."""
    parser.add_argument(
        "--output-dir", metavar="DIR", help="write the result as JSON, Markdown and plots into this folder"
    )
    parser.add_argument("--no-plots", action="store_true", help="JSON and Markdown only, which need no matplotlib")
    parser.add_argument("--git", metavar="HASH", help="the commit to name in the result, where this is no checkout")


def check_output_dir(args: argparse.Namespace) -> None:
    """Find out before hours of measuring: the folder can be written, and matplotlib is there for the plots.

    Raises:
        ValueError: one of them is not so; the message says what to do.
    """
    folder = args.output_dir
    if folder is None:
        return
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output-dir {folder}: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise ValueError(f"--output-dir {folder}: the folder cannot be written")
    if args.no_plots:
        return
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError(
            "--output-dir makes plots with matplotlib, which is not installed: pip install matplotlib, or install vllm[bench], or add "
            "--no-plots"
        ) from None


def begin(benchmark: str, args: argparse.Namespace) -> dict[str, Any]:
    """A result that has measured nothing yet. It is complete only once `complete` is set."""
    # argv[0] is a path of this machine's; what matters of it is the command's name.
    words = sys.argv[1:] if Path(sys.argv[0]).name in ("vllm", "main.py") else ["bench", benchmark]
    return {
        "benchmark": benchmark,
        "complete": False,
        "interrupted": False,
        "command": shlex.join(["vllm", *words]),
        "flags": {name: value for name, value in vars(args).items() if is_plain(value)},
        "environment": environment() | ({"git": args.git} if args.git else {}),
    }


def is_plain(value: Any) -> bool:
    """Whether JSON knows it."""
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain(item) for key, item in value.items())
    return value is None or isinstance(value, (str, int, float, bool))


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Replaces the file in one go, so that whoever reads it meanwhile gets the old one or the new one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(rounded(result), indent=1) + "\n")
    new.replace(path)


def rounded(value: Any) -> Any:
    """The same structure with floats cut to six significant digits; what JSON has no number for becomes None."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if abs(value) < float("inf") else None
    return value


def write_report(args: argparse.Namespace, result: dict[str, Any], sections: Sequence[tuple[str, str]]) -> list[Path]:
    """`BENCHMARK.json`, `BENCHMARK.md` and the plots of a result, in --output-dir; nothing where there is none.

    Args:
        sections: (heading, Markdown) of the page.

    Returns:
        The files.
    """
    if args.output_dir is None:
        return []
    target, name = Path(args.output_dir), result["benchmark"]
    write_json(target / f"{name}.json", result)
    images: list[Path] = []
    if not args.no_plots:
        from vllm.benchmarks.plots import draw  # matplotlib takes a second to import

        images = draw(result, target)
    page = target / f"{name}.md"
    page.write_text(markdown_page(result, sections, images))
    return [target / f"{name}.json", page, *images]


def markdown_page(result: dict[str, Any], sections: Sequence[tuple[str, str]], images: Sequence[Path] = ()) -> str:
    """A title, where and how it was measured, the sections, the plots."""
    facts = result["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines = [f"# vllm bench {result['benchmark']}", ""]
    if not result["complete"]:
        lines += ["**Not complete: the run ended early, and this is what it had measured.**", ""]
    lines += [
        f"{device_name(facts)}; vllm {facts['vllm']} ({facts['git'] or 'no git'}), {versions}; {facts['date']}",
        "",
        f"`{result['command']}`",
        "",
    ]
    for heading, text in sections:
        lines += [f"## {heading}", "", text, ""]
    lines += [f"![{image.stem}]({image.name})\n" for image in images]
    return "\n".join(lines).rstrip() + "\n"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns after the first to the right."""
    escaped = [[cell.replace("|", "\\|").strip() for cell in row] for row in [head, *rows]]
    lines = [escaped[0], ["---", *["---:"] * (len(head) - 1)], *escaped[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
