import copy

import pytest

from vllm.config import load_hf_config, parse_quantization, resolve_model

CONFIG = load_hf_config(resolve_model("preset:qwen3.5-35b-a3b-awq-4bit")).quantization


def changed(key, value, where="weights"):
    config = copy.deepcopy(CONFIG)
    group = config["config_groups"]["group_0"]
    {"weights": group["weights"], "group": group, "top": config}[where][key] = value
    return config


def test_plain():
    assert parse_quantization(None) is None
    assert parse_quantization({}) is None


def test_preset_covers_routed_experts_only():
    scheme = parse_quantization(CONFIG)
    assert (scheme.method, scheme.num_bits, scheme.group_size) == ("compressed-tensors", 4, 32)
    assert scheme.bytes_per_weight == 0.5 + 2 / 32
    layer = "model.language_model.layers.3."
    assert scheme.covers(layer + "mlp.experts.17.gate_proj")
    for name in ("mlp.gate", "mlp.shared_expert.up_proj", "mlp.shared_expert_gate", "self_attn.q_proj"):
        assert not scheme.covers(layer + name)
    for name in ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z", "linear_attn.in_proj_b", "linear_attn.out_proj"):
        assert not scheme.covers(layer + name)
    assert not scheme.covers("lm_head")
    assert not scheme.covers("model.visual.blocks.0.attn.qkv")
    assert not scheme.covers("mtp.layers.0.mlp.experts.0.up_proj")


def test_targets_may_be_names_or_patterns():
    scheme = parse_quantization(changed("targets", ["re:.*experts.*", "a.b"], "group"))
    assert scheme.covers("x.experts.0.up_proj") and scheme.covers("a.b") and not scheme.covers("a.c")


def test_several_groups_of_one_scheme():
    config = copy.deepcopy(CONFIG)
    config["config_groups"]["group_1"] = {**config["config_groups"]["group_0"], "targets": ["re:.*other"]}
    assert parse_quantization(config).targets == ("Linear", "re:.*other")


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"quant_method": "fp8"}, "'fp8' is not supported"),
        ({"quant_method": "awq", "bits": 4}, "'awq' is not supported"),
        (changed("num_bits", 8), "num_bits 8"),
        (changed("symmetric", False), "symmetric False"),
        (changed("strategy", "channel"), "strategy 'channel'"),
        (changed("type", "float"), "type 'float'"),
        (changed("group_size", None), "group_size None"),
        (changed("actorder", "group"), "actorder True"),
        (changed("format", "nvfp4-pack-quantized", "top"), "nvfp4-pack-quantized"),
        (changed("input_activations", {"num_bits": 8}, "group"), "input_activations True"),
        (changed("config_groups", {}, "top"), "0 weight schemes"),
    ],
)
def test_what_cannot_run_is_named(config, word):
    with pytest.raises(ValueError) as caught:
        parse_quantization(config, "/m/config.json")
    assert word in str(caught.value) and str(caught.value).startswith("/m/config.json: ")
