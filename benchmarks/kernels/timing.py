"""What the GDN benchmarks share: CUDA graphs of cold calls, medians of interleaved replays, and the bandwidth to hold them against."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

import torch
import triton
import triton.language as tl

from vllm.version import __version__

Call = Callable[[], object]


def capture(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """One graph of the calls, one after the other. Each has run before, so that nothing compiles or allocates for good inside."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def interleaved_us(chains: dict[str, Sequence[Call]], rounds: int = 30) -> dict[str, float]:
    """Median time of one call of each chain, in microseconds. Rounds go A B C A B C, so that drifts of the clock meet all alike."""
    graphs = {name: capture(calls) for name, calls in chains.items()}
    times: dict[str, list[float]] = {name: [] for name in chains}
    for i in range(rounds + 3):
        for name, graph in graphs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if i >= 3:
                times[name].append(start.elapsed_time(end) * 1e3 / len(chains[name]))
    return {name: statistics.median(values) for name, values in times.items()}


@triton.jit
def _read_kernel(x, sums, SIZE: tl.constexpr, TILE: tl.constexpr):
    at = x + tl.program_id(0).to(tl.int64) * SIZE
    acc = tl.zeros([TILE], tl.float32)
    for i in tl.static_range(0, SIZE, TILE):
        acc += tl.load(at + i + tl.arange(0, TILE))
    tl.store(sums + tl.program_id(0), tl.sum(acc, axis=0))


def bandwidths() -> dict[str, float]:
    """Bytes a second of this GPU: reading alone, and reading plus writing, both over 2 GiB."""
    source = torch.randn(2**28, device="cuda")
    target, sums = torch.empty_like(source), torch.empty(2**16, device="cuda")
    size = 2**28 // sums.numel()
    times = interleaved_us(
        {
            "read": [lambda: _read_kernel[(sums.numel(),)](source, sums, size, 4096, num_warps=4)] * 8,
            "neg": [lambda: torch.neg(source, out=target)] * 4,
            "copy": [lambda: target.copy_(source)] * 4,
        },
        rounds=10,
    )
    moved = source.numel() * 4
    return {"read": moved / times["read"] * 1e6, "copy": 2 * moved / min(times["neg"], times["copy"]) * 1e6}


def rounded(value: object) -> object:
    """The same structure with floats cut to four significant digits."""
    if isinstance(value, dict):
        return {key: rounded(x) for key, x in value.items()}
    if isinstance(value, list):
        return [rounded(x) for x in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def git_hash() -> str | None:
    """The commit that is measured: the one that GIT_HASH names, for trees copied without their history, or else the checked-out one."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return os.environ.get("GIT_HASH") or done.stdout.strip() or None


def write_result(path: Path | None, name: str, bandwidth: dict[str, float], **results: object) -> None:
    """One JSON file: where and with what it was measured, then the results. git: the commit, where the caller was told it."""
    if path is None:
        return
    git = results.pop("git", None) or git_hash()
    result = {
        "benchmark": f"kernels/{name}",
        "command": " ".join(["python", "-m", f"benchmarks.kernels.{name}", *sys.argv[1:]]),
        "git": git,
        "date": date.today().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "vllm": __version__,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        **{f"{kind}_tb_s": value * 1e-12 for kind, value in bandwidth.items()},
        **results,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rounded(result), indent=1) + "\n")
