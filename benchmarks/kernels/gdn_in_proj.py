"""The GDN layer's input projection, [q k v z b a] of the 35B shape: cuBLAS in three ways beside the skinny GEMM.

    python -m benchmarks.kernels.gdn_in_proj [--json result.json] [--git HASH]

Weights are cold: calls rotate over enough of them to leave the cache. Graphs hold calls only, back to back, as a chain of layers would.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.kernels.timing import bandwidths, interleaved_us, write_result
from vllm.model_executor.layers.ops.skinny_gemm import skinny_gemm

D, QKVZ, BA = 2048, 2 * 16 * 128 + 2 * 32 * 128, 2 * 32
TOKENS = (1, 2, 4, 8, 16, 32, 64)
SETS = 8


def two_streams(x: torch.Tensor, weight: torch.Tensor, side: torch.cuda.Stream) -> None:
    """The small product beside the large one."""
    main = torch.cuda.current_stream()
    side.wait_stream(main)
    F.linear(x, weight[:QKVZ])
    with torch.cuda.stream(side):
        F.linear(x, weight[QKVZ:])
    main.wait_stream(side)


def measure(tokens: int, weights: list[torch.Tensor], bandwidth: float) -> dict:
    x = torch.randn(tokens, D, device="cuda", dtype=torch.bfloat16)
    side = torch.cuda.Stream()
    error = (skinny_gemm(x, weights[0]).float() - F.linear(x.float(), weights[0].float())).norm()
    error = (error / F.linear(x.float(), weights[0].float()).norm()).item()
    if not error < 1e-2:
        raise RuntimeError(f"skinny_gemm is off by {error:.2g} at {tokens} tokens")
    forms = {
        "skinny": lambda w: skinny_gemm(x, w),
        "skinny_again": lambda w: skinny_gemm(x, w),
        "cublas_one": lambda w: F.linear(x, w),
        "cublas_two": lambda w: (F.linear(x, w[:QKVZ]), F.linear(x, w[QKVZ:])),
        "cublas_two_streams": lambda w: two_streams(x, w, side),
    }
    times = interleaved_us(
        {name: [lambda f=form, w=w: f(w) for w in weights * 2] for name, form in forms.items()}, rounds=20
    )
    moved = (weights[0].numel() + x.numel() + tokens * (QKVZ + BA)) * 2
    return {
        "tokens": tokens,
        "bytes": moved,
        **{f"{name}_us": time for name, time in times.items()},
        "share_of_read": moved / times["skinny"] * 1e6 / bandwidth,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--git", help="commit of the working tree, for the result")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("needs a CUDA device")
    torch.manual_seed(0)
    bandwidth = bandwidths()
    weights = [(torch.randn(QKVZ + BA, D, device="cuda") * D**-0.5).bfloat16() for _ in range(SETS)]
    print(f"{torch.cuda.get_device_name()}: read {bandwidth['read'] * 1e-12:.2f} TB/s. [{QKVZ + BA} x {D}] bf16, us:")
    print(f"{'tokens':>6} {'skinny':>8} {'again':>8} {'one GEMM':>9} {'two':>8} {'two streams':>11} {'of read':>8}")
    rows = []
    for tokens in TOKENS:
        row = measure(tokens, weights, bandwidth["read"])
        rows.append(row)
        print(
            f"{tokens:6} {row['skinny_us']:8.2f} {row['skinny_again_us']:8.2f} {row['cublas_one_us']:9.2f} "
            f"{row['cublas_two_us']:8.2f} {row['cublas_two_streams_us']:11.2f} {row['share_of_read']:8.0%}"
        )
    write_result(args.json, "gdn_in_proj", bandwidth, git=args.git, shape=[QKVZ + BA, D], rows=rows)


if __name__ == "__main__":
    main()
