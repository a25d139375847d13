"""What loading holds: on the device the weights that were planned, on the host two chunks of a file."""

import json
import subprocess
import sys

import pytest
import torch

from tests.checkpoints import reference_model, save_checkpoint
from tests.models.families import load
from tests.quantised import FORMATS, ROOT
from vllm.config import load_hf_config, parse_hf_config, resolve_model
from vllm.config.model import LoadConfig
from vllm.config.quantization import parse_quantization
from vllm.model_executor.layers.quantization.plan import ConfigPlan
from vllm.model_executor.model_loader import checkpoint as files
from vllm.model_executor.model_loader import load_checkpoint
from vllm.model_executor.models.registry import model_class
from vllm.v1.core.memory_plan import weight_bytes

SMALL = {
    "qwen3.5-0.8b": {"text_config": {"num_hidden_layers": 4, "vocab_size": 1024}},
    "qwen3.5-35b-a3b": {
        "text_config": {"num_hidden_layers": 4, "vocab_size": 1024, "num_experts": 4, "num_experts_per_tok": 2}
    },
    "qwen3-next-80b-a3b": {"num_hidden_layers": 4, "vocab_size": 1024, "num_experts": 2, "num_experts_per_tok": 2},
}


sys.path.insert(0, str(ROOT / "benchmarks"))
from load_speed import write_checkpoint


def parameter_bytes(model):
    return sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.parametrize(
    "name",
    ["qwen3.5-0.8b", "qwen3.5-9b", "qwen3.5-35b-a3b-awq-4bit", "qwen3.5-122b-a10b-awq-4bit", "qwen3-next-80b-a3b"],
)
def test_plans_are_exact_for_presets(name):
    hf = load_hf_config(resolve_model(f"preset:{name}"))
    quant = parse_quantization(hf.quantization)
    with torch.device("meta"):
        model = model_class(hf.architecture)(hf.text, ConfigPlan(quant, torch.bfloat16))
    assert sum(weight_bytes(hf.text, "bfloat16", quant).values()) == parameter_bytes(model)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *(
            ("qwen3.5-0.8b", form)
            for form in ("w4a16-zero-points", "w8a16-channel", "fp8", "fp8-block", "nvfp4", "awq")
        ),
        ("qwen3.5-35b-a3b", "fp8-official"),
        ("qwen3-next-80b-a3b", "nvfp4"),
    ],
)
def test_plans_are_exact_for_formats(tmp_path, name, form):
    """Once everything is loaded and repacked. Shapes are the published ones; layers, experts and the vocabulary are few."""
    raw = dict(load_hf_config(resolve_model(f"preset:{name}")).raw)
    ignore = (
        ["in_proj_a", "in_proj_b", "lm_head"]
        if form in ("awq", "fp8-official")
        else ["re:.*in_proj_(a|b|ba)$", "lm_head", "re:.*gate$"]
    )
    raw["quantization_config"] = FORMATS[form].config(ignore)
    hf = parse_hf_config(raw, SMALL[name])
    options = LoadConfig(load_format="dummy")
    model = load_checkpoint(tmp_path, hf, dtype=torch.bfloat16, load_config=options)
    quant = parse_quantization(hf.quantization)
    assert sum(weight_bytes(hf.text, "bfloat16", quant).values()) == parameter_bytes(model)


def test_two_buffers_serve_all(tmp_path, monkeypatch):
    """Neighbours are read together into one buffer while the other is used; what is larger is used from the system's cache."""
    folder = save_checkpoint(reference_model("moe", torch.bfloat16), tmp_path, shards=3)
    want = {name: p.clone() for name, p in load(folder).named_parameters()}
    monkeypatch.setattr(files, "CHUNK", 50_000)
    places, large, read = set(), 0, files._read_chunk

    def watched(chunk, buffer):
        nonlocal large
        found = read(chunk, buffer)
        place = found[0][1].untyped_storage().data_ptr()
        if place == buffer.data_ptr():
            places.add(place)
        else:
            assert len(chunk) == 1 and chunk[0][1].num_bytes > 50_000
            large += 1
        return found

    monkeypatch.setattr(files, "_read_chunk", watched)
    got = dict(load(folder).named_parameters())
    assert all(torch.equal(got[name], p) for name, p in want.items())
    assert len(places) == 2 and large > 5


def test_tensors_that_are_not_aligned(tmp_path):
    """An odd number of bytes before a tensor: it is copied to where its type can be read."""
    data = bytes([1, 2, 3]) + torch.tensor([1.5, -2.0]).numpy().tobytes()
    header = {
        "odd": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "x": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
    }
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    found = {name: tensor.tolist() for name, tensor in files.Checkpoint(tmp_path).read({"odd", "x"})}
    assert found == {"odd": [1, 2, 3], "x": [1.5, -2.0]}


PROGRAM = """
import json, sys, tempfile
from pathlib import Path
import psutil, torch
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/benchmarks"]
from load_speed import load_seconds, peak_rss, write_checkpoint
from vllm.config.checkpoint import load_hf_config, resolve_model
from vllm.config.hf_config import parse_hf_config
from vllm.model_executor.model_loader import checkpoint
checkpoint.CHUNK = 8 << 20
hf = load_hf_config(resolve_model("preset:qwen3.5-0.8b"))
raw = lambda layers: parse_hf_config(hf.raw, {"text_config": {"num_hidden_layers": layers, "vocab_size": 1024}}).raw
with tempfile.TemporaryDirectory() as folder:
    small, large = Path(folder, "small"), Path(folder, "large")
    write_checkpoint(small, raw(1), 24 << 20)
    write_checkpoint(large, raw(4), 24 << 20)
    load_seconds(small, "cpu")  # whatever is imported or set up once
    Path("/proc/self/clear_refs").write_text("5")
    before = psutil.Process().memory_info().rss
    _, weights = load_seconds(large, "cpu")
    shard = max(file.stat().st_size for file in large.glob("*.safetensors"))
    print(json.dumps({"beside": peak_rss() - before - weights, "shard": shard, "weights": weights}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_host_memory_beside_the_weights():
    command = [sys.executable, "-c", PROGRAM, str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["weights"] > 4 * found["shard"], "too small to show anything"
    assert found["beside"] < 2 * found["shard"], found


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["w4a16-zero-points", "fp8-official", "nvfp4", "awq"])
def test_gpu_memory_beside_the_weights(tmp_path, form):
    """The device never holds more than the final weights and one layer."""
    raw = load_hf_config(resolve_model("preset:qwen3.5-2b")).raw
    raw = parse_hf_config(raw, {"text_config": {"num_hidden_layers": 4, "vocab_size": 1024}}).raw
    raw["quantization_config"] = FORMATS[form].config(["in_proj_a", "in_proj_b", "lm_head"])
    if form not in ("awq", "fp8-official"):
        raw["quantization_config"]["ignore"] = ["re:.*in_proj_[ab]$", "lm_head"]
    write_checkpoint(tmp_path, raw, 32 << 20)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    options = LoadConfig(use_tqdm_on_load=False)
    model = load_checkpoint(
        tmp_path, load_hf_config(tmp_path), dtype=torch.bfloat16, device="cuda", load_config=options
    )
    weights = parameter_bytes(model)
    one = sum(p.numel() * p.element_size() for p in model.layers[0].parameters())
    assert torch.cuda.max_memory_allocated() - before < weights + one
