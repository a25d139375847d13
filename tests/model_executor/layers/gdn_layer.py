"""A small Gated DeltaNet layer, its definition token by token, and steps of it."""

from dataclasses import replace

import torch

from vllm.config.checkpoint import TINY, load_hf_config
from vllm.config.gdn import GDNConfig
from vllm.forward_context import ForwardContext, GDNAttentionMetadata, set_forward_context
from vllm.model_executor.layers.mamba.gdn_linear_attn import GatedDeltaNet, separate_sources
from vllm.model_executor.layers.quantization.plan import ConfigPlan
from vllm.v1.attention.backends.gdn_attn import prefill_chunks

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


def build(
    in_proj="auto",
    slots=6,
    ssm_dtype=torch.float32,
    dtype=torch.float32,
    device="cpu",
    gdn=None,
    sources=separate_sources,
    **changes,
):
    """A layer with random weights on its device, variants chosen; every slot holds fives (windows) and minus twos (states)."""
    gdn_config = GDNConfig(gdn_in_proj=in_proj, **(gdn or {}))
    layer = GatedDeltaNet(
        config(**changes), prefix="m", plan=ConfigPlan(None, dtype), gdn_config=gdn_config, in_proj_sources=sources
    ).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for module in layer.modules():
        if hasattr(module, "fill_dummy"):
            module.fill_dummy(generator)
    layer.norm.weight.uniform_(0.5, 1.5, generator=generator)
    layer.dt_bias.uniform_(-3, 1, generator=generator)
    layer.conv_state = layer.make_state("conv_state", slots, dtype, device).fill_(5.0)
    layer.ssm_state = layer.make_state("ssm_state", slots, ssm_dtype, device).fill_(-2.0)
    layer.to(device).process_weights_after_loading()
    return layer


def definition(layer, x, eps=1e-6):
    """Section by section what the layer is: x [T, D] of one sequence -> y [T, D], final window, final state [Hv, V, K]."""
    f = lambda t: t.detach().cpu().double()
    y = f(x) @ f(layer.in_proj.weight).T
    q_k_v, z, b, a = y.split([2 * HK * K + HV * V, HV * V, HV, HV], dim=1)
    history = torch.cat([torch.zeros(W - 1, q_k_v.shape[1], dtype=torch.float64), q_k_v])
    mixed = sum(history[j : j + len(x)] * f(layer.conv1d_weight)[:, j] for j in range(W))
    mixed = mixed * torch.sigmoid(mixed)
    decay = torch.exp(-torch.exp(f(layer.A_log)) * torch.log1p(torch.exp(a + f(layer.dt_bias))))  # [T, Hv]
    S, out = torch.zeros(HV, V, K, dtype=torch.float64), []
    for t in range(len(x)):
        q, k, v = mixed[t].split([HK * K, HK * K, HV * V])
        q, k = (u.view(HK, K) / (u.view(HK, K).square().sum(1, keepdim=True) + 1e-6).sqrt() for u in (q, k))
        q, k = (u.repeat_interleave(HV // HK, dim=0)[:, None] for u in (q, k))  # [Hv, 1, K]
        S = S * decay[t, :, None, None]
        S = S + torch.sigmoid(b[t])[:, None, None] * (v.view(HV, V, 1) - (S * k).sum(2, keepdim=True)) * k
        o = (S * q).sum(2) * K**-0.5  # [Hv, V]
        o = o / (o.square().mean(1, keepdim=True) + eps).sqrt() * f(layer.norm.weight)
        gate = z[t].view(HV, V)
        o = o * (torch.sigmoid(gate) if layer.norm.activation == "sigmoid" else gate * torch.sigmoid(gate))
        out.append(o.flatten())
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
        **prefill_chunks(lens, torch.device(device)),
    )


def step_of(layer, x, decodes=(), prefills=()):
    """A forward over x, to be called as often as wanted: nothing but the layer happens in it."""
    context = ForwardContext(attn=None, gdn=metadata(list(decodes), list(prefills), x.device))

    def step():
        with torch.inference_mode(), set_forward_context(context):
            return layer(x)

    return step


def run(layer, x, decodes=(), prefills=()):
    return step_of(layer, x, decodes, prefills)()


def sequence(n, seed=1):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))
