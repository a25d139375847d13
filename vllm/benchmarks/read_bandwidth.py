"""How fast this device reads memory, by reading more than its caches hold."""

from __future__ import annotations

import statistics
import time

import torch
import triton
import triton.language as tl

TILE, TILES = 4096, 8


@triton.jit
def _read_kernel(x, sums, n, TILE: tl.constexpr, TILES: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * TILE * TILES
    acc = tl.zeros([TILE], tl.float32)
    for i in tl.static_range(TILES):
        at = start + i * TILE + tl.arange(0, TILE)
        acc += tl.load(x + at, mask=at < n, other=0.0)
    tl.store(sums + tl.program_id(0), tl.sum(acc, axis=0))


def partial_sums(x: torch.Tensor) -> torch.Tensor:
    """x [n], float32 -> sums of TILE * TILES elements each, [ceil(n / (TILE * TILES))]: reads everything and writes next to nothing."""
    if x.dtype != torch.float32 or x.dim() != 1 or not x.is_contiguous():
        raise ValueError(f"expected a contiguous float32 vector; got {tuple(x.shape)}, {x.dtype}")
    sums = torch.empty(triton.cdiv(x.numel(), TILE * TILES), device=x.device)
    _read_kernel[(sums.numel(),)](x, sums, x.numel(), TILE, TILES, num_warps=4)
    return sums


def partial_sums_torch(x: torch.Tensor) -> torch.Tensor:
    """The same in plain PyTorch."""
    return torch.nn.functional.pad(x, (0, -x.numel() % (TILE * TILES))).unflatten(0, (-1, TILE * TILES)).sum(1)


def read_bandwidth(device: str, size: int | None = None, rounds: int = 7) -> float:
    """Bytes a second, the median of several passes over `size` bytes (default: 1 GiB on a GPU, 256 MiB on a CPU).

    A GPU is measured with the Triton kernel above, a CPU with torch's sum and the number of threads that torch is set to.
    """
    numel = (size or (1 << 30 if device == "cuda" else 1 << 28)) // 4
    x = torch.ones(numel, device=device)
    measure = _gpu_seconds if device == "cuda" else _cpu_seconds
    measure(x)
    seconds = statistics.median(measure(x) for _ in range(rounds))
    del x
    if device == "cuda":
        torch.cuda.empty_cache()  # the engine measures what is free
    return numel * 4 / seconds


def _cpu_seconds(x: torch.Tensor) -> float:
    start = time.perf_counter()
    x.sum()
    return time.perf_counter() - start


def _gpu_seconds(x: torch.Tensor, launches: int = 8) -> float:
    """One pass of several in a row, so that launching them hides behind the first."""
    partial_sums(x)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(launches):
        partial_sums(x)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / launches
