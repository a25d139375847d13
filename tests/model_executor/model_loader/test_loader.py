"""The loader: every naming of the same tensors gives the same model, and what does not fit is one clear line."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoints import reference_model, save_checkpoint, split_experts, write_tensors
from tests.models.driver import Driver
from tests.models.families import load
from vllm.config.checkpoint import ASSETS, load_hf_config
from vllm.distributed.parallel_state import TensorParallelGroup, use_group
from vllm.model_executor.layers.quantization.plan import CheckpointPlan
from vllm.model_executor.model_loader.checkpoint import Checkpoint, canonical_name
from vllm.model_executor.model_loader.match import checkpoint_slots
from vllm.model_executor.models.registry import model_class


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    """Folder and tensors of a checkpoint in the published layout. Tests that change it write to their own folder."""
    folder = tmp_path_factory.mktemp("moe")
    save_checkpoint(reference_model("moe", torch.bfloat16), folder)
    return folder, load_file(folder / "model.safetensors")


def rewrite(moe, folder, change=None, shards=1):
    """A copy of the checkpoint in `folder`, its tensors changed."""
    source, tensors = moe
    (folder / "config.json").write_text((source / "config.json").read_text())
    tensors = dict(tensors)
    if change is not None:
        tensors = change(tensors) or tensors
    write_tensors(tensors, folder, shards)
    return folder


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    ours, theirs = dict(a.named_parameters()), dict(b.named_parameters())
    return ours.keys() == theirs.keys() and all(torch.equal(p, theirs[n]) for n, p in ours.items())


def renamed(old: str, new: str):
    return lambda tensors: {name.replace(old, new, 1): t for name, t in tensors.items()}


@pytest.mark.parametrize(
    ("change", "shards"),
    [
        (None, 3),
        (split_experts, 1),
        (split_experts, 4),
        (renamed("model.language_model.", "model."), 1),
        (renamed("model.language_model.", "language_model.model."), 2),
        (lambda t: {n: x for n, x in t.items() if "visual" not in n}, 1),
        (lambda t: {**t, "mtp.fc.weight": torch.zeros(4, 8), "mtp.layers.0.mlp.gate.weight": torch.zeros(2)}, 1),
    ],
    ids=["sharded", "experts apart", "experts apart, sharded", "text only", "old prefix", "no vision", "with mtp"],
)
def test_layouts(moe, tmp_path, change, shards):
    assert same(load(rewrite(moe, tmp_path, change, shards)), load(moe[0]))


def test_dtypes(moe, tmp_path):
    """Small tensors of the gates stay in float32 where the file has them so; everything else takes the model's dtype."""
    layer = load(moe[0], torch.bfloat16).stateful_layers().gdn[0]
    assert (layer.A_log.dtype, layer.norm.weight.dtype) == (torch.float32, torch.float32)
    assert (layer.dt_bias.dtype, layer.conv1d_weight.dtype) == (torch.bfloat16, torch.bfloat16)
    rewrite(moe, tmp_path, lambda t: {n: x.bfloat16() for n, x in t.items()})
    layer = load(tmp_path, torch.bfloat16).stateful_layers().gdn[0]
    assert layer.A_log.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in load(tmp_path, torch.float32).parameters())


def test_evaluation_without_gradients(moe):
    model = load(moe[0])
    assert not model.training and not any(p.requires_grad or p.is_meta for p in model.parameters())
    assert model.rotary_emb.inv_freq.device.type == "cpu"


@pytest.mark.parametrize("stored_twice", [False, True])
def test_tied_embeddings(tmp_path, stored_twice):
    reference = reference_model("dense", tie_word_embeddings=True)
    save_checkpoint(reference, tmp_path)
    if stored_twice:
        tensors = load_file(tmp_path / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"].clone()
        write_tensors(tensors, tmp_path)
    model = load(tmp_path)
    hidden = torch.randn(3, 128)
    torch.testing.assert_close(model.compute_logits(hidden), reference.lm_head(hidden))
    assert not list(model.lm_head.parameters())


def test_next_rows_are_put_in_order(tmp_path):
    """in_proj_qkvz goes key head by key head in the file, part by part in the parameter."""
    reference = reference_model("next")
    model = load(save_checkpoint(reference, tmp_path))
    stored, ours = reference.model.layers[0].linear_attn, model.stateful_layers().gdn[0]
    x = torch.randn(5, 128)
    with torch.no_grad():
        parts = stored.fix_query_key_value_ordering(stored.in_proj_qkvz(x)[None], stored.in_proj_ba(x)[None])
    want = torch.cat([part.reshape(5, -1) for part in parts], dim=1)
    torch.testing.assert_close(ours.in_proj(x), want)


def test_skipped_tensors_are_counted(moe, tmp_path, caplog):
    with caplog.at_level(logging.DEBUG, "vllm"):
        load(rewrite(moe, tmp_path, lambda t: {**t, "mtp.fc.weight": torch.zeros(4, 8)}))
    (line,) = [r.getMessage() for r in caplog.records if "skipped" in r.getMessage()]
    assert f"skipped {1 + sum('visual' in n for n in moe[1])} tensors" in line


def test_canonical_names():
    assert canonical_name("model.language_model.layers.0.mlp.gate.weight") == "model.layers.0.mlp.gate.weight"
    assert canonical_name("language_model.model.norm.weight") == "model.norm.weight"
    assert canonical_name("language_model.lm_head.weight") == "lm_head.weight"
    assert canonical_name("model.norm.weight") == "model.norm.weight"


NORM = "model.language_model.norm.weight"


def without(*names):
    return lambda tensors: {n: t for n, t in tensors.items() if n not in names}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(NORM), r"1 tensor missing: model\.norm\.weight$"),
        (
            without("model.language_model.layers.0.mlp.experts.gate_up_proj"),
            r"1 tensor missing: model\.layers\.0\.mlp\.experts\.gate_up_proj$",
        ),
        (
            without(*(f"model.language_model.layers.3.self_attn.{p}_proj.weight" for p in "qkvo")),
            r"4 tensors missing: .*q_proj\.weight, .* and 1 more$",
        ),
        (
            lambda t: {**t, "model.layers.0.self_attn.q_proj.weight": torch.zeros(2, 2)},
            r"1 tensor unexpected: model\.layers\.0\.self_attn\.q_proj\.weight \(in model\.safetensors\)$",
        ),
        (
            lambda t: {**t, NORM: torch.zeros(5)},
            r"1 tensor of the wrong shape or type: model\.norm\.weight is \[5\] instead of \[128\] \(in model\.safetensors\)$",
        ),
        (
            lambda t: {**t, NORM: torch.zeros(128, dtype=torch.int32)},
            r"model\.norm\.weight is of type I32",
        ),
        (lambda t: {**t, "model.norm.weight": t[NORM].clone()}, r"model\.safetensors: .*norm\.weight is already in"),
        (
            lambda t: {**t, "model.layers.0.mlp.experts.3.up_proj.weight": torch.zeros(64, 128)},
            r"1 tensor for a place that another has filled: model\.layers\.0\.mlp\.experts\.gate_up_proj$",
        ),
        (
            lambda t: {
                **{n: x for n, x in t.items() if not n.endswith("layers.1.mlp.gate.weight")},
                "model.layers.1.mlp.gate.scale": torch.zeros(1),
            },
            r"model\.layers\.1\.mlp\.gate \(in model\.safetensors\): its tensors are in no format",
        ),
    ],
    ids=["missing", "missing experts", "missing many", "unexpected", "shape", "type", "two names", "twice", "format"],
)
def test_misfits_are_one_line(moe, tmp_path, change, message):
    rewrite(moe, tmp_path, change)
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_expert_missing_among_experts(moe, tmp_path):
    rewrite(
        moe,
        tmp_path,
        lambda t: without("model.language_model.layers.2.mlp.experts.5.down_proj.weight")(split_experts(t)),
    )
    with pytest.raises(ValueError, match=r"1 tensor missing: model\.layers\.2\.mlp\.experts\.5\.down_proj\.weight$"):
        load(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_files(moe, tmp_path, keep):
    file = rewrite(moe, tmp_path, shards=2) / "model-00002-of-00002.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:keep])
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors: (truncated|damaged)"):
        load(tmp_path)


def test_damaged_files(moe, tmp_path):
    file = rewrite(moe, tmp_path) / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[8:40] = b"x" * 32
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged, its header cannot be read"):
        load(tmp_path)


def test_missing_files(moe, tmp_path):
    folder = rewrite(moe, tmp_path, shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00003\.safetensors missing, of the 3 files"):
        load(folder)
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json: not an index"):
        load(folder)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(ValueError, match="no safetensors files"):
        load(folder)


def test_unknown_architecture():
    with pytest.raises(ValueError, match=r"'LlamaForCausalLM' is not supported; supported: Qwen3_5ForCausalLM, "):
        model_class("LlamaForCausalLM")


@pytest.mark.parametrize("name", ["tiny", "quantised"])
def test_dummy_weights(moe, tmp_path, name):
    rewrite(moe, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    if name == "quantised":
        preset = ASSETS / "presets" / "qwen3.6-35b-a3b-awq-4bit" / "config.json"
        config = json.loads((tmp_path / "config.json").read_text())
        config["quantization_config"] = json.loads(preset.read_text())["quantization_config"]
        (tmp_path / "config.json").write_text(json.dumps(config))
    one, two = (load(tmp_path, load_format="dummy") for _ in range(2))
    assert same(one, two)
    driver = Driver(one)
    logits = driver.prefill(driver.add(list(range(12, 60))), (40, 41, 42))
    assert logits.isfinite().all() and 0.1 < logits.std() < 10


@pytest.mark.parametrize("family", ["moe", "dense", "next"])
def test_shards_of_two_ranks_make_the_whole(tmp_path, family):
    """Each rank's slots take their share of the same files: every source tensor is used up exactly once (or by both)."""
    folder = save_checkpoint(reference_model(family), tmp_path)
    checkpoint, hf = Checkpoint(folder), load_hf_config(folder)
    whole = dict(load(folder).named_parameters())
    ranks = []
    for rank in range(2):
        with use_group(TensorParallelGroup(rank, 2)):
            model = model_class(hf.architecture)(hf.text, CheckpointPlan(checkpoint.tensors, torch.float32))
        slots = {slot.name: slot for slot in checkpoint_slots(model)}
        for param in model.parameters():
            param.fill_(float("nan"))
        for name, tensor in checkpoint.read(set(checkpoint.entries)):
            slot = slots[name]
            assert tuple(tensor.shape) == slot.shape
            slot.param[slot.region].copy_(tensor if slot.transform is None else slot.transform(tensor))
        ranks.append(dict(model.named_parameters()))
    for name, full in whole.items():
        a, b = ranks[0][name], ranks[1][name]
        assert a.isfinite().all() and b.isfinite().all(), name
        if a.shape == full.shape:
            assert torch.equal(a, full) and torch.equal(b, full), name
        else:  # whichever order the shares interleave in, their elements together are the whole's
            joined = torch.cat([a.flatten(), b.flatten()]).sort().values
            assert torch.equal(joined, full.flatten().sort().values), name
