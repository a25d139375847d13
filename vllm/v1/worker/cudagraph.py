"""CUDA graphs of steps: what the host would launch kernel by kernel, launched at once."""

from __future__ import annotations

import gc
from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import cache

import torch

from vllm.utils.cuda_context import new_stream

EARLY = 8
"""Batch sizes up to which graphs are captured at the start."""
EARLY_TOKENS = 256
"""Sizes of a prompt's chunk up to which they are. Each takes two passes through the network of a start's time."""


def capture_sizes(max_num_seqs: int, asked: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """Batch sizes that get a graph, smallest first; other batches are padded to the next one.

    Every size up to 8, where a sequence more or less costs most; then steps of an eighth to a quarter.

    Args:
        asked: the sizes the user wants instead; those above max_num_seqs are left out.
    """
    if asked is not None:
        return tuple(sorted({size for size in asked if size <= max_num_seqs}))
    sizes, size = [], 1
    while size < max_num_seqs:
        sizes.append(size)
        size += 1 if size < 8 else 1 << (size.bit_length() - 3)
    return (*sizes, max_num_seqs)


def capture_order(sizes: tuple[int, ...], most: int) -> tuple[list[int], list[int]]:
    """Of these sizes, smallest first: which are captured at the start, in this order, and which when there is time.

    At the start the largest, which makes room for all, and those up to `most`, with which a server begins.
    """
    early = [size for size in sizes if size <= most or size == sizes[-1]]
    return early[::-1], [size for size in sizes if size not in early]


def padded_size(sizes: tuple[int, ...], count: int) -> int | None:
    """The smallest captured size that holds `count` sequences, or tokens; None where none does."""
    at = bisect_left(sizes, count)
    return sizes[at] if at < len(sizes) else None


class GraphCache:
    """Graphs by key, in one memory pool: they run one after the other, so what one leaves free the next may use.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.MemPool()
        self._stream = _capture_stream(device)

    def __len__(self) -> int:
        return len(self._graphs)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._graphs

    @property
    def pool_id(self) -> tuple[int, int]:
        """Of the memory pool, as in `torch.cuda.memory_snapshot()`."""
        return self._pool.id

    def replay(self, key: Hashable) -> None:
        """Queue the graph captured under `key`."""
        self._graphs[key].replay()

    def capture(self, key: Hashable, run: Callable[[], None]) -> None:
        """Record what `run` launches, without running it.

        It must have run before, so that everything it needs is compiled and allocated, and it may read and write only tensors that
        outlive the graph.
        """
        graph = torch.cuda.CUDAGraph()
        with self._on_stream():
            # Other threads go on using CUDA: the copies of a tokenizer's or a client's thread are none of this graph's business.
            graph.capture_begin(pool=self.pool_id, capture_error_mode="thread_local")
            try:
                run()
            finally:
                graph.capture_end()
        self._graphs[key] = graph

    @contextmanager
    def memory(self) -> Iterator[None]:
        """Inside, what is launched kernel by kernel uses the graphs' memory, and their stream, since memory belongs to one.

        What is made inside must be read, in the order of the streams, before the next graph, which writes to the same places. Tensors that
        are to last are made by `torch_utils.kept`.
        """
        with self._on_stream(), torch.cuda.use_mem_pool(self._pool):
            yield

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream), _garbage_left():
                yield
        finally:
            current.wait_stream(self._stream)


@contextmanager
def _garbage_left() -> Iterator[None]:
    """Inside, no garbage is collected: an engine that is no longer used may be among it, and PyTorch (2.11) ends the process when a memory
    pool ends while another is in use."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all graphs of a process, so that cuBLAS has one workspace for it, which lies in no graph's memory."""
    with torch.cuda.device(device):
        stream = new_stream()
        with torch.cuda.stream(stream):
            torch.cuda.current_blas_handle()
    return stream
