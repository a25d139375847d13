"""Who decides how a module is stored: its tensors, then the config; and what is said about it."""

import logging

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig

from tests.quantised import infos, quantization_config
from vllm.config import load_hf_config, parse_quantization, resolve_model
from vllm.config.checkpoint import preset_names
from vllm.model_executor.layers.quantization import (
    Awq,
    CompressedTensorsWNA16,
    Fp8,
    NvFp4,
    TensorInfo,
    Unquantized,
)
from vllm.model_executor.layers.quantization.plan import CheckpointPlan, ConfigPlan
from vllm.model_executor.layers.quantization.schema import check_ignore_list, check_schema

INT4 = CompressedTensorsWNA16(4, 32, True, torch.bfloat16)
LAYER = "model.layers.0"


def config_plan(form="w4a16", ignore=(), **changes):
    return ConfigPlan(parse_quantization(quantization_config(form, ignore) | changes), torch.bfloat16)


def checkpoint_plan(tensors, form=None, ignore=(), **changes):
    quant = None if form is None else parse_quantization(quantization_config(form, ignore) | changes, "m/config.json")
    return CheckpointPlan(tensors, torch.bfloat16, quant)


def packed(module, rows=8, columns=64, group=32, file="a.safetensors"):
    return {
        f"{module}.weight_packed": TensorInfo("I32", (rows, columns // 8), file),
        f"{module}.weight_scale": TensorInfo("BF16", (rows, columns // group), file),
        f"{module}.weight_shape": TensorInfo("I64", (2,), file),
    }


def test_config_decides_where_nothing_is_read():
    ignore = ("lm_head", "re:.*in_proj_[ab]$", "re:.*mlp.gate$", "model.language_model.layers.1.mlp.down_proj")
    plan = config_plan(ignore=ignore)
    assert plan.module_scheme(f"{LAYER}.mlp.down_proj", 64) == INT4
    assert plan.module_scheme(f"{LAYER}.mlp.experts.3.gate_proj", 64) == INT4
    for plain in (
        "lm_head",
        f"{LAYER}.linear_attn.in_proj_a",
        "model.layers.1.mlp.down_proj",
        "model.layers.2.mlp.gate",
    ):
        assert plan.module_scheme(plain, 64) == Unquantized()
    assert plan.can_fuse([f"{LAYER}.mlp.gate_proj", f"{LAYER}.mlp.up_proj"], 64)
    assert not plan.can_fuse([f"{LAYER}.linear_attn.in_proj_z", f"{LAYER}.linear_attn.in_proj_a"], 64)


@pytest.mark.parametrize(
    ("form", "scheme"),
    [
        ("w4a16-zero-points", CompressedTensorsWNA16(4, 32, False, torch.bfloat16)),
        ("w8a16-channel", CompressedTensorsWNA16(8, -1, False, torch.bfloat16)),
        ("fp8", Fp8("weight_scale", 1, -1, True, torch.bfloat16)),
        ("fp8-block", Fp8("weight_scale", 128, 128, True, torch.bfloat16)),
        ("fp8-official", Fp8("weight_scale_inv", 128, 128, True, torch.bfloat16)),
        ("nvfp4", NvFp4()),
        ("awq", Awq(4, 32, False, torch.float16)),
    ],
)
def test_every_format_has_a_scheme(form, scheme):
    assert config_plan(form).module_scheme(f"{LAYER}.mlp.down_proj", 64) == scheme
    assert config_plan(form, ignore=(f"{LAYER}.mlp",)).module_scheme(f"{LAYER}.self_attn.o_proj", 64) == scheme


def test_tensors_win_over_the_config():
    plan = checkpoint_plan({**packed("a"), "b.weight": TensorInfo("BF16", (8, 64))}, "w4a16", ignore=("a",))
    assert plan.module_scheme("a", 64) == INT4
    assert plan.module_scheme("b", 64) == Unquantized()


def test_a_group_of_targets_has_its_own_format():
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    groups = quantization_config("w4a16")["config_groups"]
    groups["group_1"] = {"targets": ["re:.*down_proj$"], "weights": weights}
    plan = config_plan(config_groups=groups)
    assert plan.module_scheme(f"{LAYER}.mlp.down_proj", 64) == CompressedTensorsWNA16(8, -1, True, torch.bfloat16)
    assert plan.module_scheme(f"{LAYER}.mlp.up_proj", 64) == INT4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"m.weight_scale": None}, "weight_scale is missing; it has weight_packed, weight_shape"),
        (
            {"m.weight_scale": TensorInfo("BF16", (8, 3))},
            "the scale is [8, 3]; expected in a row of 64 inputs 2 for groups of 32",
        ),
        (
            {"m.weight_scale": TensorInfo("BF16", (8, 4))},
            "the scale is [8, 4]; expected in a row of 64 inputs 2 for groups of 32",
        ),
        ({"m.weight_scale": TensorInfo("BF16", (8,))}, "weight_scale is [8]; expected a matrix"),
        ({"m.weight_scale": TensorInfo("I8", (8, 2))}, "weight_scale is of type I8; expected F32, BF16, F16"),
        (
            {"m.weight_packed": TensorInfo("I32", (8, 12))},
            "weight_packed is [8, 12]; expected 8 words a row for 4 bits or 16 for 8",
        ),
        ({"m.weight_g_idx": TensorInfo("I32", (64,))}, "packed integer weights with weight_g_idx cannot be read"),
    ],
    ids=["no scale", "odd groups", "other groups", "flat", "integers", "bits", "g_idx"],
)
def test_tensors_that_do_not_fit(changes, message):
    tensors = {name: t for name, t in (packed("m") | changes).items() if t is not None}
    with pytest.raises(ValueError) as caught:
        checkpoint_plan(tensors, "w4a16").module_scheme("m", 64)
    assert str(caught.value) == f"m (in a.safetensors): {message}"


@pytest.mark.parametrize(
    ("tensors", "form", "message"),
    [
        (
            packed("m"),
            "w4a16-zero-points",
            "weight_zero_point is missing; the config says that weights are asymmetric",
        ),
        (
            {"m.weight": TensorInfo("F8_E4M3", (8, 64))},
            "fp8",
            "an FP8 weight without a scale; expected weight_scale_inv or weight_scale beside it",
        ),
        (
            {"m.weight": TensorInfo("F8_E4M3", (200, 64)), "m.weight_scale_inv": TensorInfo("BF16", (2, 2))},
            "fp8-official",
            "weight_scale_inv is [2, 2] beside weight [200, 64]; expected 2 x 1",
        ),
        (
            {"m.weight": TensorInfo("F8_E4M3", (8, 64)), "m.weight_scale": TensorInfo("BF16", (1,))},
            "fp8",
            "weight_scale is [1]; expected a matrix",
        ),
        (
            {
                "m.weight": TensorInfo("F8_E4M3", (8, 64)),
                "m.weight_scale": TensorInfo("BF16", (8, 1)),
                "m.input_scale": TensorInfo("BF16", (1,)),
            },
            "fp8",
            "input_scale is a stored scale of inputs; expected inputs to be quantised as they come",
        ),
        (
            {"m.weight_packed": TensorInfo("U8", (8, 32)), "m.weight_scale": TensorInfo("F8_E4M3", (8, 2))},
            "nvfp4",
            "weight_scale is [8, 2]; expected 64 / 16 = 4 columns",
        ),
        (
            {"m.weight_packed": TensorInfo("U8", (8, 32)), "m.weight_scale": TensorInfo("F8_E4M3", (8, 4))},
            "nvfp4",
            "weight_global_scale is missing; it has weight_packed, weight_scale",
        ),
        (
            {"m.qweight": TensorInfo("I32", (64, 1)), "m.scales": TensorInfo("F16", (2, 8))},
            "awq",
            "qzeros is missing; it has qweight, scales",
        ),
        (
            {
                "m.qweight": TensorInfo("I32", (64, 1)),
                "m.qzeros": TensorInfo("I32", (4, 1)),
                "m.scales": TensorInfo("F16", (4, 8)),
            },
            "awq",
            "the scale is [8, 4]; expected in a row of 64 inputs 2 for groups of 32",
        ),
        (
            {"m.weight": TensorInfo("I8", (8, 64))},
            "w4a16",
            "its tensors are in no format that can be read: weight I8 [8, 64]",
        ),
    ],
    ids=lambda v: v if isinstance(v, str) and len(v) < 20 else None,
)
def test_modules_that_no_format_explains(tensors, form, message):
    with pytest.raises(ValueError) as caught:
        checkpoint_plan(tensors, form).module_scheme("m", 64)
    assert str(caught.value).split(": ", 1) == [str(caught.value).split(": ")[0], message]
    assert str(caught.value).startswith("m")


def test_a_group_size_that_does_not_divide():
    with pytest.raises(
        ValueError, match=r"^m: 48 inputs cannot be divided into groups of 32, which config\.json asks for"
    ):
        config_plan().module_scheme("m", 48)
    with pytest.raises(ValueError, match="cannot be divided into groups of 16"):
        config_plan("nvfp4").module_scheme("m", 40)
    config_plan("fp8-official").module_scheme("m", 48)  # blocks may be cut


def test_parts_of_one_layer_must_agree():
    tensors = {"a.weight": TensorInfo("BF16", (8, 64)), **packed("b")}
    with pytest.raises(ValueError, match=r"different formats: a \(plain\), b \(int4, groups of 32\)"):
        checkpoint_plan(tensors).scheme(["a", "b"], 64)


def test_what_was_decided_is_a_line_a_scheme(caplog):
    plan = config_plan(ignore=("re:.*in_proj_[ab]$", "lm_head"))
    for i in range(2):
        for module in ("self_attn.q_proj", "self_attn.k_proj", "mlp.experts.0.up_proj", "linear_attn.in_proj_b"):
            plan.module_scheme(f"model.layers.{i}.{module}", 64)
    plan.module_scheme("lm_head", 64)
    with caplog.at_level(logging.INFO, "vllm"):
        plan.log()
    assert [record.getMessage() for record in caplog.records] == [
        "Weights, int4, groups of 32: self_attn.{k_proj,q_proj} (2 layers); mlp.experts.*.up_proj (2 layers)",
        "Weights, plain: linear_attn.in_proj_b (2 layers); lm_head",
    ]
    caplog.clear()
    plain = ConfigPlan(None, torch.float32)
    plain.module_scheme("lm_head", 64)
    plain.log()
    assert not caplog.records


def test_the_schema_is_compressed_tensors_own():
    for form in ("w4a16", "fp8", "fp8-block", "nvfp4"):
        check_schema(quantization_config(form), "c.json")
    check_schema(None, "c.json")
    check_schema({"quant_method": "fp8", "config_groups": 5}, "c.json")  # not this package's affair
    wrong = quantization_config("w4a16")
    wrong["config_groups"]["group_0"]["weights"]["num_bit"] = 4
    with pytest.raises(
        ValueError, match=r"^c\.json: quantization_config\.config_groups\..*num_bit: Extra inputs"
    ) as caught:
        check_schema(wrong, "c.json")
    assert "\n" not in str(caught.value)


def test_presets_pass_the_schema_here_and_not_at_every_start(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    configs = [load_hf_config(resolve_model(f"preset:{name}")).quantization for name in preset_names()]
    configs = [config for config in configs if config and config["quant_method"] == "compressed-tensors"]
    assert len(configs) >= 2
    for config in configs:
        QuantizationConfig.model_validate(config)
    monkeypatch.setattr(QuantizationConfig, "model_validate", None)
    for config in configs:
        check_schema(config, "c.json")
    assert not any(tmp_path.iterdir())
    with pytest.raises(TypeError):
        check_schema(configs[0] | {"ignore": ["another"]}, "c.json")


def test_what_has_passed_the_schema_is_not_checked_again(tmp_path, monkeypatch):
    """That import takes seconds. What was refused is refused again, and a folder that cannot be written changes nothing."""
    config, calls = quantization_config("w4a16"), []
    validate = QuantizationConfig.model_validate
    monkeypatch.setattr(QuantizationConfig, "model_validate", lambda config: calls.append(1) or validate(config))
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    for _ in range(3):
        check_schema(config, "c.json")
    assert len(calls) == 1
    for _ in range(2):
        with pytest.raises(ValueError, match=r"c\.json"):
            check_schema(config | {"config_groups": 5}, "c.json")
    check_schema(config | {"ignore": ["lm_head"]}, "c.json")
    assert len(calls) == 4
    (tmp_path / "file").touch()
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "file"))
    for _ in range(2):
        check_schema(config, "c.json")
    assert len(calls) == 6


def test_ignore_lists(caplog):
    modules = [
        "model.layers.0.mlp.up_proj",
        "model.layers.0.mlp.experts.7.up_proj",
        "model.layers.0.linear_attn.in_proj_b",
    ]

    def check(*ignore, form="w4a16"):
        caplog.clear()
        check_ignore_list(parse_quantization(quantization_config(form, ignore), "c.json"), modules)
        return [record.getMessage() for record in caplog.records]

    assert check() == check("lm_head", "re:.*visual.*", "mtp.fc") == []
    assert check("model.language_model.layers.0.mlp.experts.7.up_proj") == []
    assert check("model.layers.0.linear_attn.in_proj_ba", "model.layers.0.mlp.gate_up_proj") == []
    assert check("lm_head", "re:.*nothing", "re:.*visual.*") == [
        "c.json: ignored modules that are not there: re:.*nothing"
    ]
    with pytest.raises(
        ValueError,
        match=r"^c\.json: .* matches none: transformer\.h\.0, re:\.\*nothing; expected names such as model\.layers\.0",
    ):
        check("transformer.h.0", "re:.*nothing")
    assert check("layers.0.mlp", form="fp8-official") == check("mlp.up", form="awq") == []


@pytest.mark.parametrize("name", ["qwen3.5-35b-a3b-awq-4bit", "qwen3.5-122b-a10b-awq-4bit", "qwen3.6-35b-a3b-awq-4bit"])
def test_presets(name):
    quant = parse_quantization(load_hf_config(resolve_model(f"preset:{name}")).quantization)
    plan = ConfigPlan(quant, torch.bfloat16)
    assert plan.module_scheme(f"{LAYER}.mlp.experts.0.down_proj", 512) == INT4
    for module in ("linear_attn.in_proj_qkv", "self_attn.q_proj", "mlp.gate", "mlp.shared_expert.up_proj"):
        assert plan.module_scheme(f"{LAYER}.{module}", 2048) == Unquantized()


def test_headers_describe_tensors():
    assert infos({"a": torch.zeros(2, 3, dtype=torch.float8_e4m3fn)}) == {"a": TensorInfo("F8_E4M3", (2, 3))}
