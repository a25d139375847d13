import json
import subprocess
import sys

import pytest

from vllm.config import preset_names
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.cli import main as cli
from vllm.entrypoints.cli import plan
from vllm.entrypoints.cli.nvidia_smi import GPU
from vllm.v1.core.memory_plan import RUNTIME_RESERVE, GiB, workspace_bytes

MODEL = "preset:qwen3.5-35b-a3b-awq-4bit"


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(plan, "gpus", list)


def run(capsys, *words):
    assert cli.main(["plan", *words]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


@pytest.mark.parametrize("name", [n for n in preset_names() if n != "tiny"])
def test_every_preset(capsys, name):
    out = run(capsys, f"preset:{name}")
    assert "weights, all" in out and "141 GiB" in out


def test_tables(capsys):
    out = run(capsys, MODEL, "--gpu-memory", "32", "--max-model-len", "32K", "--max-num-seqs", "64")
    assert "34.66 billion parameters" in out
    assert "routed experts  32,212.3 M   16.9 GiB  4.5 bits" in out
    assert "GDN state   61.4 MiB a sequence" in out and "KV pages    20.0 KiB a token" in out
    assert "vision tower and MTP layer" in out
    assert "GDN state: 3.9 GiB in 65 slots of 61.4 MiB" in out
    rows = [line.split() for line in out.splitlines()[-9:]]
    assert [row[0] for row in rows] == ["1", "2", "4", "8", "16", "32", "64", "128", "256"]
    assert all(len(row) == 5 for row in rows)


def test_ceiling_by_hand():
    config = EngineArgs(MODEL).create_engine_config(device="cuda")
    weights = sum(plan.make_plan(config, 32 * GiB).weights.values())
    for seqs in (1, 8, 32):
        left = int(32 * GiB * 0.9) - weights - RUNTIME_RESERVE
        limits = {"max_num_batched_tokens": 4096, "max_num_seqs": seqs}
        left -= workspace_bytes(config.hf_config.text, **limits, quant=config.quant_scheme)
        left -= (seqs + 1) * 64_389_120 + 16 * 20_480
        assert plan.ceiling(config, 32 * GiB, 0.9, seqs) == min(left // (16 * 20_480) // seqs * 16, 262144)


def test_what_does_not_fit_is_said(capsys):
    assert "leave nothing of 16.0 GiB x 0.9" in run(capsys, MODEL, "--gpu-memory", "16")
    out = run(capsys, MODEL, "--gpu-memory", "32", "--max-num-seqs", "64")
    assert "106,416 tokens would fit: --max-model-len 106416" in out


def test_the_gpu_that_is_there(capsys, monkeypatch):
    monkeypatch.setattr(plan, "gpus", lambda: [GPU("0", "GPU-1", "NVIDIA X", 80 * GiB, "9.0", "580")])
    assert "NVIDIA X 80.0 GiB x 0.9 = 72.0 GiB" in run(capsys, MODEL)


def test_a_share_of_ones_own_gets_a_column(capsys):
    out = run(capsys, MODEL, "--gpu-memory", "48", "--gpu-memory-utilization", "0.5")
    assert "0.50" in out.splitlines()[-11]


def test_json(capsys):
    found = json.loads(
        run(capsys, MODEL, "--gpu-memory", "32", "--max-model-len", "32K", "--max-num-seqs", "64", "--json")
    )
    assert found["state_bytes_per_sequence"] == 64_389_120 and found["kv_bytes_per_token"] == 20_480
    assert found["device"]["fits"] and found["device"]["pools"]["num_slots"] == 65
    assert len(found["ceilings"]) == 4 * 9
    cards = json.loads(run(capsys, MODEL, "--json"))
    assert cards["device"] is None and len(cards["ceilings"]) == 6 * 9


def test_flags_of_the_engine_count(capsys):
    def slot(*words):
        return json.loads(run(capsys, MODEL, "--json", *words))["state_bytes_per_sequence"]

    assert slot("--mamba-ssm-cache-dtype", "bfloat16") == 30 * ((1 << 20) + 8192 * 3 * 2)
    assert slot("--hf-overrides.text_config.num_hidden_layers", "4") == 64_389_120 // 10
    assert slot("--device", "cpu") == 30 * ((2 << 20) + 8192 * 3 * 4)


def test_needs_no_torch():
    code = (
        "import sys; from vllm.entrypoints.cli.main import main;"
        f"main(['plan', '{MODEL}', '--gpu-memory', '32', '--json']);"
        "print([m for m in ('torch', 'transformers', 'huggingface_hub') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
