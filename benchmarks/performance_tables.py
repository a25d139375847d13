"""Write the tables of docs/performance.md from benchmarks/results.

python benchmarks/performance_tables.py [--check]

Everything between the two marks is replaced. --check changes nothing and exits with 1 where the page is out of date.
"""

import json
from collections.abc import Sequence

from pages import ROOT, arguments, rewrite

PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"

UPSTREAM = {1: 227.0, 2: 439.8, 4: 826.8, 8: 1430.7, 16: 2283.2, 64: 5483.0}
"""vLLM 0.26.0 on one H200: the same model, prompts of 128 tokens, greedy, random weights, tok/s of all sequences together."""


def read(name: str) -> dict:
    return json.loads((RESULTS / name).read_text())


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def decode() -> str:
    """Tokens a second of the whole model, and where its bytes are."""
    name = "bench/ab_in_proj_35b_h200/ab.json"
    result = read(name)
    fused = next(key for key, variant in result["variants"].items() if variant["text"] == "gdn_in_proj=fused")
    floors = {row["concurrency"]: row for row in result["roofline"]["rows"] if row["variant"] == fused}
    rows = []
    for point in result["points"]:
        n, measured = point["concurrency"], point["variants"][fused]
        speed, floor = measured["decode_tok_s"]["median"], floors[n]
        rows.append(
            [
                str(n),
                f"{speed:,.0f}",
                f"{UPSTREAM[n]:,.0f}",
                f"{speed / UPSTREAM[n]:.2f}",
                f"{measured['step_ms']['median']:.2f}",
                f"{floor['floor_ms']:.2f}",
                f"{floor['share']:.0%}",
                f"{0.7 * n * 1e3 / floor['floor_ms']:,.0f}",
            ]
        )
    heads = ["sequences", "tok/s", "vLLM 0.26.0", "ratio", "ms a step", "its bytes take", "share", "70% would be"]
    return f"{table(heads, rows)}\n\n`benchmarks/results/{name}`: {result['command']}"


def share_of_a_step() -> str:
    """What one token's step spends where, from the kernels' own benchmarks."""
    moe, few = read("moe_h200.json"), read("skinny_gemm_h200.json")
    gdn, attention = read("gdn_decode_h200.json"), read("attention_h200.json")
    one = {row["layer"]: row["us"] for row in few["rows"] if row["kind"] == "plain" and row["rows"] == 1}
    state = next(row for row in gdn["rows"] if row["batch"] == 1 and row["state"] == "float32")
    first = next(row for row in attention["decode"] if (row["sequences"], row["context"]) == (1, 128))
    layer = next(row for row in moe["int4 g32"] if row["tokens"] == 1)
    parts = [
        ("mixture of experts, 40 layers", 40, layer["us"], "moe_h200.json"),
        ("GDN input projection, 30", 30, one["35B in_proj"], "skinny_gemm_h200.json"),
        ("GDN and attention output projections, 40", 40, one["35B out_proj, o_proj"], "skinny_gemm_h200.json"),
        ("lm_head", 1, one["35B lm_head"], "skinny_gemm_h200.json"),
        ("GDN decode chain, 30", 30, min(state["triton_us"], state["cuda_us"]), "gdn_decode_h200.json"),
        ("attention q/k/v projection, 10", 10, one["35B qkv"], "skinny_gemm_h200.json"),
        ("attention, 10", 10, first["triton_us"], "attention_h200.json"),
    ]
    rows = [[what, f"{us:.1f}", f"{count * us / 1e3:.2f}", source] for what, count, us, source in parts]
    total = sum(count * us for _, count, us, _ in parts) / 1e3
    rows.append(["together", "", f"{total:.2f}", ""])
    heads = ["part", "us a call", "ms a step", "from"]
    return table(heads, rows)


def generated() -> str:
    return f"\n## Decoding\n\n{decode()}\n\n## Where one token's time goes\n\n{share_of_a_step()}\n\n"


def main() -> None:
    rewrite(PAGE, generated, arguments(__doc__).parse_args().check)


if __name__ == "__main__":
    main()
