"""A CUDA context with little memory does all that one with more does."""

import os
import subprocess
import sys

import pytest
import torch

from vllm.utils.cuda_context import STACK_BYTES, make_small_context, new_stream

SCRIPT = """
import ctypes, os, torch
from vllm.utils.cuda_context import make_small_context

had = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
make_small_context()
assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == had
stack, heap = ctypes.c_size_t(), ctypes.c_size_t()
assert ctypes.CDLL("libcuda.so.1").cuCtxGetLimit(ctypes.byref(stack), 0) == 0
x = torch.ones(256, 256, dtype=torch.bfloat16, device="cuda")
before = torch.cuda.memory_allocated()
y = x @ x
assert (y == 256).all()
print(stack.value, torch.cuda.memory_allocated() - before - y.nbytes)
"""


def _numbers(**variables: str) -> tuple[int, int]:
    """A thread's stack, and the workspace that PyTorch gives to cuBLAS, in a process of its own."""
    run = subprocess.run([sys.executable, "-c", SCRIPT], env=os.environ | variables, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    stack, workspace = run.stdout.split()
    return int(stack), int(workspace)


@pytest.mark.gpu
def test_gpu_stacks_are_small_and_matrix_products_have_their_workspace():
    stack, workspace = _numbers()
    assert stack == STACK_BYTES and workspace >= 8 << 20


@pytest.mark.gpu
def test_gpu_a_workspace_that_the_user_asks_for_is_what_there_is():
    assert _numbers(CUBLAS_WORKSPACE_CONFIG=":128:2")[1] == 256 << 10


@pytest.mark.gpu
def test_gpu_kernels_that_need_larger_stacks_get_them():
    """Kilobytes of a thread's own: a sort of many rows, and one of the library's for a matrix that is solved."""
    make_small_context()
    x = torch.randn(64, 3000, device="cuda")
    assert torch.equal(x.sort(-1).values.cpu(), x.cpu().sort(-1).values)
    a = torch.randn(200, 33, 33, device="cuda", dtype=torch.float64) + 40 * torch.eye(33, device="cuda")
    assert torch.allclose(torch.linalg.inv(a) @ a, torch.eye(33, device="cuda", dtype=torch.float64), atol=1e-9)


@pytest.mark.gpu
def test_gpu_new_streams_are_streams_like_others():
    stream, x = new_stream(), torch.zeros(1 << 20, device="cuda")
    assert stream != torch.cuda.current_stream() and stream != new_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert torch.cuda.current_stream() == stream
        for _ in range(100):
            x += 1
        event = torch.cuda.Event()
        event.record()
    torch.cuda.current_stream().wait_event(event)
    assert (x == 100).all()
