"""The kernel that `vllm bench --roofline` measures with: it must really read everything."""

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from tests.kernels.common import assert_close
from vllm.benchmarks.read_bandwidth import TILE, TILES, partial_sums, partial_sums_torch, read_bandwidth

ROOT = Path(__file__).resolve().parents[2]
SPAN = TILE * TILES


@pytest.mark.parametrize("size", [1, 37, TILE, SPAN, SPAN + 1, 2 * SPAN - 5])
def test_matches_the_reference(device, size):
    # What lies behind the end must not be added: it is poisoned.
    memory = torch.full((size + SPAN,), float("nan"), device=device)
    x = memory[:size].copy_(torch.randn(size))
    got = partial_sums(x)
    assert got.shape == (-(-size // SPAN),)
    assert_close(got, partial_sums_torch(x), 1e-4)


def test_every_element_is_read(device):
    x = torch.zeros(SPAN + 100, device=device)
    for place in (0, TILE - 1, TILE, SPAN - 1, SPAN, SPAN + 99):
        x[place] = 1
    assert partial_sums(x).tolist() == [4, 2]


def test_other_tensors_are_refused(device):
    for x in (torch.zeros(4, 4), torch.zeros(8).double(), torch.zeros(8)[::2]):
        with pytest.raises(ValueError, match="expected a contiguous float32 vector"):
            partial_sums(x.to(device) if x.is_contiguous() else x)


def test_a_cpu_has_a_bandwidth():
    assert 1e8 < read_bandwidth("cpu", size=1 << 24, rounds=3) < 1e13


@pytest.mark.gpu
def test_a_gpu_has_a_bandwidth():
    """Within what any GPU has; and the same twice, though other tests may use the GPU at some of the times."""
    measured = sorted(read_bandwidth("cuda") for _ in range(6))
    assert measured[0] > 1e11 and measured[-1] < 2e13
    assert any(after / before < 1.1 for before, after in pairwise(measured))


@pytest.mark.slow
def test_compiles_ahead_of_time():
    code = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vllm.benchmarks.read_bandwidth import TILE, TILES, _read_kernel
for arch in (90, 120):
    source = ASTSource(_read_kernel, {"x": "*fp32", "sums": "*fp32", "n": "i32", "TILE": "constexpr", "TILES": "constexpr"},
                       {(3,): TILE, (4,): TILES})
    done = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 4})
    assert done.metadata.shared <= 99 * 1024, done.metadata.shared
print("compiled")
"""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout == "compiled\n", done.stderr[-2000:]
