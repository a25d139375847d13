import os

import pytest

from vllm.entrypoints.cli import nvidia_smi

ANSWER = """0, GPU-aa, NVIDIA H200, 143771, 9.0, 580.95.05
1, GPU-bb, NVIDIA RTX 5090, 32607, 12.0, 580.95.05
"""


def test_parse():
    first, second = nvidia_smi.parse(ANSWER)
    assert (first.name, first.memory_bytes, first.compute_capability) == ("NVIDIA H200", 143771 << 20, "9.0")
    assert (second.index, second.uuid, second.driver) == ("1", "GPU-bb", "580.95.05")
    assert nvidia_smi.parse("No devices were found\n0, u, n, [N/A], 9.0, 1\n") == []


@pytest.mark.parametrize(
    ("visible", "names"),
    [(None, ["GPU-aa", "GPU-bb"]), ("1", ["GPU-bb"]), ("1,0", ["GPU-bb", "GPU-aa"]), ("GPU-aa", ["GPU-aa"]), ("", [])],
)
def test_visible_devices(monkeypatch, tmp_path, visible, names):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\ncat <<'END'\n{ANSWER}END\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu.uuid for gpu in nvidia_smi.gpus()] == names


def test_no_driver(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert nvidia_smi.gpus() == []
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nexit 9\n")
    smi.chmod(0o755)
    assert nvidia_smi.gpus() == []
