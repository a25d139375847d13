"""Kernels of a first start are compiled in threads, and nothing is launched meanwhile."""

from contextlib import contextmanager

import pytest
import torch
import triton
import triton.language as tl
from triton import knobs
from triton.runtime import build
from triton.runtime.jit import JITFunction

from vllm.v1.worker import compile_ahead
from vllm.v1.worker.compile_ahead import Compiled, compiling_only


@triton.jit
def _fill(x, n, VALUE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x + i, VALUE, mask=i < n)


def test_launches_become_compilations_and_come_back(monkeypatch):
    calls = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, grid, warmup, **kwargs: calls.append((grid, warmup)))
    kernel = JITFunction(_fill.fn)
    before = JITFunction.run, knobs.compilation.listener
    kernel[(1,)](1)
    with compiling_only():
        kernel[(2,)](1)
    with pytest.raises(KeyError), compiling_only():
        raise KeyError
    kernel[(3,)](1)
    assert calls == [((1,), False), ((2,), True), ((3,), False)]
    assert (JITFunction.run, knobs.compilation.listener) == before


@pytest.mark.parametrize("missing", [0, 3])
def test_the_rest_is_left_out_where_the_first_part_was_on_disk(monkeypatch, missing):
    @contextmanager
    def counting():
        counts = Compiled()
        yield counts
        for _ in range(missing):
            counts(cache_hit=False)

    monkeypatch.setattr(compile_ahead, "compiling_only", counting)
    done = []
    compile_ahead.compile_ahead(lambda: done.append("first"), lambda: done.append("rest"))
    assert done == (["first", "rest"] if missing else ["first"])


@pytest.mark.gpu
def test_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    x = torch.zeros(64, device="cuda")
    with compiling_only() as counts:
        for value in range(1, 6):
            _fill[(1,)](x, 64, VALUE=value, BLOCK=64)
    assert counts.now == 5 and counts.before == 0 and not x.any()
    with compiling_only() as counts:
        _fill[(1,)](x, 64, VALUE=1, BLOCK=64)
    assert counts.now == counts.before == 0 and not x.any()
    _fill[(1,)](x, 64, VALUE=3, BLOCK=64)
    assert (x == 3).all()


@pytest.mark.gpu
def test_gpu_nothing_is_left_for_the_first_launch_to_build(tmp_path, monkeypatch):
    """Triton 3.6 has a C compiler make a launcher for each signature."""
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    kernel, x = JITFunction(_fill.fn), torch.zeros(64, device="cuda", dtype=torch.float16)
    with compiling_only():
        kernel[(1,)](x, 64, VALUE=7, BLOCK=64)

    def fail(*args, **kwargs):
        raise AssertionError("built now")

    monkeypatch.setattr(build, "_build", fail)
    kernel[(1,)](x, 64, VALUE=7, BLOCK=64)
    assert (x == 7).all()
