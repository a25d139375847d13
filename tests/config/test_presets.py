"""The presets against what is known of the published models."""

import math

import pytest

from vllm.config import load_hf_config, preset_names, resolve_model
from vllm.v1.core.memory_plan import weight_parameters

# Billions of parameters of the published checkpoints, rounded; vision tower and MTP layer included.
BILLIONS = {
    "qwen3.5-0.8b": 0.87,
    "qwen3.5-2b": 2.27,
    "qwen3.5-4b": 4.66,
    "qwen3.5-9b": 9.65,
    "qwen3.5-27b": 27.8,
    "qwen3.6-27b": 27.8,
    "qwen3.5-35b-a3b": 36,
    "qwen3.6-35b-a3b": 36,
    "qwen3.5-122b-a10b": 125,
    "qwen3.5-397b-a17b": 403,
    "qwen3-next-80b-a3b": 81.3,
}


def load(name):
    return load_hf_config(resolve_model(f"preset:{name}"))


def vision_parameters(v: dict) -> int:
    hidden, inner, out = v["hidden_size"], v["intermediate_size"], v["out_hidden_size"]
    merged = hidden * v["spatial_merge_size"] ** 2
    block = 4 * hidden * hidden + 4 * hidden + 2 * hidden * inner + hidden + inner + 4 * hidden
    patch = hidden * v["in_channels"] * v["temporal_patch_size"] * v["patch_size"] ** 2 + hidden
    merger = 2 * hidden + merged * merged + merged + merged * out + out
    return v["depth"] * block + patch + v["num_position_embeddings"] * hidden + merger


def mtp_parameters(text) -> int:
    """One full-attention layer like the target's, fc [D, 2 D] and three norms."""
    parts = weight_parameters(text)
    one = parts["attention"] // text.num_attention_layers
    one += (
        sum(parts[name] for name in ("dense MLP", "routed experts", "shared expert", "router"))
        // text.num_hidden_layers
    )
    return one + 2 * text.hidden_size + 2 * text.hidden_size**2 + 3 * text.hidden_size


@pytest.mark.parametrize("name", BILLIONS)
def test_parameter_count(name):
    config = load(name)
    total = sum(weight_parameters(config.text).values()) + mtp_parameters(config.text)
    if config.has_vision:
        total += vision_parameters(config.raw["vision_config"])
    assert math.isclose(total / 1e9, BILLIONS[name], rel_tol=0.012)


@pytest.mark.parametrize("name", ["qwen3.5-0.8b", "qwen3.5-9b", "qwen3.5-35b-a3b", "qwen3-next-80b-a3b"])
def test_components_add_up_to_transformers_network(name):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = load(name)
    theirs = AutoConfig.from_pretrained(resolve_model(f"preset:{name}")).get_text_config()
    theirs.tie_word_embeddings = config.text.tie_word_embeddings
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(theirs)
    found = weight_parameters(config.text)
    theirs_total = sum(p.numel() for p in model.parameters())
    assert sum(found.values()) == theirs_total
    experts = sum(p.numel() for n, p in model.named_parameters() if ".mlp.experts." in n)
    gdn = sum(p.numel() for n, p in model.named_parameters() if ".linear_attn." in n)
    assert (found["routed experts"], found["GDN"]) == (experts, gdn)


def test_quantised_presets_differ_from_their_originals_in_that_only():
    for name in [n for n in preset_names() if n.endswith("-awq-4bit")]:
        raw = dict(load(name).raw)
        assert raw.pop("quantization_config")["quant_method"] == "compressed-tensors"
        assert raw == load(name.removesuffix("-awq-4bit")).raw


@pytest.mark.parametrize("name", [n for n in preset_names() if n not in ("tiny", "qwen3-next-80b-a3b")])
def test_vision_projects_to_the_language_model(name):
    config = load(name)
    vision = config.raw["vision_config"]
    assert vision["out_hidden_size"] == config.text.hidden_size
    assert vision["hidden_size"] % vision["num_heads"] == 0
