"""`vllm collect-env`: what a bug report needs to know about the machine. Secrets are not printed."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path

from vllm.entrypoints.cli.nvidia_smi import gpus
from vllm.version import __version__

PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "huggingface_hub", "numpy")
_SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """This command's own flags."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print what is found; what is not there says so."""
    facts = collect()
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")
    return 0


def collect() -> dict[str, str]:
    """Name -> what was found, in the order of printing."""
    facts = {
        "vllm": f"{__version__}, {install_kind()}",
        "CUDA kernels": csrc_kind(),
        "Python": f"{platform.python_version()} at {sys.executable}",
        "system": platform.platform(),
        "CPU": f"{os.cpu_count()} cores, {platform.machine()}, {_ram()} of memory",
    }
    facts |= {name: _version(name) for name in PACKAGES}
    facts["torch's CUDA"] = _torch_cuda()
    found = gpus()
    facts["driver"] = found[0].driver if found else "no NVIDIA driver found"
    for i, gpu in enumerate(found):
        facts[f"GPU {i}"] = (
            f"{gpu.name}, {gpu.memory_bytes / 2**30:.1f} GiB, compute capability {gpu.compute_capability}"
        )
    for name in sorted(os.environ):
        if name.startswith(("VLLM_", "CUDA_", "HF_HUB_", "TRITON_")):
            facts[name] = "(set)" if any(word in name for word in _SECRET) else os.environ[name]
    return facts


def install_kind() -> str:
    """An editable install, an installed package, or a source folder on the path."""
    folder = Path(__file__).resolve().parents[2]
    try:
        origin = metadata.distribution("vllm").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return f"not installed, run from {folder.parent}"
    if origin and json.loads(origin).get("dir_info", {}).get("editable"):
        return f"editable install of {folder.parent}"
    return f"installed at {folder}"


def csrc_kind() -> str:
    library = Path(__file__).resolve().parents[2] / "vllm_c.so"
    return (
        f"built ({library.stat().st_size >> 10} KiB)" if library.is_file() else "not built; Triton and torch stand in"
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _torch_cuda() -> str:
    try:
        import torch
    except ImportError as error:
        return f"torch does not import: {error}"
    if torch.version.cuda is None:
        return "none, a CPU build"
    return f"{torch.version.cuda}, {torch.cuda.device_count()} usable GPUs"


def _ram() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    except (ValueError, OSError):
        return "an unknown amount"
