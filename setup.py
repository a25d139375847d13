"""Adds to pyproject.toml the one thing it cannot say: build csrc/ with CMake where nvcc and a CUDA build of torch are there.

Elsewhere the package installs without it, and vllm/_custom_ops.py says once, on a CUDA device, what that costs.
torch is looked at without importing it (its version file says which CUDA it was built for), and it is no build requirement:
under pip's build isolation it is not visible, so use `pip install --no-build-isolation`.
"""

import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OLDEST_NVCC = (12, 8)  # the first that knows sm_120


def torch_folder() -> Path | None:
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [os.environ.get("CUDACXX"), home and f"{home}/bin/nvcc", "nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((path for name in candidates if name and (path := shutil.which(name))), None)


def nvcc_version(nvcc: str) -> tuple[int, ...]:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", text)
    return tuple(map(int, found.groups())) if found else (0, 0)


def why_not() -> str | None:
    """The reason why the CUDA kernels cannot be built here, or None where they can."""
    folder = torch_folder()
    if folder is None:
        return "torch is not visible to this build (install it first, then use pip install --no-build-isolation)"
    if runpy.run_path(str(folder / "version.py")).get("cuda") is None:
        return "the installed torch is a CPU build"
    nvcc = find_nvcc()
    if nvcc is None:
        return "nvcc was not found (set CUDA_HOME)"
    if nvcc_version(nvcc) < OLDEST_NVCC:
        return f"{nvcc} is older than {'.'.join(map(str, OLDEST_NVCC))}"
    if shutil.which("cmake") is None:
        return "cmake was not found (pip install cmake ninja)"
    return None


def wants_csrc() -> bool:
    target = os.environ.get("VLLM_TARGET_DEVICE", "auto").lower()
    if target not in ("auto", "cuda", "cpu"):
        sys.exit(f"VLLM_TARGET_DEVICE={target!r}: expected one of auto, cuda, cpu")
    if target == "cpu":
        return False
    reason = why_not()
    if reason and target == "cuda":
        sys.exit(f"VLLM_TARGET_DEVICE=cuda, but csrc/ cannot be built: {reason}")
    if reason:
        print(f"vllm: installing without the CUDA kernels of csrc/: {reason}", file=sys.stderr)
    return reason is None


class CMakeBuild(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        # Not a Python module but a library of torch ops: no Python version in its name.
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        build = Path(self.build_temp).resolve()
        configure = [
            *("cmake", "-S", str(ROOT), "-B", str(build)),
            f"-DTORCH_DIR={torch_folder()}",
            f"-DCMAKE_CUDA_COMPILER={find_nvcc()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
        ]
        if shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--parallel", jobs], check=True)


if wants_csrc():
    setup(ext_modules=[Extension("vllm.vllm_c", sources=[])], cmdclass={"build_ext": CMakeBuild})
else:
    setup()
