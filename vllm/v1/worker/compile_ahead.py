"""Kernels of a first start, compiled side by side: steps are run with the launches of Triton's kernels left out, and what they would have launched is
compiled in threads meanwhile. Triton keeps it on disk, by source, GPU and versions, for the starts that follow.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import triton
from triton import knobs
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from vllm.logger import init_logger

logger = init_logger(__name__)


class Compiled:
    """Counts of one `compiling_only`: kernels that were compiled, and those that were on disk."""

    def __init__(self) -> None:
        self.now = self.before = 0

    def __call__(self, *, cache_hit: bool, **_) -> None:
        if cache_hit:
            self.before += 1
        else:
            self.now += 1


class _Threads(ThreadPoolExecutor):
    """Beside a kernel, what launches it: Triton (3.6) has a C compiler make that at the first launch, and keeps it on disk too."""

    def submit(self, compile_kernel: Callable, /, *args, **kwargs) -> Future:
        def compile_both():
            kernel = compile_kernel(*args, **kwargs)
            driver.active.launcher_cls(kernel.src, kernel.metadata)
            return kernel

        return super().submit(compile_both)


@contextmanager
def compiling_only() -> Iterator[Compiled]:
    """Inside, a Triton kernel that is launched is compiled, in a thread, and does nothing; on leaving, all have been. For one thread
    at a time: tensors that kernels would have written hold anything.
    """
    run, listener, counts = JITFunction.run, knobs.compilation.listener, Compiled()

    def compile_only(self: JITFunction, *args, grid, warmup, **kwargs):
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    knobs.compilation.listener = counts
    try:
        with _Threads(os.cpu_count()) as threads, triton.AsyncCompileMode(threads):
            JITFunction.run = compile_only
            try:
                yield counts
            finally:
                JITFunction.run = run
    finally:
        knobs.compilation.listener = listener


def compile_ahead(first: Callable[[], None], rest: Callable[[], None]) -> None:
    """Compile what two parts of the work launch; the second only where the first was not all on disk."""
    start = time.perf_counter()
    with compiling_only() as counts:
        first()
    if counts.now == 0:
        return
    logger.info("Compiling GPU kernels, %d at a time; later starts find them on disk", os.cpu_count())
    with compiling_only() as more:
        rest()
    logger.info("%d GPU kernels compiled in %.1f s", counts.now + more.now, time.perf_counter() - start)
