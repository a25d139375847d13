"""Kernel tests run on the GPU where there is one, and otherwise the same kernels in Triton's interpreter on the CPU."""

import os
import sys

import pytest
import torch

if not torch.cuda.is_available() and "triton" not in sys.modules:
    # Triton reads this when a kernel is decorated, its own library functions included: it has to be set before the first import.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernels run. Skips when something else imported Triton before this folder could ask for the interpreter."""
    if torch.cuda.is_available():
        return "cuda"
    import triton

    if not triton.knobs.runtime.interpret:
        pytest.skip("Triton was imported without TRITON_INTERPRET=1; run tests/kernels in a process of its own")
    return "cpu"


@pytest.fixture(autouse=True)
def _poison_uninitialised_memory(monkeypatch: pytest.MonkeyPatch):
    """Memory that nobody wrote reads as NaN (integers: a huge value), so that a kernel which relies on it fails every time."""

    def poisoned(make):
        def empty(*args, **kwargs):
            x = make(*args, **kwargs)
            if x.is_floating_point() or x.is_complex():
                return x.fill_(float("nan"))
            return x if x.dtype == torch.bool else x.fill_(torch.iinfo(x.dtype).max)

        return empty

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)
