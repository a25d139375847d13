"""What the NVIDIA driver says about the GPUs, without importing torch or touching a device."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    """One line of nvidia-smi."""

    index: str
    uuid: str
    name: str
    memory_bytes: int
    compute_capability: str
    driver: str


def gpus() -> list[GPU]:
    """The GPUs that CUDA would see, in its order; none where there is no driver."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return []
    query = "index,uuid,name,memory.total,compute_cap,driver_version"
    command = [smi, f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return _visible(parse(done.stdout)) if done.returncode == 0 else []


def parse(text: str) -> list[GPU]:
    """The answer to the query above; a line that is not one (an error message) is passed over."""
    found = []
    for line in text.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 6 and parts[3].isdigit():
            found.append(GPU(parts[0], parts[1], parts[2], int(parts[3]) << 20, parts[4], parts[5]))
    return found


def _visible(found: list[GPU]) -> list[GPU]:
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return found
    by_name = {gpu.index: gpu for gpu in found} | {gpu.uuid: gpu for gpu in found}
    names = [name.strip() for name in chosen.split(",")]
    return [by_name[name] for name in names if name in by_name]
