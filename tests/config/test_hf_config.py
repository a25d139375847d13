import copy
import subprocess
import sys

import pytest

from vllm.config import load_hf_config, parse_hf_config, preset_names, resolve_model
from vllm.config.checkpoint import read_json


def preset(name: str) -> dict:
    return read_json(resolve_model(f"preset:{name}") / "config.json")


def without(raw: dict, *path: str) -> dict:
    raw = copy.deepcopy(raw)
    inner = raw
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return raw


DENSE, MOE, NEXT = preset("qwen3.5-9b"), preset("qwen3.5-35b-a3b"), preset("qwen3-next-80b-a3b")

SAME_NAME = (
    *(
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "max_position_embeddings",
        "rms_norm_eps",
        "num_attention_heads",
    ),
    *("num_key_value_heads", "head_dim", "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim"),
    *("linear_value_head_dim", "linear_conv_kernel_dim", "attention_bias"),
)
MOE_NAMES = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size")


def check_against_transformers(parsed, theirs):
    for name in SAME_NAME:
        assert getattr(parsed, name) == getattr(theirs, name), name
    assert parsed.layer_types == tuple(theirs.layer_types)
    rope = theirs.rope_parameters
    assert parsed.rope_theta == rope["rope_theta"]
    assert parsed.rotary_dim == int(theirs.head_dim * rope["partial_rotary_factor"])
    assert parsed.mrope_section == tuple(rope.get("mrope_section", ()))
    if parsed.num_experts:
        for name in MOE_NAMES:
            assert getattr(parsed, name) == getattr(theirs, name), name


@pytest.mark.parametrize("name", [n for n in preset_names() if n != "tiny"])
def test_presets_parse_as_transformers_reads_them(name, tmp_path):
    from transformers import AutoConfig

    folder = resolve_model(f"preset:{name}")
    parsed = load_hf_config(folder)
    theirs = AutoConfig.from_pretrained(folder)
    text = theirs.get_text_config()
    check_against_transformers(parsed.text, text)
    assert parsed.text.tie_word_embeddings == theirs.tie_word_embeddings
    assert parsed.eos_token_ids == (text.eos_token_id,)
    assert parsed.has_vision == hasattr(theirs, "vision_config")
    assert parsed.text.torch_dtype == "bfloat16"

    # What transformers saves again reads the same.
    theirs.save_pretrained(tmp_path)
    again = read_json(tmp_path / "config.json")
    saved = parse_hf_config({**again, "architectures": [parsed.architecture]})
    assert saved.text == parsed.text


@pytest.mark.parametrize(("raw", "architecture"), [(DENSE, "Qwen3_5ForCausalLM"), (MOE, "Qwen3_5MoeForCausalLM")])
def test_flat_text_only_layout(raw, architecture):
    nested = parse_hf_config(raw)
    flat = parse_hf_config({**raw["text_config"], "architectures": [architecture]})
    assert flat.text == nested.text
    assert nested.has_vision and not flat.has_vision


def test_derived_sizes_of_the_35b():
    text = parse_hf_config(MOE).text
    assert (text.key_dim, text.value_dim, text.conv_dim) == (2048, 4096, 8192)
    assert (text.num_gdn_layers, text.num_attention_layers) == (30, 10)
    assert (text.rotary_dim, text.rope_theta, text.mrope_section) == (64, 1e7, (11, 11, 10))
    assert text.mtp_num_hidden_layers == 1
    assert text.sparse_layers == (True,) * 40


def test_layer_types_come_from_the_interval_when_absent():
    raw = without(MOE, "text_config", "layer_types")
    assert parse_hf_config(raw).text == parse_hf_config(MOE).text
    raw["text_config"]["full_attention_interval"] = 5
    types = parse_hf_config(raw).text.layer_types
    assert [i for i, t in enumerate(types) if t == "full_attention"] == [4, 9, 14, 19, 24, 29, 34, 39]


@pytest.mark.parametrize(("step", "dense"), [(1, []), (2, []), (1, [0, 3]), (3, [2])])
def test_next_sparse_layers_are_those_of_transformers_network(step, dense):
    import torch
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextSparseMoeBlock

    config = Qwen3NextConfig(
        num_hidden_layers=6, num_experts=4, num_experts_per_tok=2, decoder_sparse_step=step, mlp_only_layers=dense
    )
    with torch.device("meta"):
        layers = Qwen3NextForCausalLM(config).model.layers
    parsed = parse_hf_config({**config.to_dict(), "architectures": ["Qwen3NextForCausalLM"]})
    assert parsed.text.sparse_layers == tuple(isinstance(layer.mlp, Qwen3NextSparseMoeBlock) for layer in layers)
    assert parsed.text.intermediate_size == config.intermediate_size


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_theta": 5e6}, (5e6, 64)),
        ({"rope_theta": 5e6, "partial_rotary_factor": 0.5}, (5e6, 128)),
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}, "partial_rotary_factor": 1.0}, (1e6, 256)),
        (
            {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}, "partial_rotary_factor": 1.0},
            (1e6, 128),
        ),
        ({"rope_scaling": {"type": "default"}, "rope_theta": 2e6}, (2e6, 64)),
    ],
)
def test_old_and_new_rope_keys(rope, expected):
    raw = {k: v for k, v in NEXT.items() if k not in ("rope_theta", "rope_scaling", "partial_rotary_factor")}
    text = parse_hf_config({**raw, **rope}).text
    assert (text.rope_theta, text.rotary_dim) == expected
    assert text.mrope_section == ()


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({}, ["architectures is missing"]),
        ({**MOE, "architectures": ["LlamaForCausalLM"]}, ["LlamaForCausalLM", "not supported", "Qwen3NextForCausalLM"]),
        (without(MOE, "text_config", "hidden_size"), ["text_config.hidden_size is missing"]),
        (without(NEXT, "num_experts"), ["c.json: num_experts is missing"]),
        (without(NEXT, "rope_theta"), ["rope_theta is missing"]),
        (without(MOE, "text_config", "max_position_embeddings"), ["max_position_embeddings is missing"]),
        ({**NEXT, "hidden_size": "2048"}, ["hidden_size must be an integer", "'2048'"]),
        ({**NEXT, "num_hidden_layers": 0}, ["num_hidden_layers", "at least 1"]),
        ({**NEXT, "layer_types": ["full_attention"]}, ["layer_types names 1 layers", "48"]),
        ({**NEXT, "layer_types": ["sliding_attention"] * 48}, ["sliding_attention"]),
        ({**NEXT, "rope_scaling": {"rope_type": "yarn", "factor": 4}}, ["rope_type 'yarn'"]),
        ({**NEXT, "num_key_value_heads": 3}, ["num_attention_heads 16 is not a multiple of num_key_value_heads 3"]),
        ({**NEXT, "linear_num_key_heads": 12}, ["linear_num_value_heads"]),
        ({**NEXT, "num_experts_per_tok": 1000}, ["num_experts_per_tok"]),
        ({**NEXT, "norm_topk_prob": False}, ["norm_topk_prob is false"]),
        ({**NEXT, "hidden_act": "gelu"}, ["hidden_act"]),
        ({**NEXT, "attn_output_gate": False}, ["attn_output_gate"]),
        ({**NEXT, "output_gate_type": "tanh"}, ["output_gate_type", "tanh"]),
        ({**NEXT, "torch_dtype": "float8_e4m3fn"}, ["dtype", "float8_e4m3fn"]),
    ],
)
def test_errors_are_one_line_that_names_the_key_and_the_file(raw, words):
    with pytest.raises(ValueError) as caught:
        parse_hf_config(raw, source="/m/c.json")
    message = str(caught.value)
    assert message.startswith("/m/c.json: ") and "\n" not in message
    for word in words:
        assert word in message


def test_bad_mrope_section():
    raw = copy.deepcopy(MOE)
    raw["text_config"]["rope_parameters"]["mrope_section"] = [11, 11, 11]
    with pytest.raises(ValueError, match="mrope_section"):
        parse_hf_config(raw)


def test_swish_is_silu_and_sigmoid_stays():
    gates = [
        parse_hf_config({**NEXT, "output_gate_type": g}).text.output_gate_type for g in ("swish", "silu", "sigmoid")
    ]
    assert gates == ["silu", "silu", "sigmoid"]
    assert parse_hf_config(NEXT).text.output_gate_type == "silu"


def test_eos_may_be_a_list_or_sit_outside():
    assert parse_hf_config({**NEXT, "eos_token_id": [1, 2]}).eos_token_ids == (1, 2)
    assert parse_hf_config({**without(MOE, "text_config", "eos_token_id"), "eos_token_id": 7}).eos_token_ids == (7,)


def test_overrides_merge_and_leave_the_original_alone():
    before = copy.deepcopy(MOE)
    config = parse_hf_config(MOE, {"text_config": {"num_hidden_layers": 8, "rope_parameters": {"rope_theta": 5.0}}})
    assert before == MOE
    assert config.text.num_hidden_layers == 8
    assert config.text.layer_types.count("full_attention") == 2
    assert config.text.rope_theta == 5.0
    assert config.text.mrope_section == (11, 11, 10)
    assert config.raw["text_config"]["num_hidden_layers"] == 8
    assert parse_hf_config(NEXT, {"num_hidden_layers": 4}).text.num_gdn_layers == 3


@pytest.mark.parametrize(
    ("raw", "overrides", "word"),
    [
        (MOE, {"num_hidden_layers": 4}, "use --hf-overrides.text_config.num_hidden_layers"),
        (MOE, {"text_config": {"num_hidden_layer": 4}}, "--hf-overrides.text_config.num_hidden_layer: "),
        (NEXT, {"text_config": {"num_hidden_layers": 4}}, "no such key"),
        (MOE, {"text_config": {"num_hidden_layers": 44}}, "names 40 layers"),
    ],
)
def test_an_override_that_would_change_nothing_is_refused(raw, overrides, word):
    with pytest.raises(ValueError, match=word):
        parse_hf_config(raw, overrides)


def test_configuration_is_read_without_torch_and_transformers():
    code = (
        "import sys; from vllm.config import VllmConfig, ModelConfig; import vllm.v1.core.memory_plan;"
        "VllmConfig.create(ModelConfig(model='preset:qwen3.5-35b-a3b'), device='cuda');"
        "print([m for m in ('torch', 'transformers', 'huggingface_hub', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
