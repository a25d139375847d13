"""Whole checkpoints in every format, written by independent code, against the plain checkpoints that they stand for."""

import contextlib
import json
import re

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.checkpoints import reference_model, save_checkpoint, write_tensors
from tests.models.driver import Driver
from tests.models.families import load
from tests.quantised import FORMATS, LINEAR, change_config, quantise_folder
from vllm.model_executor.layers.mamba.gdn_linear_attn import project_serial
from vllm.model_executor.layers.quantization import Unquantized

TOKENS = torch.randint(12, 500, (80,), generator=torch.Generator().manual_seed(2)).tolist()
CUTS = tuple(range(70, 80))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A plain checkpoint of each family, experts one by one."""
    made = {}
    for family in ("moe", "dense", "next"):
        folder = tmp_path_factory.mktemp(family)
        made[family] = save_checkpoint(reference_model(family, torch.bfloat16), folder, experts="each")
    return made


def linear(module: str) -> bool:
    return bool(LINEAR.search(module))


def every(module: str) -> bool:
    """All that is linear but the small ones, with the gates b and a."""
    return linear(module) or module.endswith(("in_proj_b", "in_proj_a", "in_proj_ba"))


def twins(source, folder, form, pick=linear):
    assert quantise_folder(source, folder / "quantised", FORMATS[form], dense=folder / "plain", pick=pick) > 15
    return folder / "quantised", folder / "plain"


def logits(folder, dtype=torch.float32, device="cpu"):
    driver = Driver(load(folder, dtype, device, gdn_in_proj="serial"))
    return driver.prefill(driver.add(TOKENS), CUTS), driver.model


@pytest.mark.parametrize(
    ("family", "form", "pick"),
    [
        *(("moe", form, linear) for form in FORMATS),
        *(("dense", form, linear) for form in ("w4a16", "fp8-official", "awq")),
        *(("next", form, linear) for form in ("w4a16-zero-points", "fp8-block", "nvfp4", "awq")),
        *((family, form, every) for family, form in (("moe", "w4a16"), ("next", "fp8-official"), ("dense", "nvfp4"))),
    ],
)
def test_a_quantised_checkpoint_is_its_plain_self(sources, tmp_path, family, form, pick):
    quantised, plain = twins(sources[family], tmp_path, form, pick)
    got, model = logits(quantised)
    assert torch.equal(got, logits(plain)[0])
    schemes = {type(module.scheme) for module in model.modules() if hasattr(module, "scheme")}
    assert len(schemes) == 2 and Unquantized in schemes


@pytest.mark.parametrize("form", ["w4a16", "fp8-official"])
def test_transformers_reads_the_same_logits(sources, tmp_path, form):
    """transformers unpacks these two on a CPU, by its own code."""
    quantised, _ = twins(sources["dense"], tmp_path, form)
    # the multimodal class: the other renames modules, and then finds none of those that the config ignores
    build = transformers.AutoModelForImageTextToText
    # packed integers stand for weights in the scale's bfloat16, FP8 blocks for weights in the model's dtype
    dtype = torch.float32 if form == "fp8-official" else torch.bfloat16
    reference = build.from_pretrained(quantised, dtype=dtype).eval()
    with torch.no_grad(), contextlib.suppress(RuntimeError):  # two dtypes meet, but its weights are unpacked by then
        reference(input_ids=torch.tensor([TOKENS[:2]]))
    torch.nn.Module.float(reference)
    with torch.inference_mode():
        want = reference(input_ids=torch.tensor([TOKENS])).logits[0].float()
    got = logits(quantised)[0]
    assert want.std() > 0.3
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def test_gates_apart_from_quantised_projections(sources, tmp_path, caplog):
    """q, k, v and z quantised, b and a plain: two matrices, each in one format, though one was asked for."""
    quantised, _ = twins(sources["dense"], tmp_path, "w4a16")
    model = load(quantised, gdn_in_proj="fused")
    layer = model.stateful_layers().gdn[0]
    assert layer.project is project_serial and layer.in_proj is None
    assert str(layer.in_proj_qkvz.scheme) == "int4, groups of 32"
    assert isinstance(layer.in_proj_ba.scheme, Unquantized)
    assert "--gdn-in-proj fused" in caplog.text and "serial" in caplog.text
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Weights, ")]
    assert any(
        re.search(r"int4, groups of 32: .*linear_attn\.\{in_proj_qkv,in_proj_z,out_proj\} \(3 layers\)", x)
        for x in lines
    )
    assert any(re.search(r"plain: .*linear_attn\.\{in_proj_a,in_proj_b\} \(3 layers\)", x) for x in lines)


def test_z_alone_in_another_format(sources, tmp_path):
    """q, k, v in one matrix, z in another, b and a in a third."""
    quantised, plain = twins(
        sources["dense"], tmp_path, "fp8-official", lambda m: linear(m) and not m.endswith("in_proj_z")
    )
    got, model = logits(quantised)
    layer = model.stateful_layers().gdn[0]
    assert [str(getattr(layer, f"in_proj_{name}").scheme) for name in ("qkv", "z", "ba")] == [
        "fp8, blocks of 128 x 128",
        "plain",
        "plain",
    ]
    assert torch.equal(got, logits(plain)[0])


def test_dummy_weights_of_every_format(sources, tmp_path):
    for form in FORMATS:
        folder = tmp_path / form
        folder.mkdir()
        (folder / "config.json").write_text((sources["moe"] / "config.json").read_text())
        config = FORMATS[form].config(
            ["re:.*in_proj_[ab]$"] if form not in ("awq", "fp8-official") else ["in_proj_b", "in_proj_a"]
        )
        config.setdefault("ignore", []).extend(["lm_head", "re:.*gate$"])
        if form == "w4a16-g128":
            config["ignore"].append("re:.*mlp.*down_proj")
        text = (folder / "config.json").read_text().rstrip().removesuffix("}")
        import json

        (folder / "config.json").write_text(f'{text}, "quantization_config": {json.dumps(config)}}}')
        driver = Driver(load(folder, load_format="dummy"))
        out = driver.prefill(driver.add(TOKENS), (79,))
        assert out.isfinite().all() and 0.1 < out.std() < 10, form


def change(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    write_tensors(tensors, folder)


MODULE = "model.language_model.layers.3.self_attn.o_proj"


@pytest.mark.parametrize(
    ("form", "edit", "message"),
    [
        (
            "w4a16",
            lambda t: t.update({f"{MODULE}.weight_scale": t[f"{MODULE}.weight_scale"][:, :3].contiguous()}),
            r"^model\.layers\.3\.self_attn\.o_proj \(in model\.safetensors\): the scale is \[128, 3\]; expected in a row of 256 inputs 8 for groups of 32$",
        ),
        (
            "w4a16",
            lambda t: t.update({f"{MODULE}.weight_scale": t[f"{MODULE}.weight_scale"][:3].contiguous()}),
            r"self_attn\.o_proj\.weight_scale is \[3, 8\] instead of \[128, 8\] \(in model\.safetensors\)$",
        ),
        (
            "w4a16-zero-points",
            lambda t: t.pop(f"{MODULE}.weight_zero_point"),
            r"^model\.layers\.3\.self_attn\.o_proj \(in model\.safetensors\): weight_zero_point is missing",
        ),
        (
            "fp8-official",
            lambda t: t.pop(f"{MODULE}.weight_scale_inv"),
            r"^model\.layers\.3\.self_attn\.o_proj \(in model\.safetensors\): an FP8 weight without a scale",
        ),
        (
            "nvfp4",
            lambda t: t.update({f"{MODULE}.weight_global_scale": torch.ones(2)}),
            r"o_proj\.weight_global_scale is \[2\] instead of \[1\] \(in model\.safetensors\)$",
        ),
        (
            "awq",
            lambda t: t.pop(f"{MODULE}.qzeros"),
            r"^model\.layers\.3\.self_attn\.o_proj \(in model\.safetensors\): qzeros is missing",
        ),
        (
            "fp8",
            lambda t: t.update({f"{MODULE}.weight_scale": t[f"{MODULE}.weight_scale"].int()}),
            r"o_proj \(in model\.safetensors\): weight_scale is of type I32; expected F32, BF16, F16$",
        ),
    ],
    ids=["scale's columns", "scale's rows", "zero point", "no scale", "global scale", "qzeros", "integers"],
)
def test_broken_tensors_are_one_line(sources, tmp_path, form, edit, message):
    quantised, _ = twins(sources["dense"], tmp_path, form)
    change(quantised, edit)
    with pytest.raises(ValueError, match=message) as caught:
        load(quantised)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("form", "changes", "message"),
    [
        (
            "w4a16",
            {"format": "marlin-24"},
            r"config\.json: quantization_config: group_0: has format 'marlin-24'; supported is",
        ),
        (
            "w4a16",
            {"quant_method": "gptq"},
            r"config\.json: quantization_config: quant_method 'gptq' is not supported; supported is",
        ),
        (
            "fp8-official",
            {"activation_scheme": "static"},
            r"config\.json: quantization_config: has activation_scheme 'static'; fp8 is supported with 'dynamic'",
        ),
        (
            "w4a16",
            {"ignore": ["transformer.h.0"]},
            r"config\.json: .*its list of ignored modules matches none: transformer\.h\.0; expected names such as model\.layers\.0",
        ),
        (
            "w4a16",
            {"config_groups": 3},
            r"config\.json: quantization_config\.config_groups: Input should be a valid dictionary",
        ),
    ],
    ids=["format", "method", "activations", "ignore", "schema"],
)
def test_configs_that_cannot_be_run_are_one_line(sources, tmp_path, form, changes, message):
    quantised, _ = twins(sources["dense"], tmp_path, form)
    change_config(quantised, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        load(quantised)
    assert "\n" not in str(caught.value)


def widen_scales(folder):
    """With float32 scales weights are dequantised to float32, unrounded; the plain twin's are rounded to bfloat16."""
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    narrow = {name for name, tensor in tensors.items() if "scale" in name and tensor.dtype == torch.bfloat16}
    write_tensors({name: tensor.float() if name in narrow else tensor for name, tensor in tensors.items()}, folder)
    return folder


def choose_every_expert(folder):
    """Where a rounding sends a token to another expert, all that follows differs, however exact the products are."""
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_experts_per_tok"] = config["text_config"]["num_experts"]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMATS)
def test_gpu_quantised_is_its_plain_self(sources, tmp_path, form):
    """Few tokens (kernels that read the format) and many on the device, as near to the exact logits as bfloat16 weights come."""
    folders = twins(sources["moe"], tmp_path, form)
    cuts = (70, *range(72, 80))

    def run(folder, *how):
        driver = Driver(load(folder, *how, gdn_in_proj="serial"))
        return driver.prefill(driver.add(TOKENS), cuts).cpu().float()

    for folder in folders:
        choose_every_expert(folder)
    got = [run(folder, torch.bfloat16, "cuda") for folder in folders]
    exact = run(widen_scales(folders[0]), torch.float32, "cpu")
    ours, dense = ((logits - exact).abs().mean(-1).median() for logits in got)
    assert ours < 1.2 * dense and dense < 0.02, f"{ours:.4f} and {dense:.4f}"
