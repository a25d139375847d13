"""Pages of docs/ whose tables are generated: everything between two marks is replaced."""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MARKS = re.compile(r"(<!-- [\w-]*results: begin[^\n]*-->\n)(.*?)(<!-- [\w-]*results: end -->)", re.DOTALL)


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit with 1 where the page is out of date"
    )
    return parser


def rewrite(page: Path, generated: Callable[[], str], check: bool) -> None:
    """Put generated() between the page's marks, or with `check` exit with a line where it is not what stands there."""
    name, old = page.relative_to(ROOT), page.read_text()
    if not MARKS.search(old):
        sys.exit(f"{name} has no results marks")
    new = MARKS.sub(lambda found: found[1] + generated() + found[3], old)
    if check:
        sys.exit(None if new == old else f"{name} is out of date: run python {Path(sys.argv[0]).as_posix()}")
    page.write_text(new)
