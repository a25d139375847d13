"""Scales of keys and values: found under the names that files use, 1 otherwise, and used by caches in fp8."""

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoints import reference_model, save_checkpoint, write_tensors
from tests.models.driver import Driver
from tests.models.families import load
from vllm.model_executor.model_loader.checkpoint import canonical_name

ATTENTION = "model.language_model.layers.3.self_attn"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_checkpoint(reference_model("dense", torch.bfloat16), tmp_path_factory.mktemp("dense"))


def with_scales(source, folder, scales):
    (folder / "config.json").write_text((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors") | {name: torch.tensor(value) for name, value in scales.items()}
    write_tensors(tensors, folder)
    return folder


@pytest.mark.parametrize(
    ("names", "want"),
    [
        ((), (1.0, 1.0)),
        (("k_scale", "v_scale"), (0.25, 0.5)),
        (("attn.k_scale", "attn.v_scale"), (0.25, 0.5)),
        (("k_proj.k_scale", "v_proj.v_scale"), (0.25, 0.5)),
        (("k_proj.output_scale", "v_proj.output_scale"), (0.25, 0.5)),
        (("k_scale",), (0.25, 1.0)),
    ],
)
def test_scales_under_every_name(source, tmp_path, names, want):
    scales = {f"{ATTENTION}.{name}": [value] for name, value in zip(names, (0.25, 0.5))}
    (attention,) = load(with_scales(source, tmp_path, scales)).stateful_layers().attention
    assert (attention.k_scale, attention.v_scale) == want


def test_dummy_weights_have_scales_of_one(source):
    (attention,) = load(source, load_format="dummy").stateful_layers().attention
    assert (attention.k_scale, attention.v_scale) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            [1.0, 2.0],
            r"^model\.layers\.3\.self_attn\.k_scale is \[2\] instead of one number \(in model\.safetensors\)$",
        ),
        (0.0, r"^model\.layers\.3\.self_attn\.k_scale is 0 instead of a positive number"),
        (float("nan"), r"k_scale is nan instead of a positive number"),
    ],
)
def test_scales_that_cannot_be(source, tmp_path, value, message):
    with pytest.raises(ValueError, match=message):
        load(with_scales(source, tmp_path, {f"{ATTENTION}.k_scale": value}))


def test_names():
    assert canonical_name(f"{ATTENTION}.v_proj.output_scale") == "model.layers.3.self_attn.v_scale"
    assert canonical_name(f"{ATTENTION}.v_proj.weight") == "model.layers.3.self_attn.v_proj.weight"
    # an output scale of neither keys nor values is nothing that is known: it stays, and will be unexpected
    assert canonical_name(f"{ATTENTION}.attn.output_scale") == "model.layers.3.self_attn.attn.output_scale"


def fp8_logits(folder, tokens):
    driver = Driver(load(folder))
    for layer in driver.model.stateful_layers().attention:
        layer.kv_cache = tuple(torch.zeros_like(pool, dtype=torch.float8_e4m3fn) for pool in layer.kv_cache)
    return driver.prefill(driver.add(tokens), tuple(range(40, 60)))


def test_a_cache_in_fp8_is_close_and_scales_matter(source, tmp_path):
    """Scales that fit what is stored lose little; one that pushes keys out of fp8's range loses much."""
    tokens = torch.randint(12, 500, (60,), generator=torch.Generator().manual_seed(2)).tolist()
    driver = Driver(load(source))
    want = driver.prefill(driver.add(tokens), tuple(range(40, 60)))
    (tmp_path / "good").mkdir(), (tmp_path / "bad").mkdir()
    scales = {f"{ATTENTION}.k_scale": 0.125, f"{ATTENTION}.v_scale": 0.125}
    good = fp8_logits(with_scales(source, tmp_path / "good", scales), tokens)
    bad = fp8_logits(with_scales(source, tmp_path / "bad", {f"{ATTENTION}.k_scale": 1e4}), tokens)
    error = lambda got: (got - want).abs().mean().item()
    assert error(good) < 0.05 * want.std().item()
    assert error(bad) > 2 * error(good)
