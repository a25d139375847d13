"""Quantised twins of small checkpoints, made by tools/quantize_tiny.py while tests run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
TOOLS = str(ROOT / "tools")
if TOOLS not in sys.path:
    sys.path.insert(0, TOOLS)

from quantize_tiny import LINEAR, quantise_folder  # noqa: F401
from tiny_formats import FORMATS

from vllm.model_executor.layers.quantization import TensorInfo
from vllm.model_executor.layers.quantization.base import KernelWeight
from vllm.model_executor.layers.quantization.nvfp4 import unpack as unpack_fp4
from vllm.model_executor.model_loader.checkpoint import DTYPES

NAMES = {dtype: name for name, dtype in DTYPES.items()}


def info(tensor: torch.Tensor, file: str = "") -> TensorInfo:
    """A tensor as a file's header would describe it."""
    return TensorInfo(NAMES[tensor.dtype], tuple(tensor.shape), file)


def infos(tensors: dict[str, torch.Tensor]) -> dict[str, TensorInfo]:
    return {name: info(tensor) for name, tensor in tensors.items()}


def fill(layer: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> torch.nn.Module:
    """What the loader does, for one layer whose tensors are at hand."""
    for slot in layer.checkpoint_slots():
        if slot.param is not None and not slot.layout:
            tensor = tensors[slot.name]
            assert tuple(tensor.shape) == slot.shape, slot.name
            slot.param[slot.region].copy_(tensor if slot.transform is None else slot.transform(tensor))
    layer.process_weights_after_loading()
    return layer


def change_config(folder: Path, **changes) -> None:
    """Lay `changes` over a folder's quantization_config."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


def quantization_config(form: str, ignore: tuple[str, ...] = ()) -> dict:
    return FORMATS[form].config(list(ignore))


def kernel_weight_reference(weight: KernelWeight) -> torch.Tensor:
    """What a KernelWeight says W is, word for word: float32 [..., N, K]."""
    q = weight.values
    if weight.kind in ("int4", "int8"):
        bits = int(weight.kind[3:])
        q = torch.cat([(q.long()[..., None] >> bits * i) & (2**bits - 1) for i in range(32 // bits)], -1).flatten(-2)
    elif weight.kind == "fp4":
        q = unpack_fp4(q)
    q = q.float()
    if weight.scale is None:
        return q
    rows, columns = torch.arange(q.shape[-2]) // weight.scale_rows, torch.arange(q.shape[-1]) // weight.group
    every = lambda t: t.float()[..., rows, :][..., columns]
    half = {"int4": 8.0, "int8": 128.0}.get(weight.kind, 0.0)
    w = (q - (half if weight.zero is None else every(weight.zero))) * every(weight.scale)
    return w if weight.row_scale is None else w * weight.row_scale[..., None]
