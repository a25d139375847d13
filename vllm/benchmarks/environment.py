"""What a result must say of the machine it came from: GPU, clocks, driver, versions, the source's commit."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from vllm.entrypoints.cli.nvidia_smi import gpus
from vllm.version import __version__

_CLOCKS = {
    "sm_mhz": "clocks.current.sm",
    "max_sm_mhz": "clocks.max.sm",
    "memory_mhz": "clocks.current.memory",
    "power_w": "power.draw",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
}


def environment() -> dict[str, Any]:
    """Facts for a result file. Does not import torch and does not touch a device."""
    found = gpus()
    facts: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "vllm": __version__,
        "git": git_hash(Path(__file__).resolve().parent),
        "python": platform.python_version(),
        "versions": {name: version for name in ("torch", "triton", "transformers") if (version := _version(name))},
        "system": f"{platform.system()}, {platform.machine()}",
        "cpu": {"name": cpu_name(), "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 2)},
        "gpu": found[0].name if found else None,
        "gpus": len(found),
        "driver": found[0].driver if found else None,
        "clocks": clocks() if found else None,
    }
    return facts


def device_name(facts: dict[str, Any]) -> str:
    """What the numbers of a result are numbers of."""
    return facts.get("gpu") or f"{facts['cpu']['name']}, {facts['cpu']['cores']} cores"


def git_hash(folder: Path) -> str | None:
    """The commit of a checkout, with "+" after it where tracked files differ from it; None outside one."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def clocks() -> dict[str, float] | None:
    """Clocks, power and temperature of the first GPU, as the driver says at this moment."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return None
    command = [smi, "-i", os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"]
    command += [f"--query-gpu={','.join(_CLOCKS.values())}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return parse_clocks(done.stdout) if done.returncode == 0 else None


def parse_clocks(text: str) -> dict[str, float]:
    """The answer to the query above; what the driver does not know is left out."""
    found = {}
    for name, word in zip(_CLOCKS, text.strip().splitlines()[0].split(",") if text.strip() else ()):
        try:
            found[name] = float(word)
        except ValueError:
            continue  # "[N/A]"
    return found


def cpu_name() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
