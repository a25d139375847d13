"""Write a quantised version of a small checkpoint, as it would be published.

    python tools/quantize_tiny.py --format w4a16 --out DIR                        # of the bundled checkpoint
    python tools/quantize_tiny.py --format fp8-official --model FOLDER --out DIR --dense DIR2

`--dense` also writes the plain checkpoint that the quantised one stands for, weight by weight. The embedding, the output head, the
router, the gates b and a, the vision tower and the draft layer stay plain, as in published checkpoints, and so does every matrix that
the format's groups do not divide. Experts come one by one.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT / "tools") not in sys.path:
    sys.path.insert(0, str(ROOT / "tools"))

from safetensors.torch import load_file, save_file  # noqa: E402
from tiny_formats import FORMATS, Format  # noqa: E402
from torch import Tensor  # noqa: E402

BUNDLED = ROOT / "vllm" / "assets" / "tiny-qwen3_5-moe"

LINEAR = re.compile(
    r"\.layers\.\d+\.(self_attn\.[qkvo]_proj|linear_attn\.(in_proj_(qkvz|qkv|z)|out_proj)|"
    r"mlp\.(shared_expert\.|experts\.\d+\.)?(gate|up|down)_proj)$"
)
"""Modules that published checkpoints quantise."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", choices=list(FORMATS), required=True)
    parser.add_argument(
        "--model", type=Path, default=BUNDLED, help="folder of a plain checkpoint; default: the bundled one"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--dense", type=Path, help="folder for the plain checkpoint that the written one stands for")
    args = parser.parse_args()
    count = quantise_folder(args.model, args.out, FORMATS[args.format], dense=args.dense)
    size = sum(file.stat().st_size for file in args.out.glob("*.safetensors"))
    print(f"{args.out}: {count} matrices in {args.format}, {size / 1e6:.1f} MB")
    return 0


def quantise_folder(
    source: Path,
    out: Path,
    form: Format,
    *,
    dense: Path | None = None,
    pick: Callable[[str], bool] = lambda module: bool(LINEAR.search(module)) and not module.startswith("mtp."),
) -> int:
    """Write the checkpoint in `source` to `out`, the modules that `pick` wants quantised. Returns how many are.

    Raises:
        ValueError: `source` has no safetensors files.
    """
    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{source}: there are no safetensors files")
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= load_file(file)
    quantised, plain, kept, count = {}, {}, [], 0
    for name, tensor in split_experts(tensors).items():
        module, _, suffix = name.rpartition(".")
        matrix = suffix == "weight" and tensor.dim() == 2 and "embed_tokens" not in name
        if matrix and pick(module) and not tensor.shape[1] % form.inputs and not tensor.shape[0] % form.outputs:
            parts, plain[name] = form.quantise(tensor)
            quantised |= {f"{module}.{part}": t for part, t in parts.items()}
            count += 1
            continue
        quantised[name] = plain[name] = tensor
        if matrix:
            kept.append(module)
    config = json.loads((source / "config.json").read_text())
    config.pop("quantization_config", None)
    if dense is not None:
        _write(source, dense, plain, config)
    _write(source, out, quantised, {**config, "quantization_config": form.config(kept)})
    return count


def split_experts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stacks of experts -> one module an expert: gate_up_proj [E, 2I, D] holds gate rows first, down_proj is [E, D, I]."""
    out: dict[str, Tensor] = {}
    for name, t in tensors.items():
        prefix, _, last = name.rpartition(".")
        if not prefix.endswith(".experts"):
            out[name] = t
            continue
        for e, w in enumerate(t):
            parts = dict(zip(("gate_proj", "up_proj"), w.chunk(2))) if last == "gate_up_proj" else {last: w}
            out |= {f"{prefix}.{e}.{part}.weight": x.clone() for part, x in parts.items()}
    return out


def _write(source: Path, folder: Path, tensors: dict[str, Tensor], config: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and not file.name.endswith(".index.json"):
            shutil.copyfile(file, folder / file.name)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


if __name__ == "__main__":
    sys.exit(main())
