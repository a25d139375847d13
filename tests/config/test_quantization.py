"""quantization_config of every kind: which modules it covers, how they are stored, and what is refused."""

import copy
import json

import pytest

from tests.quantised import quantization_config
from vllm.config import load_hf_config, parse_quantization, resolve_model
from vllm.config.quantization import AWQ, FLOAT8, NVFP4, OFFICIAL_FP8, PACKED, WeightFormat, module_names

CONFIG = load_hf_config(resolve_model("preset:qwen3.5-35b-a3b-awq-4bit")).quantization


def changed(key, value, where="weights", config=CONFIG):
    config = copy.deepcopy(config)
    group = config["config_groups"]["group_0"]
    {"weights": group["weights"], "group": group, "top": config}[where][key] = value
    return config


def test_plain():
    assert parse_quantization(None) is None
    assert parse_quantization({}) is None


def test_preset_covers_routed_experts_only():
    quant = parse_quantization(CONFIG)
    assert quant.method == "compressed-tensors"
    assert quant.formats == (WeightFormat(PACKED, 4, 32),)
    for prefix in ("model.", "model.language_model."):
        layer = f"{prefix}layers.3."
        assert quant.format_of(layer + "mlp.experts.17.gate_proj")
        for name in ("mlp.gate", "mlp.shared_expert.up_proj", "mlp.shared_expert_gate", "self_attn.q_proj"):
            assert not quant.format_of(layer + name)
        for name in ("in_proj_qkv", "in_proj_z", "in_proj_b", "out_proj"):
            assert not quant.format_of(f"{layer}linear_attn.{name}")
    assert not quant.format_of("lm_head")
    assert not quant.format_of("model.visual.blocks.0.attn.qkv")
    assert not quant.format_of("mtp.layers.0.mlp.experts.0.up_proj")


@pytest.mark.parametrize(
    ("form", "want"),
    [
        ("w4a16", WeightFormat(PACKED, 4, 32)),
        ("w4a16-zero-points", WeightFormat(PACKED, 4, 32, symmetric=False)),
        ("w8a16-channel", WeightFormat(PACKED, 8, -1, symmetric=False)),
        ("fp8", WeightFormat(FLOAT8, 8, quantize_inputs=True)),
        ("fp8-block", WeightFormat(FLOAT8, 8, 128, 128, quantize_inputs=True)),
        ("fp8-official", WeightFormat(OFFICIAL_FP8, 8, 128, 128, quantize_inputs=True)),
        ("nvfp4", WeightFormat(NVFP4, 4, 16)),
        ("awq", WeightFormat(AWQ, 4, 32, symmetric=False)),
    ],
)
def test_formats(form, want):
    assert parse_quantization(quantization_config(form)).formats == (want,)


def test_bytes_of_a_matrix():
    assert WeightFormat(PACKED, 4, 32).matrix_bytes(128, 256) == 128 * 128 + 128 * 8 * 2
    assert WeightFormat(PACKED, 4, 32, symmetric=False).matrix_bytes(128, 256) == 128 * 128 + 128 * 8 * 3
    assert WeightFormat(FLOAT8, 8).matrix_bytes(128, 256) == 128 * 256 + 128 * 2
    assert WeightFormat(OFFICIAL_FP8, 8, 128, 128).matrix_bytes(200, 300) == 200 * 300 + 2 * 3 * 2
    assert WeightFormat(NVFP4, 4, 16).matrix_bytes(128, 256) == 128 * 128 + 128 * 16 + 128 * 8


def test_targets_may_be_names_or_patterns():
    quant = parse_quantization(changed("targets", ["re:.*experts.*", "a.b"], "group"))
    assert quant.format_of("x.experts.0.up_proj") and quant.format_of("a.b") and not quant.format_of("a.c")


def test_several_groups():
    """The particular one counts, whatever their order; formats may differ."""
    config = copy.deepcopy(CONFIG)
    fp8 = quantization_config("fp8")["config_groups"]["group_0"]
    config |= {"format": "mixed-precision", "ignore": []}
    config["config_groups"]["group_1"] = {**fp8, "targets": ["re:.*o_proj$"], "format": "float-quantized"}
    quant = parse_quantization(config)
    assert quant.format_of("model.layers.0.self_attn.o_proj").name == FLOAT8
    assert quant.format_of("model.layers.0.self_attn.q_proj").name == PACKED


@pytest.mark.parametrize(
    ("entry", "hit", "miss"),
    [
        ("model.layers.3.self_attn.qkv_proj", "model.layers.3.self_attn.k_proj", "model.layers.3.self_attn.o_proj"),
        ("re:.*in_proj_ba$", "model.layers.0.linear_attn.in_proj_a", "model.layers.0.linear_attn.in_proj_z"),
        ("re:.*in_proj_qkvz", "model.layers.0.linear_attn.in_proj_z", "model.layers.0.linear_attn.in_proj_b"),
        ("re:.*linear_attn.in_proj$", "model.layers.0.linear_attn.in_proj_qkvz", "model.layers.0.linear_attn.out_proj"),
        ("model.language_model.layers.0.mlp.gate_up_proj", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"),
        ("re:model.language_model.layers.0.*", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"),
        ("re:.*mlp.gate$", "model.layers.0.mlp.gate", "model.layers.0.mlp.gate_proj"),
        ("language_model.lm_head", "lm_head", "model.layers.0.mlp.up_proj"),
    ],
)
def test_ignore_lists_use_many_names(entry, hit, miss):
    quant = parse_quantization(changed("ignore", [entry], "top"))
    assert quant.format_of(hit) is None and quant.format_of(miss) is not None
    assert quant.unmatched([hit]) == [] and quant.unmatched([miss]) == [entry]


def test_lists_of_the_other_methods():
    fp8 = parse_quantization(quantization_config("fp8-official", ("model.visual", "linear_attn.in_proj_a", "mlp.gate")))
    assert fp8.format_of("model.visual.blocks.0.attn.qkv") is None
    assert fp8.format_of("model.layers.0.linear_attn.in_proj_a") is None
    assert fp8.format_of("model.layers.0.mlp.gate_proj") and fp8.format_of("model.layers.0.linear_attn.in_proj_b")
    awq = parse_quantization(quantization_config("awq", ("shared_expert",)))
    assert awq.format_of("model.layers.0.mlp.shared_expert.up_proj") is None
    assert awq.format_of("model.layers.0.mlp.experts.0.up_proj")
    for quant in (fp8, awq):  # listed or not
        assert quant.format_of("lm_head") is None and quant.format_of("model.layers.0.mlp.gate") is None


def test_names():
    names = module_names("model.layers.0.linear_attn.in_proj_b")
    assert {"model.language_model.layers.0.linear_attn.in_proj_ba", "model.layers.0.linear_attn.in_proj"} <= set(names)


def test_scales_of_keys_and_values():
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    assert parse_quantization(changed("kv_cache_scheme", scheme, "top")).kv_cache_fp8
    assert not parse_quantization(CONFIG).kv_cache_fp8
    with pytest.raises(ValueError, match=r"kv_cache_scheme is .*'num_bits': 4.*; expected float, 8 bits"):
        parse_quantization(changed("kv_cache_scheme", {**scheme, "num_bits": 4}, "top"))


FP8, NV, OFFICIAL, AUTO = (quantization_config(form) for form in ("fp8", "nvfp4", "fp8-official", "awq"))


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"quant_method": "gptq"}, "quant_method 'gptq' is not supported; supported is compressed-tensors pack"),
        ({"quant_method": None}, "quant_method None is not supported"),
        (changed("num_bits", 3), "has num_bits 3; pack-quantized is supported with 4 or 8"),
        (changed("strategy", "tensor"), "has strategy 'tensor'"),
        (changed("type", "float"), "has type 'float'; pack-quantized is supported with 'int'"),
        (changed("group_size", None), "has group_size None; expected a multiple of 8"),
        (changed("group_size", 20), "has group_size 20; expected a multiple of 8"),
        (changed("actorder", "group"), "has actorder 'group'"),
        (changed("dynamic", True), "weights have dynamic True"),
        (changed("format", "marlin-24", "top"), "group_0: has format 'marlin-24'; supported is"),
        (changed("format", "int-quantized", "group"), "group_0: has format 'int-quantized'; supported is"),
        (changed("input_activations", {"num_bits": 8}, "group"), "has input_activations of 8 bits"),
        (changed("config_groups", {}, "top"), "has no config_groups"),
        (changed("config_groups", {"W4A16": ["Linear"]}, "top"), "W4A16 describes no weights"),
        (changed("ignore", ["re:*"], "top"), "has 're:*', which is no regular expression"),
        (changed("ignore", [3], "top"), "names the module 3; expected a string"),
        (changed("transform_config", {"config_groups": {"R1": {}}}, "top"), "transform_config asks for rotated"),
        (changed("sparsity_config", {"format": "sparse-24-bitmask"}, "top"), "'sparse-24-bitmask'; expected dense"),
        (
            changed("strategy", "tensor", config=FP8),
            "has strategy 'tensor'; float-quantized is supported with 'channel' or 'block'",
        ),
        (changed("symmetric", False, config=FP8), "has symmetric False"),
        (changed("input_activations", {"num_bits": 8, "type": "int"}, "group", FP8), "of type int 8; expected float 8"),
        (
            changed(
                "input_activations",
                {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False},
                "group",
                FP8,
            ),
            "strategy 'tensor' and dynamic False; expected a dynamic scale a token",
        ),
        (changed("group_size", 32, config=NV), "has group_size 32; nvfp4-pack-quantized is supported with 16"),
        (OFFICIAL | {"activation_scheme": "static"}, "has activation_scheme 'static'; fp8 is supported with 'dynamic'"),
        (OFFICIAL | {"weight_block_size": None}, "has weight_block_size None; expected [rows, columns]"),
        (OFFICIAL | {"fmt": "e5m2"}, "has fmt 'e5m2'"),
        (AUTO | {"bits": 8}, "has bits 8; awq is supported with 4"),
        (AUTO | {"version": "gemv"}, "has version 'gemv'; awq is supported with 'gemm'"),
        (AUTO | {"zero_point": False}, "has zero_point False"),
    ],
)
def test_what_cannot_run_is_named(config, word):
    with pytest.raises(ValueError) as caught:
        parse_quantization(config, "/m/config.json")
    assert word in str(caught.value) and str(caught.value).startswith("/m/config.json: quantization_config: ")
    assert "\n" not in str(caught.value)


def test_plans_need_no_torch():
    import subprocess
    import sys

    code = "import sys, json, vllm.config as c; c.parse_quantization(json.loads(sys.argv[1])); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, json.dumps(CONFIG)], check=False).returncode == 0
