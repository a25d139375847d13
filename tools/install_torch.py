"""Installs torch into the Python that runs this: a CUDA build where there is an NVIDIA GPU, a CPU build elsewhere.

The wheel that PyPI calls torch is the CUDA build, and it brings gigabytes of CUDA libraries along. So a CPU machine asks PyTorch's
index of CPU builds first, if it can be reached within seconds, then whatever index pip is set up with, and never keeps a CUDA build.
"""

import argparse
import shutil
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements"


def requirement(file: str) -> str:
    lines = [line.partition("#")[0].strip() for line in (REQUIREMENTS / file).read_text().splitlines()]
    return next(line for line in lines if line.startswith("torch"))


def has_gpu() -> bool:
    if shutil.which("nvidia-smi") is None:
        return False
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return listed.returncode == 0 and "GPU" in listed.stdout


def reachable(url: str, seconds: float) -> bool:
    """In a thread, because looking a host name up knows no time limit."""
    answers: list[bool] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds):
                answers.append(True)
        except (OSError, ValueError):
            answers.append(False)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds + 1)
    return any(answers)


def pip(*arguments: str) -> bool:
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", *arguments]
    print("+", " ".join(["pip", "install", *arguments]), flush=True)
    return subprocess.run(command).returncode == 0


PROBE = """
import importlib.util, runpy
folder = importlib.util.find_spec("torch").submodule_search_locations[0]
version = runpy.run_path(folder + "/version.py")
print(version["__version__"], "cuda" if version.get("cuda") else "cpu")
"""


def installed() -> tuple[str, str] | None:
    """The torch that is there: its version without the local part, and "cuda" or "cpu"."""
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    if done.returncode != 0:
        return None
    version, build = done.stdout.split()
    return version.partition("+")[0], build


def install_cpu(index: str, seconds: float) -> bool:
    wanted = requirement("cpu.txt")
    if index and reachable(f"{index.rstrip('/')}/torch/", seconds) and pip(wanted, "--index-url", index):
        return True
    # A CPU build says so in its local version, which PyPI itself never carries: this finds one in a configured index or folder.
    if pip(f"{wanted}+cpu", "--quiet"):
        return True
    # On machines other than x86 the plain name is a CPU build. Without its dependencies, a wrong guess costs one wheel, not gigabytes.
    if pip(wanted, "--no-deps") and (installed() or ("", "cuda"))[1] == "cpu":
        return pip(wanted)
    subprocess.run([sys.executable, "-m", "pip", "uninstall", "--yes", "--quiet", "torch"])
    print(
        f"No CPU build of {wanted} could be had: {index or 'no index'} was not reachable, and pip's own index has CUDA builds only.\n"
        "Name an index that has one with `make TORCH_CPU_INDEX=<url> ...`, or install torch into .venv yourself.",
        file=sys.stderr,
    )
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cpu-index", default="https://download.pytorch.org/whl/cpu", help="package index of CPU builds"
    )
    parser.add_argument("--timeout", type=float, default=3.0, help="seconds to wait for that index to answer")
    args = parser.parse_args()
    if has_gpu():
        done = pip(requirement("cuda.txt"))
    elif installed() == (requirement("cpu.txt").partition("==")[2], "cpu"):
        done = True
    else:
        done = install_cpu(args.cpu_index, args.timeout)
    print("torch:", *(installed() or ["not installed"]))
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
