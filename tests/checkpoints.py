"""Small random checkpoints of every family, written by transformers while tests run.

Norm weights are moved away from their initial zeros (which hide the 1 + w), and A_log is stored in float32 like the published ones.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

TEXT = {
    "vocab_size": 512,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 1,
    "bos_token_id": 0,
    "pad_token_id": 0,
}
ROPE = {"rope_type": "default", "rope_theta": 10000000, "partial_rotary_factor": 0.25}
MROPE = {**ROPE, "mrope_interleaved": True, "mrope_section": [3, 3, 2]}
EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}
VISION = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 4,
    "out_hidden_size": 128,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [],
}
IDS = {"image_token_id": 10, "video_token_id": 11, "vision_start_token_id": 8, "vision_end_token_id": 9}
MTP = {"mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False}

FAMILIES = ("moe", "dense", "next")


def reference_model(family: str, dtype: torch.dtype = torch.float32, **text: Any) -> torch.nn.Module:
    """transformers' own model with random weights. `text` changes entries of the text config."""
    import transformers

    torch.manual_seed(0)
    if family == "next":
        config = transformers.Qwen3NextConfig(
            **{**TEXT, **EXPERTS, "rope_parameters": ROPE, "norm_topk_prob": True, **text}
        )
        model = transformers.Qwen3NextForCausalLM(config)
    elif family == "moe":
        settings = {**TEXT, **EXPERTS, **MTP, "rope_parameters": MROPE, **text}
        config = transformers.Qwen3_5MoeConfig(text_config=settings, vision_config=VISION, **IDS)
        model = transformers.Qwen3_5MoeForConditionalGeneration(config)
    else:
        settings = {**TEXT, **MTP, "rope_parameters": MROPE, "intermediate_size": 256, **text}
        tied = settings.get("tie_word_embeddings", False)
        config = transformers.Qwen3_5Config(text_config=settings, vision_config=VISION, tie_word_embeddings=tied, **IDS)
        model = transformers.Qwen3_5ForConditionalGeneration(config)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "norm" in name:
                param.add_(torch.randn_like(param) * 0.3)
            elif name.endswith("dt_bias"):
                param.uniform_(-4.0, 1.0)
            elif param.dim() >= 2:
                # transformers' initial deviation of 0.02 makes every layer a whisper beside the residual
                param.mul_(3.0)
    return model.to(dtype).eval()


def save_checkpoint(model: torch.nn.Module, folder: Path, *, experts: str = "fused", shards: int = 1) -> Path:
    """Write config.json and safetensors files as the published checkpoints have them.

    Args:
        experts: "fused" (3-D tensors) or "each" (one module an expert).
        shards: files to spread the tensors over; more than one come with an index.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    tensors = {name: t.detach().contiguous().clone() for name, t in model.state_dict().items()}
    tensors = {
        name: t.float() if name.endswith(("A_log", "linear_attn.norm.weight")) else t for name, t in tensors.items()
    }
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight")
    if experts == "each":
        tensors = split_experts(tensors)
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = [type(model).__name__]
    (folder / "config.json").write_text(json.dumps(config))
    write_tensors(tensors, folder, shards)
    return folder


def split_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """3-D expert tensors -> one module an expert."""
    out = {}
    for name, t in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            for e, (gate, up) in enumerate(w.chunk(2) for w in t):
                prefix = name.removesuffix("gate_up_proj")
                out[f"{prefix}{e}.gate_proj.weight"], out[f"{prefix}{e}.up_proj.weight"] = gate.clone(), up.clone()
        elif name.endswith("experts.down_proj"):
            for e, w in enumerate(t):
                out[f"{name.removesuffix('down_proj')}{e}.down_proj.weight"] = w.clone()
        else:
            out[name] = t
    return out


def write_tensors(tensors: dict[str, torch.Tensor], folder: Path, shards: int = 1) -> None:
    """model.safetensors, or several files and their index."""
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    for i, file in enumerate(files):
        save_file({name: tensors[name] for name in names[i::shards]}, folder / file, metadata={"format": "pt"})
    weight_map = {name: files[i % shards] for i, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
