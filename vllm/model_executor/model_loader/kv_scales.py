"""Scales of attention keys and values for caches in fp8."""

from __future__ import annotations

import math

from torch import nn

from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.model_loader.checkpoint import Checkpoint


def load_kv_scales(model: nn.Module, checkpoint: Checkpoint | None) -> None:
    """Set `k_scale` and `v_scale` of every attention layer: a cache in fp8 holds keys / k_scale and values / v_scale.

    They are numbers on the host, from the checkpoint's `self_attn.k_scale` and `self_attn.v_scale` (one element each), and 1 where
    it has none. Their tensors leave `checkpoint.entries`: they fill no parameter.

    Raises:
        ValueError: a scale that is no positive number, with the tensor and the file.
    """
    for path, module in model.named_modules():
        if isinstance(module, Attention):
            for which in ("k_scale", "v_scale"):
                setattr(module, which, 1.0)
                name = f"model.{path.rpartition('.')[0]}.{which}"
                if checkpoint is not None and name in checkpoint.entries:
                    setattr(module, which, _read_scale(name, checkpoint))
                    del checkpoint.entries[name]


def _read_scale(name: str, checkpoint: Checkpoint) -> float:
    ((_, tensor),) = checkpoint.read({name})
    file = checkpoint.entries[name].file.name
    if tensor.numel() != 1:
        raise ValueError(f"{name} is {list(tensor.shape)} instead of one number (in {file})")
    value = float(tensor)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} is {value:g} instead of a positive number (in {file})")
    return value
