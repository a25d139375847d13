"""Residual add + RMSNorm (csrc/layernorm.cu): time, bytes, share of this GPU's measured copy bandwidth.

    python -m benchmarks.kernels.layernorm [--json result.json]

Each number is the median over replays of a CUDA graph that holds a chain of calls. Small batches are a decode step: one set of
tensors, in the L2 cache as they are there. Batches of several megabytes rotate over enough sets to leave the cache.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import triton

from vllm import _custom_ops as ops
from vllm.version import __version__

EPS = 1e-6
CALLS = 32  # in one graph


def graph_time_us(calls: list[Callable[[], None]], replays: int = 50) -> float:
    """Median time of one call, the calls being captured one after the other."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:3]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for i in range(replays + 5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if i >= 5:
            times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of the fastest plain copy much larger than the cache: a memcpy, or a kernel of PyTorch's."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = []
    for _ in range(20):
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    kernel = graph_time_us([lambda: torch.neg(source, out=target)] * 4, replays=10)
    return 2 * source.numel() * 4 / (min(statistics.median(times), kernel) * 1e-6)


def pytorch(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> None:
    residual.add_(x)
    wide = residual.float()
    x.copy_(wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS) * (1.0 + weight.float()))


def pytorch_two_kernels(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> None:
    residual.add_(x)
    x.copy_(torch.nn.functional.rms_norm(residual, (x.shape[-1],), weight, EPS))


def measure(rows: int, hidden: int, bandwidth: float, compiled: Callable | None) -> dict:
    size = rows * hidden * 2
    # x and residual are read and written; the weight is read
    moved = 4 * size + hidden * 2
    cached = moved < 8 * 2**20
    sets = 1 if cached else max(2, -(-(256 * 2**20) // (2 * size)))
    tensors = [
        (
            torch.randn(rows, hidden, device="cuda", dtype=torch.bfloat16),
            torch.randn(rows, hidden, device="cuda", dtype=torch.bfloat16),
            torch.randn(hidden, device="cuda", dtype=torch.bfloat16),
        )
        for _ in range(sets)
    ]

    def timed(function: Callable) -> float:
        return graph_time_us([lambda t=tensors[i % sets]: function(*t) for i in range(max(CALLS, sets))])

    slower = (
        {"pytorch_us": pytorch, "pytorch_rms_norm_us": pytorch_two_kernels, "inductor_us": compiled} if compiled else {}
    )
    fused = timed(lambda x, r, w: ops.fused_add_rms_norm(x, r, w, EPS, True))
    row = {
        "rows": rows,
        "hidden": hidden,
        "bytes": moved,
        "in_cache": cached,
        "csrc_us": fused,
        "csrc_again_us": timed(lambda x, r, w: ops.fused_add_rms_norm(x, r, w, EPS, True)),
        **{name: timed(function) for name, function in slower.items()},
        "csrc_tb_s": moved / fused * 1e-6,
        "share_of_copy": moved / fused * 1e6 / bandwidth,
    }
    return {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}


def heads(rows: int, bandwidth: float) -> dict:
    """q heads of an attention layer: 256 wide, a view into the q and gate projection."""
    qkv = [torch.randn(rows, 16 * 512 + 2 * 512, device="cuda", dtype=torch.bfloat16) for _ in range(8)]
    weight = torch.randn(256, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(rows, 16, 256, device="cuda", dtype=torch.bfloat16)
    views = [t[:, : 16 * 512].view(rows, 16, 512)[..., :256] for t in qkv]
    time = graph_time_us([lambda v=views[i % 8]: ops.rms_norm(out, v, weight, EPS, True) for i in range(CALLS)])
    moved = 2 * out.numel() * 2
    return {"tokens": rows, "bytes": moved, "csrc_us": round(time, 3), "share_of_copy": moved / time * 1e6 / bandwidth}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--alone", action="store_true", help="leave out PyTorch's forms, to compare builds of csrc/")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("needs a CUDA device")
    if not ops.available("cuda"):
        sys.exit("csrc/ is not built")
    torch.manual_seed(0)
    compiled = None if args.alone else torch.compile(pytorch, dynamic=False)
    torch._dynamo.config.recompile_limit = 64
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}: copy {bandwidth * 1e-12:.2f} TB/s. fused_add_rms_norm, bf16, (1 + w):")
    print(f"{'rows':>6} {'hidden':>6} {'csrc us':>8} {'inductor':>8} {'F.rms_norm':>10} {'eager':>8} {'of copy':>8}")
    rows = []
    for hidden in (2048, 4096, 5120):
        for count in (1, 4, 16, 64, 512, 4096, 16384):
            row = measure(count, hidden, bandwidth, compiled)
            rows.append(row)
            share = "cached" if row["in_cache"] else f"{row['share_of_copy']:.0%}"
            others = [row.get(name, 0) for name in ("inductor_us", "pytorch_rms_norm_us", "pytorch_us")]
            print(
                f"{count:6} {hidden:6} {row['csrc_us']:8.2f} {others[0]:8.2f} {others[1]:10.2f} {others[2]:8.2f} {share:>8}"
            )
    head_rows = [heads(count, bandwidth) for count in (1, 16, 256, 4096, 16384)]
    for row in head_rows:
        print(f"rms_norm of 16 q heads x 256, a view: {row['tokens']:6} tokens {row['csrc_us']:8.2f} us")
    if args.json:
        result = {
            "benchmark": "kernels/layernorm",
            "command": "python -m benchmarks.kernels.layernorm",
            "date": date.today().isoformat(),
            "gpu": torch.cuda.get_device_name(),
            "vllm": __version__,
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
            "copy_tb_s": round(bandwidth * 1e-12, 3),
            "fused_add_rms_norm": rows,
            "rms_norm_q_heads": head_rows,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
