"""Two functions on two streams: in order without a GPU, correct and capturable with one."""

import pytest
import torch

from vllm.utils.multi_stream_utils import maybe_execute_in_parallel
from vllm.utils.torch_utils import aux_stream


def test_one_after_the_other_without_a_stream():
    order = []
    result = maybe_execute_in_parallel(lambda: order.append(0) or "a", lambda: order.append(1) or "b", None, None, None)
    assert result == ("a", "b") and order == [0, 1]


def two_events():
    return [torch.cuda.Event(enable_timing=False) for _ in range(2)]


def chain(x, events, rounds):
    """Each round's inputs come from both results of the last, and its memory is free for the next as soon as it is read."""
    for _ in range(rounds):
        a, b = maybe_execute_in_parallel(lambda x=x: x * 1.5 + 1, lambda x=x: x.flip(0) - 1, *events, aux_stream())
        x = (a - b) / 2
        del a, b
    return x


def expected(x, rounds):
    for _ in range(rounds):
        x = ((x * 1.5 + 1) - (x.flip(0) - 1)) / 2
    return x


@pytest.mark.gpu
def test_gpu_memory_may_be_used_again_at_once():
    """Two hundred rounds over a few buffers: a stream that ran ahead of its readers would be seen."""
    x = torch.randn(1 << 20, device="cuda")
    torch.testing.assert_close(chain(x, two_events(), 200), expected(x, 200))


@pytest.mark.gpu
def test_gpu_graph():
    x, events = torch.randn(1 << 16, device="cuda"), two_events()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        chain(x, events, 2)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(x, events, 20)
    for seed in range(3):
        x.copy_(torch.randn(1 << 16, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        torch.testing.assert_close(y, expected(x, 20))


@pytest.mark.gpu
def test_gpu_never_waits():
    x, events = torch.randn(1 << 16, device="cuda"), two_events()
    chain(x, events, 2)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        chain(x, events, 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
