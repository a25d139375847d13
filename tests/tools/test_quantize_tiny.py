"""The tool that writes quantised checkpoints: its command, and what it leaves alone."""

import json
import sys

import pytest
import quantize_tiny
from safetensors.torch import load_file
from tiny_formats import FORMATS


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["quantize_tiny.py", *map(str, arguments)])
    return quantize_tiny.main()


def test_command(monkeypatch, tiny_model, tmp_path, capsys):
    out, dense = tmp_path / "out", tmp_path / "dense"
    assert run(monkeypatch, "--format", "w4a16", "--out", out, "--dense", dense) == 0
    assert "121 matrices in w4a16" in capsys.readouterr().out
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["format"] == "pack-quantized"
    assert "quantization_config" not in json.loads((dense / "config.json").read_text())
    assert (out / "tokenizer.json").read_bytes() == (tiny_model / "tokenizer.json").read_bytes()
    quantised, plain = load_file(out / "model.safetensors"), load_file(dense / "model.safetensors")
    source = quantize_tiny.split_experts(load_file(tiny_model / "model.safetensors"))
    assert plain.keys() == source.keys()
    ignored = set(config["quantization_config"]["ignore"])
    for name, tensor in source.items():
        module = name.removesuffix(".weight")
        if name in quantised:
            assert (quantised[name] == tensor).all(), name
        else:
            assert f"{module}.weight_packed" in quantised and module not in ignored
            error = (plain[name].float() - tensor.float()).abs().max()
            assert 0 < error <= quantised[f"{module}.weight_scale"].float().max()
    assert {"lm_head", "model.language_model.layers.0.mlp.gate"} <= ignored


@pytest.mark.parametrize("form", FORMATS)
def test_rounding_is_as_fine_as_the_format(tiny_model, tmp_path, form):
    """Mean error of the weights, against their mean size: four bits a tenth, eight bits a hundredth."""
    quantize_tiny.quantise_folder(tiny_model, tmp_path / "out", FORMATS[form], dense=tmp_path / "dense")
    source = quantize_tiny.split_experts(load_file(tiny_model / "model.safetensors"))
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    name = "model.language_model.layers.3.self_attn.q_proj.weight"
    lost = (dense[name].float() - source[name].float()).abs().mean() / source[name].float().abs().mean()
    assert 0 < lost < (0.03 if "8" in form.removesuffix("-g128") else 0.15)


def test_a_folder_without_weights(tmp_path):
    with pytest.raises(ValueError, match="there are no safetensors files"):
        quantize_tiny.quantise_folder(tmp_path, tmp_path / "out", FORMATS["fp8"])
