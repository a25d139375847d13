"""csrc/ compiles and links here, with or without a GPU, and asks nothing of torch but its stable ABI."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.xdist_group("csrc")  # compiled once, not in every process of the tests

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = ("90a", "120")


def cuobjdump() -> str | None:
    import triton

    carried = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return shutil.which("cuobjdump") or (str(carried) if carried.is_file() else None)


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    for tool in ("nvcc", "cmake"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not on the PATH")
    build = tmp_path_factory.mktemp("csrc")
    configure = [
        *("cmake", "-S", str(ROOT), "-B", str(build)),
        f"-DTORCH_DIR={Path(torch.__file__).parent}",
        f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(f'{arch}-real' for arch in ARCHITECTURES)}",
    ]
    # Some compilers are set up like this. With a private C++ runtime inside, the first error message ended the process.
    environment = os.environ | {"LDFLAGS": "-static-libstdc++"}
    for command in (configure, ["cmake", "--build", str(build), "--parallel", "2"]):
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
    return build / "vllm_c.so"


def test_a_group_stays_in_one_process(tmp_path):
    """Versions of pytest and xdist that do not fit lose groups without a word."""
    (tmp_path / "test_group.py").write_text("""
import os, pathlib, pytest

@pytest.mark.xdist_group("together")
@pytest.mark.parametrize("number", range(12))
def test_where(number):
    pathlib.Path(__file__).with_name(f"{os.environ['PYTEST_XDIST_WORKER']}.seen").touch()
""")
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadgroup", "-p", "no:cacheprovider"]
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path, env=outside)
    assert "12 passed" in done.stdout, done.stdout + done.stderr
    assert len(list(tmp_path.glob("*.seen"))) == 1


def test_has_code_for_each_architecture(library):
    tool = cuobjdump()
    if tool is None:
        pytest.skip("no cuobjdump, neither on the PATH nor inside triton")
    listing = subprocess.run([tool, "-lelf", str(library)], capture_output=True, text=True, check=True).stdout
    found = set(re.findall(r"sm_(\w+)\.cubin", listing))
    assert found == set(ARCHITECTURES), listing


def foreign_symbols(listing: str) -> list[str]:
    """Undefined symbols of torch or CUDA that are neither in torch's C shim nor in a system library."""
    names = [line.split()[-1] for line in listing.splitlines() if " U " in line or line.strip().startswith("U ")]
    shim = re.compile(r"^(aoti_torch_|torch_)")
    system = re.compile(r"@(GLIBC|GLIBCXX|CXXABI|GCC)")
    return [name for name in names if not shim.match(name) and not system.search(name)]


def test_needs_only_the_stable_abi(library):
    if shutil.which("nm") is None:
        pytest.skip("nm is not on the PATH")
    listing = subprocess.run(["nm", "-D", str(library)], capture_output=True, text=True, check=True).stdout
    assert "aoti_torch_library_init_fragment" in listing
    assert foreign_symbols(listing) == []


def test_shares_the_cxx_runtime(library):
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not on the PATH")
    listing = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    assert {"libstdc++.so.6", "libtorch_cpu.so"} <= set(re.findall(r"NEEDED.*\[(.+)\]", listing))
    assert not re.search(r"RPATH|RUNPATH", listing)  # torch is loaded first, wherever it is


def test_a_foreign_symbol_is_seen():
    listing = (
        "   U aoti_torch_get_dim\n   U _ZN3c105ErrorC1Ev\n   U malloc@GLIBC_2.2.5\n   U cudaMalloc\n0011 T rms_norm\n"
    )
    assert foreign_symbols(listing) == ["_ZN3c105ErrorC1Ev", "cudaMalloc"]


def test_ops_register(library):
    """Loaded lazily, so that the CUDA shims missing from a CPU build of torch do not matter: the schemas must parse."""
    script = f"""
import ctypes, torch
dlopen = ctypes.CDLL(None).dlopen
dlopen.restype, dlopen.argtypes = ctypes.c_void_p, [ctypes.c_char_p, ctypes.c_int]
assert dlopen({str(library)!r}.encode(), 1), "dlopen failed"  # RTLD_LAZY
for name in ("rms_norm", "fused_add_rms_norm"):
    print(getattr(torch.ops.vllm_c, name).default._schema)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "vllm_c::rms_norm(Tensor(a!) out, Tensor x, Tensor weight, float eps, bool plus_one) -> ()" in done.stdout
    assert "vllm_c::fused_add_rms_norm(Tensor(a!) x, Tensor(b!) residual" in done.stdout


def test_the_door_knows_what_is_behind_it(library):
    """`_custom_ops` registers no form of an operator that is not there, which would end every start on a GPU, and calls none."""
    script = f"""
import ctypes, re, torch
from pathlib import Path
from vllm import _custom_ops
dlopen = ctypes.CDLL(None).dlopen
dlopen.restype, dlopen.argtypes = ctypes.c_void_p, [ctypes.c_char_p, ctypes.c_int]
assert dlopen({str(library)!r}.encode(), 1), "dlopen failed"  # RTLD_LAZY, as above
torch.ops.load_library = lambda path: None
assert _custom_ops._load(Path({str(library)!r})) is None
called = set(re.findall(r"torch\\.ops\\.vllm_c\\.(\\w+)", Path(_custom_ops.__file__).read_text()))
schemas = [s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("vllm_c::")]
print(sorted(called), sorted(name.split("::")[1] for name in schemas))
assert called == {{name.split("::")[1] for name in schemas}}
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_missing_library_is_said_once(monkeypatch, caplog, tmp_path):
    from vllm import _custom_ops, logger

    monkeypatch.setattr(_custom_ops, "_LIBRARY", tmp_path / "vllm_c.so")
    monkeypatch.setattr(logger, "_said", set())
    assert not _custom_ops.available("cpu")
    assert caplog.messages == []  # the CPU never had these kernels
    assert not _custom_ops.available("cuda") and not _custom_ops.available(torch.device("cuda", 0))
    assert len(caplog.messages) == 1 and "vllm_c.so was not built" in caplog.text


def test_a_library_that_does_not_fit_is_said(monkeypatch, caplog, tmp_path):
    from vllm import _custom_ops, logger

    broken = tmp_path / "vllm_c.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(_custom_ops, "_LIBRARY", broken)
    monkeypatch.setattr(logger, "_said", set())
    assert not _custom_ops.available("cuda")
    assert "does not fit this torch" in caplog.text
