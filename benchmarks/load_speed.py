"""How fast are weights loaded, and how much memory does it take? Against what `dd` reads from the same disk.

    python benchmarks/load_speed.py --model preset:qwen3.5-0.8b --format w4a16 --out benchmarks/results/load_speed.json

Writes a checkpoint of the model's shape with random weights (`--layers` cuts it), throws it out of the page cache, reads it with `dd`,
throws it out again and loads it, and again and reads it without a model; runs alternate. On a CPU the weights' own memory is touched for
the first time, which costs about as much as reading. Exits with 1 where loading is slower than 60% of `dd`, or takes more host memory beside
the weights than two shards.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
for place in (ROOT, ROOT / "tools"):
    if str(place) not in sys.path:
        sys.path.insert(0, str(place))

from vllm.config.checkpoint import load_hf_config, resolve_model  # noqa: E402
from vllm.config.hf_config import parse_hf_config  # noqa: E402
from vllm.config.model import LoadConfig  # noqa: E402
from vllm.config.quantization import parse_quantization  # noqa: E402
from vllm.model_executor.layers.quantization.plan import ConfigPlan  # noqa: E402
from vllm.model_executor.model_loader import load_checkpoint  # noqa: E402
from vllm.model_executor.model_loader.checkpoint import DTYPES, Checkpoint  # noqa: E402
from vllm.model_executor.model_loader.match import checkpoint_slots  # noqa: E402
from vllm.model_executor.models.registry import model_class  # noqa: E402

SHARE = 0.6
"""Of dd's speed, that loading must reach."""


def write_checkpoint(folder: Path, raw: dict, shard_bytes: int) -> int:
    """A checkpoint of config.json `raw` with random bytes for weights, in shards of about `shard_bytes`. Returns its bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    hf = parse_hf_config(raw)
    with torch.device("meta"):
        model = model_class(hf.architecture)(hf.text, ConfigPlan(parse_quantization(hf.quantization), torch.bfloat16))
    shards, size = [{}], 0
    for slot in checkpoint_slots(model):
        if slot.layout or (slot.param is None and not slot.name.endswith("weight_shape")):
            continue  # another way to write the same, or a tensor that may be absent
        if slot.param is None:
            tensor = torch.zeros(slot.shape, dtype=torch.int64)
        elif slot.dtypes:
            tensor = torch.zeros(slot.shape, dtype=DTYPES[slot.dtypes[0]])
        else:
            tensor = torch.zeros(slot.shape, dtype=torch.bfloat16 if slot.param.is_floating_point() else torch.int32)
        if tensor.numel() > 1:
            tensor.view(torch.uint8).random_(0, 64)  # small numbers in every type
        if size + tensor.nbytes > shard_bytes and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][slot.name] = tensor
        size += tensor.nbytes
    weight_map, total = {}, 0
    for i, tensors in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
        total += (folder / file).stat().st_size
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return total


def forget(folder: Path) -> None:
    """Throw a folder's files out of the page cache."""
    os.sync()
    for file in folder.iterdir():
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def dd_seconds(folder: Path) -> float:
    forget(folder)
    start = time.perf_counter()
    for file in sorted(folder.glob("*.safetensors")):
        subprocess.run(["dd", f"if={file}", "of=/dev/null", "bs=16M"], check=True, capture_output=True)
    return time.perf_counter() - start


def load_seconds(folder: Path, device: str) -> tuple[float, int]:
    """Time of loading, and bytes of the parameters."""
    forget(folder)
    start = time.perf_counter()
    model = load_checkpoint(
        folder,
        load_hf_config(folder),
        dtype=torch.bfloat16,
        device=device,
        load_config=LoadConfig(use_tqdm_on_load=False),
    )
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start, sum(p.nbytes for p in model.parameters())


def read_seconds(folder: Path) -> float:
    """Time of reading every tensor, without a model to put it into."""
    forget(folder)
    start = time.perf_counter()
    checkpoint = Checkpoint(folder)
    for _ in checkpoint.read(set(checkpoint.entries)):
        pass
    return time.perf_counter() - start


def peak_rss() -> int:
    """The most memory that this process has held so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) << 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="preset:qwen3.5-0.8b")
    parser.add_argument("--format", help="a format of tools/tiny_formats.py; default: what the model's config says")
    parser.add_argument("--layers", type=int, help="so many layers instead of the model's")
    parser.add_argument("--shard", type=int, default=512, help="size of a file in MiB")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--folder", type=Path, help="where the checkpoint is written; default: the system's temporary folder"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    raw = json.loads((resolve_model(args.model) / "config.json").read_text())
    if args.layers:
        overrides = {"num_hidden_layers": args.layers}
        raw = parse_hf_config(raw, {"text_config": overrides} if "text_config" in raw else overrides).raw
    if args.format:
        from tiny_formats import FORMATS

        raw["quantization_config"] = FORMATS[args.format].config(["lm_head"])
    folder = Path(tempfile.mkdtemp(dir=args.folder)) / "checkpoint"
    try:
        total = write_checkpoint(folder, raw, args.shard << 20)
        shard = max(file.stat().st_size for file in folder.glob("*.safetensors"))
        before, dd, read, load = psutil.Process().memory_info().rss, [], [], []
        for i in range(args.runs):
            dd.append(dd_seconds(folder))
            seconds, weights = load_seconds(folder, args.device)
            load.append(seconds)
            read.append(read_seconds(folder))
            if i == 0:
                beside = peak_rss() - before - (weights if args.device == "cpu" else 0)
            speeds = {"dd": dd[-1], "read": read[-1], "load": load[-1]}
            print(", ".join(f"{name} {total / seconds / 1e9:.2f} GB/s" for name, seconds in speeds.items()), flush=True)
    finally:
        shutil.rmtree(folder.parent)
    share = statistics.median(dd) / statistics.median(load)
    result = {
        "command": " ".join(["python", "benchmarks/load_speed.py", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "bytes": total,
        "largest_shard_bytes": shard,
        "dd_gb_per_s": [round(total / s / 1e9, 3) for s in dd],
        "load_gb_per_s": [round(total / s / 1e9, 3) for s in load],
        "read_gb_per_s": [round(total / s / 1e9, 3) for s in read],
        "share_of_dd": round(share, 3),
        "share_of_dd_reading_alone": round(statistics.median(dd) / statistics.median(read), 3),
        "host_bytes_beside_weights": beside,
        "host_shards_beside_weights": round(beside / shard, 3),
    }
    if args.device == "cuda":
        result["device_peak_beside_weights"] = torch.cuda.max_memory_allocated() - weights
    print(json.dumps(result, indent=2))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    return int(share < SHARE or beside > 2 * shard)


if __name__ == "__main__":
    sys.exit(main())
