"""Kernels of a first start, compiled side by side: steps are run with the launches of Triton's kernels left out, and what they would have
launched is compiled by other processes meanwhile. Triton keeps it on disk, by source, GPU and versions, for the starts that follow.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager

import triton
from triton.compiler import ASTSource
from triton.runtime._async_compile import active_mode
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from vllm.logger import init_logger

logger = init_logger(__name__)

MOST_CHILDREN = 16
"""At a time, however many cores there are: each takes a few hundred MB."""

CHILD_SECONDS = 60
"""A child that has not compiled its kernel by then is ended, and the kernel compiled here."""


def at_a_time() -> int:
    """Kernels that are compiled side by side: one a core that this process may use."""
    return min(MOST_CHILDREN, len(os.sched_getaffinity(0)))


class NotOnDisk(Exception):
    """A kernel that would have to be compiled now."""


class Compiling(ThreadPoolExecutor):
    """Threads that each wait for a child to compile a kernel: half of that work is Python, which threads cannot do side by side.

    A child is forked for one kernel, calls nothing of CUDA, and leaves without cleaning up; what it puts on disk is read here. With the
    kernel it has made what launches it: Triton 3.6 has a C compiler do that at the first launch otherwise.
    """

    def __init__(self) -> None:
        super().__init__(at_a_time())
        self.compiled = 0
        self._one_at_a_time = threading.Lock()
        self._futures: list[Future] = []
        self._here = threading.local()

    def submit(self, compile_kernel: Callable, /, *args, **kwargs) -> Future:
        self._futures.append(super().submit(self._compile, lambda: compile_kernel(*args, **kwargs)))
        return self._futures[-1]

    def anything_new(self) -> bool:
        """Whether a kernel was not on disk; waits for the first such, or for all."""
        return any(self.compiled for _ in as_completed(list(self._futures)))

    def may_compile(self) -> bool:
        """Whether this thread does the work itself."""
        return getattr(self._here, "compiles", False)

    def _compile(self, compile_kernel: Callable):
        def make():
            kernel = compile_kernel()
            driver.active.launcher_cls(kernel.src, kernel.metadata)
            return kernel

        try:
            return make()
        except NotOnDisk:
            with self._one_at_a_time:
                self.compiled += 1
        self._in_child(make)
        # a child may have failed: then we compile, or find out why it did
        self._here.compiles = True
        try:
            return make()
        finally:
            self._here.compiles = False

    def _in_child(self, work: Callable) -> None:
        try:
            # libraries have hooks that two forks at once would confuse
            with self._one_at_a_time:
                child = os.fork()
        except (OSError, RuntimeError) as error:
            logger.debug("no child to compile a kernel: %s", error)
            return
        if child == 0:
            try:
                self._here.compiles = True
                work()
            finally:
                os._exit(0)
        end = time.monotonic() + CHILD_SECONDS
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            if time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return
            time.sleep(0.02)


@contextmanager
def compiling_only() -> Iterator[Compiling]:
    """Inside, a Triton kernel that is launched is compiled, by a child, and does nothing; on leaving, all have been. For one thread at a
    time: tensors that kernels would have written hold anything.
    """
    run, make_ir = JITFunction.run, ASTSource.make_ir

    def compile_only(self: JITFunction, *args, grid, warmup, **kwargs):
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    with Compiling() as threads:

        def make_ir_in_children(self: ASTSource, *args, **kwargs):
            if not threads.may_compile():
                raise NotOnDisk
            return make_ir(self, *args, **kwargs)

        ASTSource.make_ir = make_ir_in_children
        try:
            with triton.AsyncCompileMode(threads):
                JITFunction.run = compile_only
                try:
                    yield threads
                finally:
                    JITFunction.run = run
        finally:
            ASTSource.make_ir = make_ir
            # Triton 3.6 leaves it set where a kernel cannot be compiled
            active_mode.set(None)


def compile_ahead(first: Callable[[], None], rest: Callable[[], None]) -> None:
    """Compile what two parts of the work launch; the second only where the first was not all on disk."""
    start = time.perf_counter()
    with compiling_only() as threads:
        first()
        if not threads.anything_new():
            return
        logger.info("Compiling GPU kernels, %d at a time; later starts find them on disk", at_a_time())
        rest()
    logger.info("%d GPU kernels compiled in %.1f s", threads.compiled, time.perf_counter() - start)
