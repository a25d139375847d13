"""Variants of the Gated DeltaNet layer: named alike everywhere, chosen by rules, changed at run time, equal in the long run."""

import random
from dataclasses import fields

import pytest
import torch
from torch import nn

from tests.model_executor.layers.gdn_layer import HK, HV, D, K, V, build, config, definition, run, sequence, step_of
from vllm.config.gdn import GDNConfig
from vllm.distributed.parallel_state import TensorParallelGroup, use_group
from vllm.engine.arg_utils import EngineArgs
from vllm.logger import _said
from vllm.model_executor.layers.mamba import gdn_variants
from vllm.model_executor.layers.mamba.gdn_linear_attn import (
    DECODE,
    IN_PROJ,
    PREFILL,
    GatedDeltaNet,
    Variants,
    interleaved_sources,
    separate_sources,
    set_gdn_variants,
)
from vllm.model_executor.layers.mamba.gdn_variants import choose_decode, choose_in_proj, choose_prefill
from vllm.model_executor.layers.quantization.plan import ConfigPlan

TABLES = {"gdn_in_proj": IN_PROJ, "gdn_decode": DECODE, "gdn_prefill_backend": PREFILL}


@pytest.mark.parametrize("name", TABLES)
def test_every_variant_has_its_flag(name):
    (field,) = [f for f in fields(GDNConfig) if f.name == name]
    assert set(field.metadata["choices"]) == {"auto", *TABLES[name]}
    for variant in TABLES[name]:
        assert getattr(EngineArgs("m", **{name: variant}), name) == variant


def test_the_window_of_two_streams_has_two_ends():
    GDNConfig(gdn_dual_stream_min_tokens=4, gdn_dual_stream_max_tokens=4)
    for window in (
        {"gdn_dual_stream_min_tokens": -1},
        {"gdn_dual_stream_min_tokens": 9, "gdn_dual_stream_max_tokens": 8},
    ):
        with pytest.raises(ValueError, match=r"--gdn-dual-stream-m.*-tokens must be at least"):
            GDNConfig(**window)


def test_keeping_parts_apart_is_no_flag():
    assert "separate_in_proj" not in {f.name for f in fields(EngineArgs)}


@pytest.mark.parametrize(
    ("matrices", "device", "want"),
    [
        (1, "cuda", "fused"),
        (1, "cpu", "fused"),
        (2, "cuda", "dual_stream"),
        (2, "cpu", "serial"),
        (3, "cuda", "serial"),
    ],
)
def test_auto_in_proj(matrices, device, want):
    assert choose_in_proj("auto", matrices, device) == want


def test_in_proj_that_the_weights_do_not_allow():
    assert [choose_in_proj("serial", n, "cuda") for n in (1, 2, 3)] == ["serial"] * 3
    assert choose_in_proj("dual_stream", 2, "cpu") == "dual_stream"
    for asked, matrices in (("fused", 2), ("fused", 3), ("dual_stream", 3)):
        with pytest.raises(ValueError, match=f"--gdn-in-proj {asked} cannot run: .* {matrices} matrices"):
            choose_in_proj(asked, matrices, "cuda")


def test_auto_decode(monkeypatch):
    monkeypatch.delenv("VLLM_ENABLE_FLA_PACKED_RECURRENT_DECODE", raising=False)
    assert choose_decode("auto", 4, "cuda") == "auto", "by rows, see the next test"
    assert choose_decode("auto", 1, "cuda") == "packed"
    assert choose_decode("auto", 4, "cpu") == "unpacked"
    monkeypatch.setenv("VLLM_ENABLE_FLA_PACKED_RECURRENT_DECODE", "0")
    assert choose_decode("auto", 4, "cuda") == "unpacked"
    assert choose_decode("packed", 4, "cuda") == "packed", "a flag says more than the environment"
    with pytest.raises(ValueError, match="two taps"):
        choose_decode("fused", 1, "cuda")


def test_auto_decode_by_rows(monkeypatch):
    used = []
    for name in ("decode_fused", "decode_packed"):
        monkeypatch.setattr(gdn_variants, name, lambda layer, p, slots, name=name: used.append(name))
    for rows in (1, 16, 17, 256):
        gdn_variants.decode_auto(None, None, torch.zeros(rows))
    assert used == ["decode_fused", "decode_fused", "decode_packed", "decode_packed"]


def test_auto_prefill():
    assert [choose_prefill("auto", device) for device in ("cuda", "cpu")] == ["triton", "torch"]
    assert choose_prefill("torch", "cuda") == "torch"
    assert choose_prefill("triton", "cpu", interpreted=True) == "triton"
    with pytest.raises(ValueError, match="--gdn-prefill-backend triton needs a GPU"):
        choose_prefill("triton", "cpu")


# Changing them


def test_unknown_names_list_the_known_ones():
    layer = build()
    before = layer.variants
    for stage, flag, known in (
        ("in_proj", "--gdn-in-proj", "auto, serial, dual_stream, fused"),
        ("decode", "--gdn-decode", "auto, unpacked, packed, fused"),
        ("prefill", "--gdn-prefill-backend", "auto, triton, torch"),
    ):
        with pytest.raises(ValueError, match=f"{flag} must be one of {known}; got 'fast'"):
            layer.set_variants(**{stage: "fast"})
    assert layer.variants == before


def test_a_stage_that_is_not_named_stays():
    layer = build("serial", gdn={"gdn_decode": "packed"})
    assert layer.variants == Variants("serial", "packed", "torch")
    assert layer.set_variants(decode="fused") == Variants("serial", "fused", "torch") == layer.variants
    assert layer.decode is DECODE["fused"] and layer.project is IN_PROJ["serial"] and layer.prefill is PREFILL["torch"]
    before = layer.set_variants(in_proj="auto")
    assert before.in_proj == "fused"
    layer.set_variants("serial", "packed")
    assert layer.set_variants(*before) == before, "what was in force can be put back"


def test_all_layers_or_none():
    model = nn.Sequential(build(), build(), build(gdn={"separate_in_proj": True}))
    before = [layer.variants for layer in model]
    with pytest.raises(ValueError, match="3 matrices"):
        set_gdn_variants(model, in_proj="fused", decode="packed")
    assert [layer.variants for layer in model] == before
    assert set_gdn_variants(model, in_proj="serial", decode="packed") == Variants("serial", "packed", "torch")
    assert {layer.variants for layer in model} == {Variants("serial", "packed", "torch")}
    assert set_gdn_variants(nn.Linear(1, 1), decode="packed") is None


def test_any_variant_at_any_step():
    """One sequence whose every step runs in variants drawn by lot is still the definition."""
    layer, x, draw = build(), sequence(60), random.Random(3)
    parts, at, used = [], 0, set()
    while at < 60:
        used.add(layer.set_variants(draw.choice(list(IN_PROJ)), draw.choice(list(DECODE))))
        n = min(draw.choice([1, 1, 1, 5]), 60 - at)
        work = {"decodes": [2]} if at and n == 1 else {"prefills": [(2, n, at > 0)]}
        parts.append(run(layer, x[at : at + n], **work))
        at += n
    want, window, state = definition(layer, x)
    assert len(used) > 6
    torch.testing.assert_close(torch.cat(parts).double(), want, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(layer.ssm_state[2].double(), state, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(layer.conv_state[2].double(), window, atol=1e-5, rtol=1e-4)


STEPS = 1000


def long_run() -> torch.Tensor:
    """Random tokens of two sequences, [STEPS, 2, D]."""
    return torch.randn(STEPS, 2, D, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def exact():
    layer, x = build(), long_run()
    return torch.stack([definition(layer, x[:, row])[2] for row in range(2)])


def final_states(device, ssm_dtype, decode):
    layer = build(device=device, ssm_dtype=ssm_dtype, gdn={"gdn_decode": decode})
    for slot in (1, 4):
        layer.conv_state[slot], layer.ssm_state[slot] = 0, 0
    x = long_run().to(device)
    step = step_of(layer, token := torch.empty_like(x[0]), decodes=[4, 1])
    for t in range(STEPS):
        token.copy_(x[t])
        step()
    return layer.ssm_state[[4, 1]].double().cpu()


def assert_close_in_the_long_run(states, exact, apart, off):
    relative = lambda a, b: ((a - b).norm() / b.norm()).item()
    for decode, state in states.items():
        assert relative(state, states["unpacked"]) < apart, decode
        assert relative(state, exact) < off, decode


BOUNDS = pytest.mark.parametrize(
    ("ssm_dtype", "apart", "off"), [(torch.float32, 2e-6, 2e-6), (torch.bfloat16, 1e-2, 2e-2)], ids=["fp32", "bf16"]
)


@BOUNDS
def test_states_do_not_drift_apart(exact, ssm_dtype, apart, off):
    states = {decode: final_states("cpu", ssm_dtype, decode) for decode in DECODE}
    assert_close_in_the_long_run(states, exact, apart, off)


@pytest.mark.gpu
@BOUNDS
def test_gpu_states_do_not_drift_apart(exact, ssm_dtype, apart, off):
    torch.backends.cuda.matmul.allow_tf32 = False
    states = {decode: final_states("cuda", ssm_dtype, decode) for decode in DECODE}
    assert_close_in_the_long_run(states, exact, 5 * apart, 5 * off)


# Parts


def tensors(family, seed=7):
    """A layer's checkpoint tensors as its family names them, with the merged rows [q | k | v | z | b | a] they stand for."""
    generator = torch.Generator().manual_seed(seed)
    part = {name: torch.randn(rows, D, generator=generator) for name, rows in full_sizes().items()}
    merged = torch.cat(list(part.values()))
    if family is separate_sources:
        named = {
            "in_proj_qkv": torch.cat([part["q"], part["k"], part["v"]]),
            "in_proj_z": part["z"],
            "in_proj_b": part["b"],
            "in_proj_a": part["a"],
        }
    else:
        by_head = {name: w.view(HK, -1, D) for name, w in part.items()}
        named = {
            "in_proj_qkvz": torch.cat([by_head[n] for n in "qkvz"], dim=1).reshape(-1, D),
            "in_proj_ba": torch.cat([by_head[n] for n in "ba"], dim=1).reshape(-1, D),
        }
    return {f"m.{name}.weight": w for name, w in named.items()}, merged


def full_sizes():
    return {"q": HK * K, "k": HK * K, "v": HV * V, "z": HV * V, "b": HV, "a": HV}


def filled(family, separate=False, rank=0, size=1):
    with use_group(TensorParallelGroup(rank, size)):
        layer = GatedDeltaNet(
            config(),
            prefix="m",
            plan=ConfigPlan(None, torch.float32),
            in_proj_sources=family,
            gdn_config=GDNConfig(separate_in_proj=separate),
        )
    given, merged = tensors(family)
    for module in layer.children():
        if hasattr(module, "checkpoint_slots") and module not in (layer.norm, layer.out_proj):
            for slot in module.checkpoint_slots():
                w = given.pop(slot.name)
                assert tuple(w.shape) == slot.shape
                slot.param[slot.region].copy_(slot.transform(w))
    assert not given, "every tensor has a place"
    layer.process_weights_after_loading()
    return layer, merged


MODULES = {
    separate_sources: {"in_proj_qkv", "in_proj_z", "in_proj_ba"},
    interleaved_sources: {"in_proj_qkvz", "in_proj_ba"},
}


@pytest.mark.parametrize("family", MODULES)
def test_modules_may_stay_apart_for_adapters(family, caplog):
    _said.clear()
    layer, merged = filled(family, separate=True)
    assert {name for name, _ in layer.named_children() if "in_proj" in name} == MODULES[family]
    assert layer.in_proj is None and layer.variants.in_proj == "serial"
    said = [m for m in caplog.messages if "GDN layers" in m]
    filled(family, separate=True)
    assert [m for m in caplog.messages if "GDN layers" in m] == said and len(said) == 1, "said once, not once a layer"
    assert "in_proj serial (adapters attach to its modules)" in said[0]
    x = sequence(7)
    torch.testing.assert_close(torch.cat(layer.project(layer, x), dim=1), x @ merged.T, atol=1e-5, rtol=1e-5)
    together, _ = filled(family)
    assert {name for name, _ in together.named_children() if "in_proj" in name} == {"in_proj"}
    for one, two in zip(layer.project(layer, x), together.project(together, x)):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("family", MODULES)
@pytest.mark.parametrize("separate", [False, True])
def test_ranks_cut_each_part_on_its_own(family, separate):
    """b and a have six columns here, three on a rank: every part is cut by itself, whatever else is in its matrix."""
    x, size = sequence(5), 2
    ranks = [filled(family, separate, rank, size) for rank in range(size)]
    want = (x @ ranks[0][1].T).split(list(full_sizes().values()), dim=1)
    got = [layer.project(layer, x) for layer, _ in ranks]
    assert [tuple(p.shape) for p in got[0]] == [(5, n // size) for n in (2 * HK * K + HV * V, HV * V, HV, HV)]
    split = [p.mixed_qkv.split([n // size for n in (HK * K, HK * K, HV * V)], dim=1) for p in got]
    parts = [torch.cat(pieces, dim=1) for pieces in zip(*split)]
    parts += [torch.cat([getattr(p, name) for p in got], dim=1) for name in "zba"]
    for part, full in zip(parts, want):
        torch.testing.assert_close(part, full, atol=1e-5, rtol=1e-5)
    for name in IN_PROJ if not separate else ["serial"]:
        for (layer, _), before in zip(ranks, got):
            layer.set_variants(in_proj=name)
            for one, two in zip(layer.project(layer, x), before):
                torch.testing.assert_close(one, two)


def test_variants_share_one_weight():
    layer = build("dual_stream")
    names = [name for name, _ in layer.named_parameters()]
    assert [n for n in names if "in_proj" in n] == ["in_proj.weight"]
    assert layer.in_proj.weight.shape == (2 * HK * K + 2 * HV * V + 2 * HV, D)


def test_a_projection_that_cannot_be_gives_way_and_says_so(caplog):
    _said.clear()
    layer = build("fused", gdn={"separate_in_proj": True})
    assert layer.variants.in_proj == "serial"
    assert "--gdn-in-proj fused cannot run" in caplog.text


def test_a_prefill_backend_that_cannot_be_is_an_error(monkeypatch):
    import triton

    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match="--gdn-prefill-backend triton needs a GPU"):
        build(gdn={"gdn_prefill_backend": "triton"})


def test_pools_and_taps_lie_with_channels_side_by_side():
    layer = build(slots=6)
    assert layer.conv_state.shape == (6, layer.conv_dim, 3) and layer.conv_state.stride(1) == 1
    assert layer.conv1d_weight.shape == (layer.conv_dim, 4) and layer.conv1d_weight.stride(0) == 1
    assert layer.ssm_state.is_contiguous()


@pytest.mark.parametrize(("low", "high"), [(1, 256), (4, 4)])
@pytest.mark.gpu
def test_gpu_two_streams_inside_the_window_only(low, high, monkeypatch):
    layer = build(
        "dual_stream", device="cuda", gdn={"gdn_dual_stream_min_tokens": low, "gdn_dual_stream_max_tokens": high}
    )
    used = []
    monkeypatch.setattr(
        gdn_variants,
        "maybe_execute_in_parallel",
        lambda f, g, a, b, stream: (used.append(stream is not None), f(), g())[1:],
    )
    tokens = (1, 3, 4, 5, 256, 257)
    for n in tokens:
        layer.project(layer, sequence(n).cuda())
    assert not any(used), "outside of a graph the fork would cost more than it saves"
    used.clear()
    layer.two_streams_outside_graphs = True
    for n in tokens:
        layer.project(layer, sequence(n).cuda())
    assert used == [low <= n <= high for n in tokens]
    used.clear()
    layer.two_streams_outside_graphs = False
    inputs = [sequence(n).cuda() for n in tokens]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for x in inputs:
            layer.project(layer, x)
    assert used == [low <= n <= high for n in tokens]
