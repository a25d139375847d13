"""Two pieces of work at the same time on one GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

A, B = TypeVar("A"), TypeVar("B")


def maybe_execute_in_parallel(
    fn0: Callable[[], A],
    fn1: Callable[[], B],
    event0: torch.cuda.Event | None = None,
    event1: torch.cuda.Event | None = None,
    aux_stream: torch.cuda.Stream | None = None,
) -> tuple[A, B]:
    """`fn0()` on the current stream beside `fn1()` on `aux_stream`; one after the other without an auxiliary stream.

    The current stream forks (event0) and joins (event1) by events alone, so the CPU never waits and a CUDA graph can capture it: the
    auxiliary stream enters the capture with the fork. Both results may be used on the current stream at once.

    Why tensors need no `record_stream` (which would hold memory back, and inside a capture until its end):

    - What fn1 reads was made on the current stream before the fork. When it is freed, the current stream may reuse the memory only
      for work after the join, hence after fn1.
    - What fn1 returns lies in the auxiliary stream's memory. When it is freed, only later work on that stream can get the memory;
      that work comes after a later fork, and so after every reader on the current stream.

    The second point needs all forks of an auxiliary stream to come from one stream, as `torch_utils.aux_stream` provides.
    """
    if aux_stream is None:
        return fn0(), fn1()
    event0.record()
    with torch.cuda.stream(aux_stream):
        event0.wait()
        result1 = fn1()
        event1.record()
    result0 = fn0()
    event1.wait()
    return result0, result1
