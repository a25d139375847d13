"""The checkpoint folder of the tiny model: configuration files, tokenizer and weights in the published layout."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny_model import parameter_shapes, saved_dtype
from tiny_tokenizer import VOCAB_SIZE, build_tokenizer
from torch import Tensor
from transformers import Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration

LAYERS = 4
ROPE = {
    "rope_type": "default",
    "rope_theta": 10000000,
    "partial_rotary_factor": 0.25,
    "mrope_interleaved": True,
    "mrope_section": [11, 11, 10],
}


def text_config(eos_token_id: int) -> dict:
    """The language model's part of config.json, in the published shape."""
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_output_gate": True,
        "dtype": "bfloat16",
        "eos_token_id": eos_token_id,
        "full_attention_interval": 4,
        "head_dim": 256,
        "hidden_act": "silu",
        "hidden_size": 128,
        "initializer_range": 0.02,
        "layer_types": ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(LAYERS)],
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_value_head_dim": 128,
        "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 4096,
        "model_type": "qwen3_5_moe_text",
        "moe_intermediate_size": 64,
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "num_attention_heads": 4,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": 2,
        "output_router_logits": False,
        "partial_rotary_factor": 0.25,
        "rms_norm_eps": 1e-06,
        "rope_parameters": ROPE,
        "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": 64,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": VOCAB_SIZE,
    }


VISION = {
    "deepstack_visual_indexes": [],
    "depth": 2,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 32,
    "in_channels": 3,
    "initializer_range": 0.02,
    "intermediate_size": 64,
    "model_type": "qwen3_5_moe",
    "num_heads": 2,
    "num_position_embeddings": 64,
    "out_hidden_size": 128,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}

PREPROCESSOR = {
    "size": {"shortest_edge": 65536, "longest_edge": 16777216},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
    "image_processor_type": "Qwen2VLImageProcessorFast",
}

VIDEO_PREPROCESSOR = {
    **{key: value for key, value in PREPROCESSOR.items() if key != "image_processor_type"},
    "size": {"shortest_edge": 4096, "longest_edge": 25165824},
    "video_processor_type": "Qwen3VLVideoProcessor",
}


def build_config(tokenizer) -> dict:
    """config.json as published: a text part, a vision part, and the ids of the vision tokens."""
    token_id = tokenizer.convert_tokens_to_ids
    return {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "image_token_id": token_id("<|image_pad|>"),
        "model_type": "qwen3_5_moe",
        "text_config": text_config(token_id("<|endoftext|>")),
        "tie_word_embeddings": False,
        "transformers_version": "5.17.0",
        "video_token_id": token_id("<|video_pad|>"),
        "vision_config": VISION,
        "vision_end_token_id": token_id("<|vision_end|>"),
        "vision_start_token_id": token_id("<|vision_start|>"),
    }


def vision_weights(config: dict, seed: int) -> dict[str, Tensor]:
    """A random vision tower; norms and biases are shifted from their neutral values so that no one can be left out."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen3_5MoeForConditionalGeneration(Qwen3_5MoeConfig.from_dict(json.loads(json.dumps(config))))
        tower = {name: value for name, value in model.state_dict().items() if name.startswith("model.visual.")}
        rng = torch.Generator().manual_seed(seed)
        for name in sorted(tower):
            value = tower[name]
            # fan-in scale instead of the published 0.02, which would make a tower this narrow almost silent
            std = 0.1 if value.dim() == 1 else value[0].numel() ** -0.5
            offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            tower[name] = (offset + std * torch.randn(value.shape, generator=rng)).to(torch.bfloat16)
    return tower


def save_folder(folder: Path, params: dict[str, Tensor], seed: int) -> None:
    """Write the whole checkpoint; `params` are the float32 masters of tiny_model."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # reads tokenizer.json as it is
    config = build_config(tokenizer)
    im_end, end_of_text = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    generation = {
        "bos_token_id": end_of_text,
        "do_sample": True,
        "eos_token_id": [im_end, end_of_text],
        "pad_token_id": end_of_text,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "transformers_version": "5.17.0",
    }
    for name, content in (
        ("config.json", config),
        ("generation_config.json", generation),
        ("preprocessor_config.json", PREPROCESSOR),
        ("video_preprocessor_config.json", VIDEO_PREPROCESSOR),
        ("tokenizer_config.json", settings),
    ):
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    tensors = {name: value.detach().cpu().to(saved_dtype(name)).contiguous() for name, value in params.items()}
    tensors |= vision_weights(config, seed)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors creates files for the owner alone


def load_parameters(folder: Path, text: dict) -> dict[str, Tensor]:
    """The float32 parameters of tiny_model back from a folder (rounded to what was saved)."""
    tensors = load_file(folder / "model.safetensors")
    return {name: tensors[name].float() for name in parameter_shapes(text)}
