"""Write the tables of docs/gdn.md from benchmarks/results/gdn_{in_proj,decode,prefill}_*.json.

python benchmarks/gdn_tables.py [--check]

Everything between the two gdn-results marks is replaced. --check changes nothing and exits with 1 where the page is out of date.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from pages import ROOT, arguments, rewrite

PAGE = ROOT / "docs" / "gdn.md"
RESULTS = ROOT / "benchmarks" / "results"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def us(row: dict, name: str) -> str:
    """A time as text; a dash where it was not measured."""
    value = row.get(f"{name}_us")
    return "-" if value is None else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def share(row: dict, name: str) -> str:
    return f"{row[name]:.0%}"


def source(result: dict, path: Path) -> str:
    versions = f"torch {result['torch']}, triton {result['triton']}"
    line = f"{result['gpu']}, {versions}, {result['date']}; `{path.relative_to(ROOT)}`, `{result['command']}`."
    return f"{line} {result['note']}" if "note" in result else line


def in_proj(result: dict) -> str:
    N, D = result["shape"]
    heads = [
        "tokens",
        "skinny GEMM",
        "cuBLAS, one GEMM",
        "two",
        "two on two streams",
        "skinny GEMM: of the read bandwidth",
    ]
    names = ("skinny", "cublas_one", "cublas_two", "cublas_two_streams")
    rows = [
        [str(row["tokens"]), *(us(row, name) for name in names), share(row, "share_of_read")] for row in result["rows"]
    ]
    title = f"### Input projection, [{N} x {D}] in bfloat16, weights cold, µs"
    return f"{title}\n\n{table(heads, rows)}\n\nReading alone reaches {result['read_tb_s']:.2f} TB/s."


def decode(result: dict) -> str:
    heads = [
        "state",
        "rows",
        "unpacked",
        "packed",
        "fused, Triton",
        "fused, CUDA C++",
        "better fused: of the copy bandwidth",
    ]
    names = ("unpacked", "packed", "triton", "cuda")
    rows = [
        [row["state"], str(row["batch"]), *(us(row, name) for name in names), share(row, "share_of_copy")]
        for row in result["rows"]
    ]
    title = "### Decoding rows, from the projection's output to the gated norm's, states cold, µs"
    note = (
        f"Copying reaches {result['copy_tb_s']:.2f} TB/s, read and written; a step must read and write its states once."
    )
    return f"{title}\n\n{table(heads, rows)}\n\n{note}"


def prefill(result: dict) -> str:
    heads = [
        "prompts",
        "ours",
        "flash-linear-attention",
        "conv",
        "theirs",
        "gating",
        "delta rule",
        "theirs",
        "norm",
        "theirs",
    ]
    names = ("ours", "fla", "conv", "fla_conv", "gating", "chunk", "fla_chunk", "norm", "fla_norm")
    rows = [[row["lengths"], *(us(row, name) for name in names)] for row in result["rows"]]
    title = "### Prompts, one layer's core, µs"
    note = (
        f"flash-linear-attention {result['flash_linear_attention']}, its Triton kernels, gating inside its delta rule."
    )
    return f"{title}\n\n{table(heads, rows)}\n\n{note}"


SECTIONS = {"gdn_in_proj": in_proj, "gdn_decode": decode, "gdn_prefill": prefill}


def generated() -> str:
    """The text between the marks: one section a result file."""
    parts = []
    for name, section in SECTIONS.items():
        for path in sorted(RESULTS.glob(f"{name}_*.json")):
            result = json.loads(path.read_text())
            parts.append(f"{section(result)} {source(result, path)}")
    return "\n" + "\n\n".join(parts) + "\n\n"


def main() -> None:
    rewrite(PAGE, generated, arguments(__doc__).parse_args().check)


if __name__ == "__main__":
    main()
