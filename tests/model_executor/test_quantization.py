"""Packed integer weights: the numbers of the format's description, and whole checkpoints made by compressed-tensors itself."""

import json

import pytest
import torch
from torch import nn

from tests.checkpoints import (
    pack_quantised,
    quantization_config,
    reference_model,
    save_checkpoint,
    split_experts,
    write_tensors,
)
from tests.models.driver import Driver
from tests.models.families import load
from vllm.model_executor.layers.linear import ColumnParallelLinear
from vllm.model_executor.layers.mamba.gdn_linear_attn import project_serial
from vllm.model_executor.layers.quantization import CompressedTensorsWNA16, TensorInfo, Unquantized
from vllm.model_executor.layers.quantization.compressed_tensors_wna16 import dequantise, unpack
from vllm.model_executor.layers.quantization.plan import CheckpointPlan, ConfigPlan


def test_worked_example():
    """One word: [-8, -7, -1, 0, 1, 2, 6, 7], lowest bits first, offset by 8."""
    packed = torch.tensor([[0xFEA98710 - 2**32]], dtype=torch.int32)
    assert unpack(packed, 4).tolist() == [[0, 1, 7, 8, 9, 10, 14, 15]]
    scale = torch.tensor([[0.5]])
    assert dequantise(packed, scale, None, 4, torch.float32).tolist() == [[-4, -3.5, -0.5, 0, 0.5, 1, 3, 3.5]]
    zero_point = torch.tensor([[7]], dtype=torch.uint8)
    shifted = dequantise(packed, scale, zero_point, 4, torch.float32)
    assert shifted.tolist() == [[-3.5, -3, 0, 0.5, 1, 1.5, 3.5, 4]]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_dequantised_bit_for_bit(bits, symmetric, group_size, seed):
    """Our dense weight is what compressed-tensors' decompressor makes of its compressor's tensors."""
    weight = torch.randn(24, 256, dtype=torch.bfloat16)
    packed, plain = pack_quantised({"m.weight": weight}, ["m"], group_size=group_size, symmetric=symmetric, bits=bits)
    infos = {f"m.{k.removeprefix('m.')}": _info(t) for k, t in packed.items()}
    plan = CheckpointPlan(infos, torch.float32)
    layer = ColumnParallelLinear(256, 24, prefix="m", plan=plan)
    assert layer.scheme == CompressedTensorsWNA16(bits, group_size, symmetric, torch.bfloat16)
    _fill(layer, packed)
    assert torch.equal(layer.scheme.all(layer), plain["m.weight"].float())
    assert torch.equal(layer.scheme.all(layer, "", slice(8, 16)), plain["m.weight"][8:16].float())
    x = torch.randn(3, 256)
    torch.testing.assert_close(layer(x), x @ plain["m.weight"].float().T)


def test_pieces_do_not_change_the_result(monkeypatch, seed):
    packed = torch.randint(-(2**31), 2**31 - 1, (3, 40, 8), dtype=torch.int32)
    scale = torch.rand(3, 40, 2)
    whole = dequantise(packed, scale, None, 4, torch.float32)
    monkeypatch.setattr("vllm.model_executor.layers.quantization.compressed_tensors_wna16._PIECE", 64 * 7)
    assert torch.equal(dequantise(packed, scale, None, 4, torch.float32), whole)
    assert whole.shape == (3, 40, 64)


def _info(t: torch.Tensor) -> TensorInfo:
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int32: "I32", torch.int64: "I64"}
    return TensorInfo(names[t.dtype], tuple(t.shape))


def _fill(layer: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    for slot in layer.checkpoint_slots():
        t = tensors[slot.name]
        assert t.shape == slot.shape
        if slot.param is not None:
            slot.param[slot.region] = slot.transform(t)


SMALL = ("mlp.gate", "shared_expert_gate", "lm_head", "embed_tokens")


def quantised_pair(folder, family, pick, **kwargs):
    """Folders of a quantised checkpoint and of the plain one that it stands for."""
    model = reference_model(family, torch.bfloat16)
    for which in ("packed", "plain"):
        save_checkpoint(model, folder / which, experts="each")
    tensors = split_experts({n: t.detach().clone().contiguous() for n, t in model.state_dict().items()})
    modules = [
        name.removesuffix(".weight")
        for name, t in tensors.items()
        if name.endswith(".weight") and t.dim() == 2 and "visual" not in name and pick(name.removesuffix(".weight"))
    ]
    packed, plain = pack_quantised(tensors, modules, **kwargs)
    write_tensors(packed, folder / "packed")
    write_tensors(plain, folder / "plain")
    config = json.loads((folder / "packed" / "config.json").read_text())
    group_size, symmetric = kwargs.get("group_size", 32), kwargs.get("symmetric", True)
    config["quantization_config"] = quantization_config(group_size, symmetric)
    (folder / "packed" / "config.json").write_text(json.dumps(config))
    return folder / "packed", folder / "plain", len(modules)


@pytest.mark.parametrize(
    ("family", "left_plain", "kwargs"),
    [
        ("moe", (*SMALL, "in_proj_a", "in_proj_b"), {}),
        ("moe", SMALL, {}),
        ("moe", (*SMALL, "linear_attn"), {"symmetric": False}),
        ("dense", SMALL, {"group_size": 64}),
        ("dense", (*SMALL, "in_proj_a", "in_proj_b"), {"symmetric": False}),
        ("next", (*SMALL, "in_proj_ba"), {}),
        ("next", SMALL, {}),
    ],
    ids=lambda v: v if isinstance(v, str) else None,
)
def test_quantised_checkpoint_is_its_plain_self(tmp_path, family, left_plain, kwargs):
    packed, plain, count = quantised_pair(
        tmp_path, family, lambda m: not m.endswith(left_plain) and not any(f".{p}." in m for p in left_plain), **kwargs
    )
    assert count > 15
    tokens = torch.randint(12, 500, (80,), generator=torch.Generator().manual_seed(2)).tolist()
    ours, dense = (Driver(load(folder, gdn_in_proj="serial")) for folder in (packed, plain))
    cuts = tuple(range(70, 80))
    assert torch.equal(ours.prefill(ours.add(tokens), cuts), dense.prefill(dense.add(tokens), cuts))
    schemes = {type(m.scheme).__name__ for m in ours.model.modules() if hasattr(m, "scheme")}
    assert schemes == {"CompressedTensorsWNA16", "Unquantized"}


@pytest.mark.gpu
def test_gpu_quantised_is_its_plain_self(tmp_path):
    """Few tokens (experts picked one by one) and many (the layer dequantised at once) on the device."""
    packed, plain, _ = quantised_pair(tmp_path, "moe", lambda m: not m.endswith((*SMALL, "in_proj_a", "in_proj_b")))
    tokens = torch.randint(12, 500, (80,), generator=torch.Generator().manual_seed(2)).tolist()
    ours, dense = (Driver(load(folder, torch.bfloat16, "cuda", gdn_in_proj="serial")) for folder in (packed, plain))
    cuts = (70, *range(72, 80))
    got, want = (d.prefill(d.add(tokens), cuts).cpu() for d in (ours, dense))
    assert (got - want).abs().mean(-1).median() < 0.02


def test_mixed_in_proj_falls_back_to_serial(tmp_path, caplog):
    folder, _, _ = quantised_pair(tmp_path, "dense", lambda m: m.endswith(("in_proj_qkv", "in_proj_z")))
    model = load(folder, gdn_in_proj="fused")
    layer = model.stateful_layers().gdn[0]
    assert layer.project is project_serial and layer.in_proj is None
    assert isinstance(layer.in_proj_ba.scheme, Unquantized)
    assert "serial" in caplog.text and "--gdn-in-proj fused" in caplog.text


def test_config_decides_where_nothing_is_read():
    ignore = ("lm_head", "re:.*in_proj_[ab]$", "re:.*mlp.gate$", "model.language_model.layers.1.mlp.down_proj")
    plan = ConfigPlan(
        quantization_config(ignore=ignore), torch.bfloat16, lambda n: n.replace("model.language_model.", "model.")
    )
    packed = CompressedTensorsWNA16(4, 32, True, None)
    assert plan.module_scheme("model.layers.0.mlp.down_proj", 64) == packed
    assert plan.module_scheme("model.layers.0.mlp.experts.3.gate_proj", 64) == packed
    for plain in (
        "lm_head",
        "model.layers.0.linear_attn.in_proj_a",
        "model.layers.1.mlp.down_proj",
        "model.layers.2.mlp.gate",
    ):
        assert plan.module_scheme(plain, 64) == Unquantized()
    assert plan.can_fuse(["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"], 64)
    assert not plan.can_fuse(["model.layers.0.linear_attn.in_proj_z", "model.layers.0.linear_attn.in_proj_a"], 64)


def test_unknown_formats_are_refused():
    with pytest.raises(ValueError, match="'fp8'"):
        ConfigPlan({"quant_method": "fp8", "weight_block_size": [128, 128]}, torch.bfloat16)
    wrong = quantization_config()
    wrong["config_groups"]["group_0"]["weights"]["num_bits"] = 3
    with pytest.raises(ValueError, match="cannot be read"):
        ConfigPlan(wrong, torch.bfloat16)
    fp8 = {"m.weight": TensorInfo("F8_E4M3", (8, 64)), "m.weight_scale_inv": TensorInfo("BF16", (1, 1))}
    with pytest.raises(ValueError, match="m: its tensors are in no format that can be read: weight F8_E4M3"):
        CheckpointPlan(fp8, torch.bfloat16).module_scheme("m", 64)
    reordered = {"m.weight_packed": TensorInfo("I32", (8, 8)), "m.weight_g_idx": TensorInfo("I32", (64,))}
    with pytest.raises(ValueError, match="weight_g_idx"):
        CheckpointPlan(reordered, torch.bfloat16).module_scheme("m", 64)


def test_parts_of_one_layer_must_agree():
    tensors = {
        "a.weight": TensorInfo("BF16", (8, 64)),
        "b.weight_packed": TensorInfo("I32", (8, 8)),
        "b.weight_scale": TensorInfo("BF16", (8, 2)),
    }
    with pytest.raises(ValueError, match=r"a \(Unquantized\(\)\), b \(CompressedTensorsWNA16"):
        CheckpointPlan(tensors, torch.bfloat16).scheme(["a", "b"], 64)
