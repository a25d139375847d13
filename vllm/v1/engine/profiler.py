"""A record of what the engine's process does between two moments, for chrome://tracing or https://ui.perfetto.dev."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from vllm import envs
from vllm.logger import init_logger

logger = init_logger(__name__)


class Profiler:
    """torch.profiler over the calling thread's work and, where there is one, the GPU's. For one thread."""

    def __init__(self) -> None:
        self._profile: torch.profiler.profile | None = None

    def start(self) -> None:
        """Begin to record. Raises ValueError where that has begun."""
        if self._profile is not None:
            raise ValueError("a profile is being recorded already; stop it first")
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        profile = torch.profiler.profile(activities=activities)
        profile.start()
        self._profile = profile

    def stop(self) -> str:
        """End the record and write it into `profile_folder()`; the file's path.

        Raises:
            ValueError: nothing is being recorded.
            OSError: the file cannot be written; the record is lost.
        """
        if self._profile is None:
            raise ValueError("no profile is being recorded; start one first")
        profile, self._profile = self._profile, None
        profile.stop()
        folder = profile_folder()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.pt.trace.json.gz"
        profile.export_chrome_trace(str(path))
        logger.info("Profile written to %s", path)
        return str(path)


def profile_folder() -> Path:
    """VLLM_TORCH_PROFILER_DIR, else `profiles` under VLLM_CACHE_ROOT."""
    return Path(envs.VLLM_TORCH_PROFILER_DIR or Path(envs.VLLM_CACHE_ROOT, "profiles")).expanduser().absolute()
