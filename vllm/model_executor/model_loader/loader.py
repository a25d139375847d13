"""Build a model without memory, give its parameters room on the device, and fill them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from tqdm import tqdm

from vllm.config.gdn import GDNConfig
from vllm.config.hf_config import HFConfig
from vllm.config.model import LoadConfig
from vllm.config.quantization import parse_quantization
from vllm.model_executor.layers.quantization.plan import CheckpointPlan, ConfigPlan
from vllm.model_executor.layers.quantization.schema import check_ignore_list, check_schema
from vllm.model_executor.model_loader.checkpoint import Checkpoint
from vllm.model_executor.model_loader.kv_scales import load_kv_scales
from vllm.model_executor.model_loader.match import match_slots
from vllm.model_executor.models.registry import model_class

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def load_model(config: VllmConfig, device: torch.device | str) -> nn.Module:
    """The model of an engine's configuration; see `load_checkpoint`."""
    return load_checkpoint(
        config.model_config.model_path,
        config.model_config.hf_config,
        dtype=getattr(torch, config.model_config.dtype),
        device=device,
        load_config=config.load_config,
        gdn_config=config.gdn_config,
    )


@torch.no_grad()
def load_checkpoint(
    model_dir: Path | str,
    hf_config: HFConfig,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    load_config: LoadConfig | None = None,
    gdn_config: GDNConfig | None = None,
) -> nn.Module:
    """The model of a checkpoint, ready to run: on `device`, in eval mode, without gradients.

    Files are read once, from begin to end, and host memory holds two chunks of them (see `Checkpoint.read`). With `load_format="dummy"` nothing is read: weights are random, the same every time, and
    made on the device.

    Args:
        model_dir: folder of the checkpoint.
        hf_config: its parsed config.json.
        dtype: of weights and activations; the few tensors that checkpoints keep in float32 for the gates stay so.
        gdn_config: variants of the GDN layer's stages.

    Raises:
        ValueError: the architecture or the weights' format is not supported, or the files do not fit the model. One line, with the
            file or the tensors.
    """
    device, load_config = torch.device(device), load_config or LoadConfig()
    build, source = model_class(hf_config.architecture), f"{model_dir}/config.json"
    check_schema(hf_config.quantization, source)
    quant = parse_quantization(hf_config.quantization, source)
    if load_config.load_format == "dummy":
        plan = ConfigPlan(quant, dtype)
        with torch.device("meta"):
            model = build(hf_config.text, plan, gdn_config)
        check_ignore_list(quant, plan.modules)
        _materialise(model, device)
        _fill_dummy(model, device)
    else:
        checkpoint = Checkpoint(model_dir)
        plan = CheckpointPlan(checkpoint.tensors, dtype, quant)
        with torch.device("meta"):
            model = build(hf_config.text, plan, gdn_config)
        check_ignore_list(quant, checkpoint.modules)
        load_kv_scales(model, checkpoint)
        _materialise(model, device)
        _fill(model, checkpoint, progress=load_config.use_tqdm_on_load)
    plan.log()
    for module in model.modules():
        if hasattr(module, "process_weights_after_loading"):
            module.process_weights_after_loading()
    return model.eval()


def _materialise(model: nn.Module, device: torch.device) -> None:
    """Uninitialised room on the device for parameters built on meta; buffers have their values already and move."""
    for module in model.modules():
        for name, param in module.named_parameters(recurse=False):
            # empty_like of meta tensors would import sympy: a third of a second
            room = torch.empty(param.shape, dtype=param.dtype, device=device) if param.is_meta else param.to(device)
            setattr(module, name, nn.Parameter(room, requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def _fill(model: nn.Module, checkpoint: Checkpoint, progress: bool) -> None:
    slots = match_slots(model, checkpoint)
    wanted = {name for name, slot in slots.items() if slot.param is not None}
    total = sum(checkpoint.entries[name].num_bytes for name in wanted)
    with tqdm(total=total, unit="B", unit_scale=True, desc="Loading weights", disable=not progress) as bar:
        for name, tensor in checkpoint.read(wanted, pin=next(model.parameters()).is_cuda):
            slot = slots[name]
            bar.update(checkpoint.entries[name].num_bytes)
            if slot.on_device:
                tensor = tensor.to(slot.param.device)
            slot.param[slot.region].copy_(tensor if slot.transform is None else slot.transform(tensor))


def _fill_dummy(model: nn.Module, device: torch.device) -> None:
    generator = torch.Generator(device).manual_seed(0)
    for module in model.modules():
        if hasattr(module, "fill_dummy"):
            module.fill_dummy(generator)
