"""What CUDA and its libraries set aside for a process whether it is used or not, and how to have less of it.

On an H200, with CUDA 13.0 and PyTorch 2.11: 527 MiB for a context, half of it stacks; 66 MiB for a cuBLAS handle; 70 MiB for PyTorch's pool of
streams. Of all that, nothing makes a model faster.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache

import torch

STACK_BYTES = 128
"""Of each thread that the GPU can run at once, CUDA's own default being 1,024. For a kernel that needs more, the driver makes them larger."""

_CU_LIMIT_STACK_SIZE = 0
_CU_STREAM_NON_BLOCKING = 1
_CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@cache
def make_small_context() -> None:
    """Make this process's CUDA context, and this thread's cuBLAS handle in it, with little memory. Once, on the current device.

    A handle comes with a workspace of 64 MiB on Hopper, which stays unused: PyTorch gives it one of its own for each stream. The size is read
    from the environment; where the user has set it, it is left alone.
    """
    torch.cuda.synchronize()  # now there is a context, and it is this thread's
    _driver("cuCtxSetLimit", _CU_LIMIT_STACK_SIZE, ctypes.c_size_t(STACK_BYTES))
    if _CUBLAS_WORKSPACE in os.environ:
        return
    os.environ[_CUBLAS_WORKSPACE] = ":16:8"
    try:
        # PyTorch's workspace takes the size too: for a stream that nothing runs on
        with torch.cuda.stream(new_stream()):
            torch.cuda.current_blas_handle()
    finally:
        del os.environ[_CUBLAS_WORKSPACE]


def new_stream() -> torch.cuda.Stream:
    """A stream on the current device, for as long as the process lives. It does not wait for the default stream.

    PyTorch's own come from a pool of 32 that is made with the first.
    """
    handle = ctypes.c_void_p()
    torch.cuda.is_current_stream_capturing()  # now the context is this thread's; allowed while capturing, as the rest is
    _driver("cuStreamCreate", ctypes.byref(handle), _CU_STREAM_NON_BLOCKING)
    return torch.cuda.ExternalStream(handle.value, torch.cuda.current_device())


def _driver(function: str, *args) -> None:
    """Call the CUDA driver. Raises RuntimeError with its error's number."""
    error = getattr(ctypes.CDLL("libcuda.so.1"), function)(*args)
    if error:
        raise RuntimeError(f"{function} failed with CUDA error {error}")
