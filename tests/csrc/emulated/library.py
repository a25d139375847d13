"""Compiles the kernels of csrc/ for the CPU (emulator.h) and calls them with tensors."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent


@functools.cache
def load(source: str) -> ctypes.CDLL:
    """The library made of one .cpp file beside this one. Skips the test where it cannot be compiled."""
    if shutil.which("nvcc") is None:  # which knows the host's compiler and the headers of 16-bit floats
        pytest.skip("nvcc is not on the PATH")
    library = Path(tempfile.mkdtemp(prefix="emulated-")) / "kernels.so"
    flags = ["-std=c++20", "-O2", "-Xcompiler=-fPIC,-fno-strict-aliasing", "-shared", "--cudart=none"]
    done = subprocess.run(["nvcc", *flags, "-o", str(library), str(HERE / source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    try:
        return ctypes.CDLL(str(library))
    finally:
        shutil.rmtree(library.parent)


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy that begins at a multiple of 16 bytes, as a GPU's allocator gives it."""
    size = tensor.numel() * tensor.element_size()
    memory = torch.empty(size + 16, dtype=torch.uint8)
    begin = -memory.data_ptr() % 16
    return memory[begin : begin + size].view(tensor.dtype).view(tensor.shape).copy_(tensor)


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p | None:
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())
