"""One Gated DeltaNet layer against its definition, token by token in float64."""

from dataclasses import fields, replace

import pytest
import torch

from vllm.config.checkpoint import TINY, load_hf_config
from vllm.config.gdn import GDNConfig
from vllm.forward_context import PAD_SLOT_ID, ForwardContext, GDNAttentionMetadata, set_forward_context
from vllm.model_executor.layers.mamba.gdn_linear_attn import IN_PROJ, GatedDeltaNet
from vllm.model_executor.layers.quantization.plan import ConfigPlan

HK, HV, K, V, D, W = 2, 6, 16, 8, 24, 4


def config(**changes):
    text = load_hf_config(TINY).text
    sizes = {
        "hidden_size": D,
        "linear_num_key_heads": HK,
        "linear_num_value_heads": HV,
        "linear_key_head_dim": K,
        "linear_value_head_dim": V,
        "linear_conv_kernel_dim": W,
    }
    return replace(text, **{**sizes, **changes})


def build(in_proj="fused", slots=6, ssm_dtype=torch.float32, dtype=torch.float32, device="cpu", **changes):
    torch.manual_seed(0)
    text = config(**changes)
    layer = GatedDeltaNet(
        text, prefix="m", plan=ConfigPlan(None, dtype), gdn_config=GDNConfig(gdn_in_proj=in_proj)
    ).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for module in layer.modules():
        if hasattr(module, "fill_dummy"):
            module.fill_dummy(generator)
    layer.norm.weight.uniform_(0.5, 1.5, generator=generator)
    layer.dt_bias.uniform_(-3, 1, generator=generator)
    shapes = layer.state_shapes()
    layer.conv_state = torch.full((slots, *shapes["conv_state"]), 5.0, dtype=dtype, device=device)
    layer.ssm_state = torch.full((slots, *shapes["ssm_state"]), -2.0, dtype=ssm_dtype, device=device)
    return layer.to(device)


def definition(layer, x, eps=1e-6):
    """Section by section what the layer is: x [T, D] of one sequence -> y [T, D], final window, final state [Hv, V, K]."""
    f = lambda t: t.detach().cpu().double()
    y = f(x) @ f(layer.in_proj.weight).T
    q_k_v, z, b, a = y.split([2 * HK * K + HV * V, HV * V, HV, HV], dim=1)
    history = torch.cat([torch.zeros(W - 1, q_k_v.shape[1], dtype=torch.float64), q_k_v])
    mixed = sum(history[j : j + len(x)] * f(layer.conv1d_weight)[:, j] for j in range(W))
    mixed = mixed * torch.sigmoid(mixed)
    S, out = torch.zeros(HV, V, K, dtype=torch.float64), []
    for t in range(len(x)):
        q, k, v = mixed[t].split([HK * K, HK * K, HV * V])
        heads = []
        for n in range(HV):
            kh = n // (HV // HK)
            qn, kn = (u.view(HK, K)[kh] / (u.view(HK, K)[kh].square().sum() + 1e-6).sqrt() for u in (q, k))
            softplus = torch.log1p(torch.exp(a[t, n] + f(layer.dt_bias)[n]))
            S[n] *= torch.exp(-torch.exp(f(layer.A_log)[n]) * softplus)
            S[n] += torch.sigmoid(b[t, n]) * torch.outer(v.view(HV, V)[n] - S[n] @ kn, kn)
            o = S[n] @ qn * K**-0.5
            o = o / (o.square().mean() + eps).sqrt() * f(layer.norm.weight)
            zn = z[t].view(HV, V)[n]
            heads.append(o * (torch.sigmoid(zn) if layer.norm.activation == "sigmoid" else zn * torch.sigmoid(zn)))
        out.append(torch.cat(heads))
    return torch.stack(out) @ f(layer.out_proj.weight).T, history[-(W - 1) :].T, S


def metadata(decodes, prefills, device="cpu"):
    """decodes: slots; prefills: (slot, tokens, goes on)."""
    lens = [n for _, n, _ in prefills]
    to = {"device": device}
    return GDNAttentionMetadata(
        num_decodes=len(decodes),
        num_prefills=len(prefills),
        num_prefill_tokens=sum(lens),
        state_indices=torch.tensor([*decodes, *(s for s, _, _ in prefills)], dtype=torch.int32, **to),
        prefill_query_start_loc=torch.tensor([0, *lens], **to).cumsum(0).int(),
        prefill_query_lens_cpu=tuple(lens),
        prefill_has_initial_state=torch.tensor([c for *_, c in prefills], dtype=torch.bool, **to),
    )


def run(layer, x, decodes=(), prefills=()):
    meta = metadata(list(decodes), list(prefills), x.device)
    with torch.inference_mode(), set_forward_context(ForwardContext(attn=None, gdn=meta)):
        return layer(x)


def sequence(n, seed=1):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("in_proj", IN_PROJ)
@pytest.mark.parametrize("gate", ["silu", "sigmoid"])
def test_prompt_is_the_definition(in_proj, gate):
    layer, x = build(in_proj, output_gate_type=gate), sequence(70)
    y = run(layer, x, prefills=[(3, 70, False)])
    want, window, state = definition(layer, x)
    torch.testing.assert_close(y.double(), want, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(layer.conv_state[3].double(), window, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(layer.ssm_state[3].double(), state, atol=1e-5, rtol=1e-4)
    for slot in (0, 1, 2, 4, 5):
        assert (layer.conv_state[slot] == 5).all() and (layer.ssm_state[slot] == -2).all()


@pytest.mark.parametrize("cuts", [(1,), (2, 3), (30, 64), tuple(range(1, 40))])
def test_cut_anywhere(cuts):
    layer, x = build(), sequence(70)
    want, _, state = definition(layer, x)
    bounds, parts = [0, *cuts, 70], []
    for a, b in zip(bounds, bounds[1:]):
        work = {"decodes": [2]} if a and b - a == 1 else {"prefills": [(2, b - a, a > 0)]}
        parts.append(run(layer, x[a:b], **work))
    torch.testing.assert_close(torch.cat(parts).double(), want, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(layer.ssm_state[2].double(), state, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("in_proj", IN_PROJ)
def test_mixed_rows_are_their_own(in_proj):
    """Two decode, one padding row, two prompts (one goes on), two tokens of nobody: each as if it were alone."""
    layer = build(in_proj)
    a, b, c, d = sequence(9, 1), sequence(5, 2), sequence(40, 3), sequence(66, 4)
    run(layer, torch.cat([a[:8], b[:4], c[:30]]), prefills=[(5, 8, False), (1, 4, False), (4, 30, False)])
    garbage = torch.full((1, D), float("nan"))
    x = torch.cat([a[8:], garbage, b[4:], c[30:], d, sequence(2, 9)])
    y = run(layer, x, decodes=[5, PAD_SLOT_ID, 1], prefills=[(4, 10, True), (2, 66, False)])
    for rows, seq, n in ((slice(0, 1), a, 1), (slice(2, 3), b, 1), (slice(3, 13), c, 10), (slice(13, 79), d, 66)):
        torch.testing.assert_close(y[rows].double(), definition(layer, seq)[0][-n:], atol=2e-5, rtol=1e-4)
    assert y[79:].isfinite().all()
    assert (layer.conv_state[[0, 3]] == 5).all() and (layer.ssm_state[[0, 3]] == -2).all()


def test_variants_share_one_weight():
    layer = build("serial")
    names = [name for name, _ in layer.named_parameters()]
    assert [n for n in names if "in_proj" in n] == ["in_proj.weight"]
    assert layer.in_proj.weight.shape == (2 * HK * K + 2 * HV * V + 2 * HV, D)
    x = sequence(7)
    for one, two in zip(IN_PROJ["serial"](layer, x), IN_PROJ["fused"](layer, x)):
        torch.testing.assert_close(one, two)


def test_auto_is_fused():
    assert build("auto").project is IN_PROJ["fused"]


def test_every_variant_has_its_flag():
    (field,) = [f for f in fields(GDNConfig) if f.name == "gdn_in_proj"]
    assert set(field.metadata["choices"]) == {"auto", *IN_PROJ}


@pytest.mark.gpu
@pytest.mark.parametrize("in_proj", IN_PROJ)
@pytest.mark.parametrize("ssm_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gpu(in_proj, ssm_dtype):
    """bfloat16 activations; the float32 definition runs on the same rounded weights."""
    layer = build(in_proj, dtype=torch.bfloat16, ssm_dtype=ssm_dtype, device="cuda")
    x = sequence(90).bfloat16().cuda()
    want, _, _ = definition(layer, x)
    y = torch.cat(
        [
            run(layer, x[:70], prefills=[(3, 70, False)]),
            run(layer, x[70:80], prefills=[(3, 10, True)]),
            *(run(layer, x[i : i + 1], decodes=[3]) for i in range(80, 90)),
        ]
    )
    error = (y.double().cpu() - want).abs().mean() / want.abs().mean()
    assert error < 0.02
