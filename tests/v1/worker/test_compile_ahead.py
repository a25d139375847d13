"""Kernels of a first start are compiled by children, and nothing is launched meanwhile."""

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import build
from triton.runtime._async_compile import AsyncCompileMode, active_mode
from triton.runtime.jit import JITFunction

from vllm.v1.worker import compile_ahead
from vllm.v1.worker.compile_ahead import Compiling, NotOnDisk, compiling_only

ROOT = Path(__file__).resolve().parents[3]


@triton.jit
def _fill(x, n, VALUE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x + i, VALUE, mask=i < n)


def test_launches_become_compilations_and_come_back(monkeypatch):
    calls = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, grid, warmup, **kwargs: calls.append((grid, warmup)))
    kernel = JITFunction(_fill.fn)
    before = JITFunction.run, ASTSource.make_ir
    kernel[(1,)](1)
    with compiling_only():
        kernel[(2,)](1)
        with pytest.raises(NotOnDisk):
            ASTSource.make_ir(None)
    with pytest.raises(KeyError), compiling_only():
        raise KeyError
    kernel[(3,)](1)
    assert calls == [((1,), False), ((2,), True), ((3,), False)]
    assert (JITFunction.run, ASTSource.make_ir) == before


class Disk:
    """Stands for Triton's cache: a file for each kernel, with the process that made it."""

    def __init__(self, folder, threads, monkeypatch):
        self.folder, self.threads = folder, threads
        self.launchers = []
        monkeypatch.setattr(
            compile_ahead, "driver", SimpleNamespace(active=SimpleNamespace(launcher_cls=self.launcher))
        )

    def launcher(self, src, metadata):
        self.launchers.append(src)

    def kernel(self, name, in_child=lambda: None):
        def compile_kernel():
            file = self.folder / name
            if not file.exists():
                if not self.threads.may_compile():
                    raise NotOnDisk
                if os.getpid() != parent:
                    in_child()
                file.write_text(str(os.getpid()))
            return SimpleNamespace(src=name, metadata=None, maker=int(file.read_text()))

        parent = os.getpid()
        return self.threads.submit(compile_kernel)


def test_a_child_compiles_what_is_not_on_disk(tmp_path, monkeypatch):
    with Compiling() as threads:
        disk = Disk(tmp_path, threads, monkeypatch)
        (tmp_path / "old").write_text("1")
        assert disk.kernel("old").result().maker == 1
        assert not threads.anything_new() and threads.compiled == 0
        made = [disk.kernel(f"new {i}") for i in range(5)]
        assert threads.anything_new()
        makers = {future.result().maker for future in made}
    assert len(makers) == 5 and os.getpid() not in makers
    assert threads.compiled == 5
    assert sorted(disk.launchers) == ["new 0", "new 1", "new 2", "new 3", "new 4", "old"]
    for child in makers:  # nothing is left of them
        with pytest.raises(ChildProcessError):
            os.waitpid(child, os.WNOHANG)


def test_what_a_child_does_not_finish_is_compiled_here(tmp_path, monkeypatch):
    def fail():
        raise RuntimeError

    monkeypatch.setattr(compile_ahead, "CHILD_SECONDS", 0.3)
    start = time.monotonic()
    with Compiling() as threads:
        disk = Disk(tmp_path, threads, monkeypatch)
        made = [disk.kernel("failed", fail), disk.kernel("killed", lambda: time.sleep(60))]
        assert [future.result().maker for future in made] == [os.getpid()] * 2
        later = [threads.submit(lambda: SimpleNamespace(src=threads.may_compile(), metadata=None)) for _ in range(50)]
        assert not any(future.result().src for future in later), "the next kernels have children again"
    assert time.monotonic() - start < 30


def test_without_a_child_it_is_compiled_here(tmp_path, monkeypatch):
    def refuse():
        raise BlockingIOError

    monkeypatch.setattr(os, "fork", refuse)
    with Compiling() as threads:
        assert Disk(tmp_path, threads, monkeypatch).kernel("new").result().maker == os.getpid()


def test_a_kernel_that_cannot_be_compiled_says_so_and_leaves_nothing_behind(monkeypatch):
    def fail():
        raise ValueError("no such instruction")

    def launch(self, *args, grid, warmup, **kwargs):
        hooks = len(signature(AsyncCompileMode.submit).parameters) - 3  # one in Triton 3.6, two later
        active_mode.get().submit("key", fail, *[lambda kernel: None] * hooks)

    monkeypatch.setattr(JITFunction, "run", launch)
    for _ in range(2):
        with pytest.raises(ValueError, match="no such instruction"), compiling_only():
            JITFunction(_fill.fn)[(1,)](1)


def compile_for_a_gpu() -> None:
    """With the compiler proper, in a process without Triton's interpreter."""
    calls = []
    compile_ahead.driver = SimpleNamespace(active=SimpleNamespace(launcher_cls=lambda *args: None))
    knobs.compilation.listener = lambda *, cache_hit, **_: calls.append(cache_hit)
    types = {"x": "*fp16", "n": "i32", "VALUE": "constexpr", "BLOCK": "constexpr"}

    def compile_kernel(value):
        source = ASTSource(_fill, types, {"VALUE": value, "BLOCK": 64}, {})
        return triton.compile(source, target=GPUTarget("cuda", 90, 32))

    with compiling_only() as threads:
        made = [threads.submit(compile_kernel, value) for value in range(4)]
        sizes = [len(future.result().asm["cubin"]) for future in made]
    print(threads.compiled, calls, min(sizes) > 0)


def test_children_run_the_whole_compiler(tmp_path):
    command = [sys.executable, "-c", f"from {__name__} import compile_for_a_gpu; compile_for_a_gpu()"]
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout == "4 [True, True, True, True] True\n", done.stderr[-3000:]


@pytest.mark.parametrize("missing", [0, 3])
def test_the_rest_is_left_out_where_the_first_part_was_on_disk(monkeypatch, missing):
    @contextmanager
    def counting():
        yield SimpleNamespace(anything_new=lambda: bool(done) and missing > 0, compiled=missing)

    monkeypatch.setattr(compile_ahead, "compiling_only", counting)
    done = []
    compile_ahead.compile_ahead(lambda: done.append("first"), lambda: done.append("rest"))
    assert done == (["first", "rest"] if missing else ["first"])


@pytest.mark.gpu
def test_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    x, calls = torch.zeros(64, device="cuda"), []
    monkeypatch.setattr(knobs.compilation, "listener", lambda *, cache_hit, **_: calls.append(cache_hit))
    with compiling_only() as threads:
        for value in range(1, 6):
            _fill[(1,)](x, 64, VALUE=value, BLOCK=64)
    assert threads.compiled == 5 and not x.any()
    assert calls == [True] * 5, "children have compiled them"
    with compiling_only() as threads:
        _fill[(1,)](x, 64, VALUE=1, BLOCK=64)
    assert threads.compiled == 0 and not x.any()
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
