"""Shared by all tests: no network, no GPU needed, the same random numbers every time."""

import logging
import os
import tempfile
from pathlib import Path

# Before anything imports huggingface_hub or torch, which read them once.
os.environ["HF_HUB_OFFLINE"] = "1"
# What earlier runs have left must not decide anything.
_caches = tempfile.TemporaryDirectory(prefix="vllm-test-caches-")
os.environ["VLLM_CACHE_ROOT"] = _caches.name
# Processes of xdist share the cores: threads that wait for each other's cores take many times as long.
if processes := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // int(processes))))

import pytest
import torch

# Triton decides when it is imported whether kernels are compiled or interpreted; one test process holds tests of all kinds.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from vllm.logger import init_logger

ROOT = Path(__file__).resolve().parent.parent


ON_THE_DEVICE = (
    "accuracy",
    "csrc/test_experts_w4.py",
    "csrc/test_quantised_gemm.py",
    "entrypoints/test_llm.py",
    "v1/engine/test_llm_engine.py",
)
"""Tests that take the GPU where there is one, as those do that ask for a `device`: they are among its tests then."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        for item in items:
            on_the_device = item.path.relative_to(ROOT / "tests").as_posix().startswith(ON_THE_DEVICE)
            if on_the_device or "device" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.gpu)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in marked:
            item.add_marker(skip)
    for item in items:
        if group := _server_of(item):
            item.add_marker(pytest.mark.xdist_group(group))


def _server_of(item: pytest.Item) -> str | None:
    """Where tests run in several processes (--dist loadgroup), those that share a server run in the same one."""
    folder = item.path.relative_to(ROOT / "tests").parent.as_posix()
    if folder == "server":
        return "small" if "small" in item.fixturenames else item.path.name
    return folder if "server" in getattr(item, "fixturenames", ()) else None


@pytest.fixture(autouse=True)
def _log_reaches_caplog():
    """Our loggers do not propagate to the root logger, where pytest's caplog listens."""
    init_logger("vllm.tests")
    logger = logging.getLogger("vllm")
    before, logger.propagate = logger.propagate, True
    yield
    logger.propagate = before


@pytest.fixture
def seed() -> int:
    """Seeds Python, numpy and torch, and returns the seed."""
    import random

    import numpy

    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    return 0


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """A checkpoint of a few megabytes with every layer type of the real ones."""
    path = ROOT / "vllm" / "assets" / "tiny-qwen3_5-moe"
    if not (path / "config.json").is_file():
        pytest.fail(f"no checkpoint at {path.relative_to(ROOT)}")
    return path
