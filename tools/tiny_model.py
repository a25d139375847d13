"""The network of the tiny checkpoint for training: plain functions over a dict of published tensor names.

It computes what the served model computes, arranged for throughput on short sequences: dense experts (eight small
ones cost less than a gather), the gated delta rule in chunks of 64 with a triangular inverse by block doubling, no
cache. Master weights are float32; each forward rounds them to the precision they are saved in, so the loss is that of
the saved weights. Optionally they are also rounded to 4 bits (`fake_int4`), so that training leaves margins that
survive quantisation.

B sequences, L tokens (a multiple of CHUNK), D hidden, H/Kv attention heads, Hk/Hv delta-rule heads, K/V their widths.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64
PREFIX = "model.language_model."
INT4_GROUP = 32

# Matrices that quantised checkpoints of this family leave in 16 bits.
KEPT_IN_16_BITS = (
    "embed_tokens", "lm_head", "in_proj_a", "in_proj_b", "mlp.gate.", "shared_expert_gate", "conv1d", "mtp.fc",
)  # fmt: skip


def saved_dtype(name: str) -> torch.dtype:
    """Precision a tensor has in the checkpoint: float32 for the decay and the delta-rule norm, else bfloat16."""
    return torch.float32 if name.endswith(("A_log", "linear_attn.norm.weight")) else torch.bfloat16


def layer_shapes(text: dict, prefix: str, layer_type: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one decoder layer."""
    D = text["hidden_size"]
    E, I, S = text["num_experts"], text["moe_intermediate_size"], text["shared_expert_intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (D,), "post_attention_layernorm.weight": (D,)}
    if layer_type == "full_attention":
        q_width = text["num_attention_heads"] * text["head_dim"]
        kv_width = text["num_key_value_heads"] * text["head_dim"]
        shapes |= {
            "self_attn.q_proj.weight": (2 * q_width, D),
            "self_attn.k_proj.weight": (kv_width, D),
            "self_attn.v_proj.weight": (kv_width, D),
            "self_attn.o_proj.weight": (D, q_width),
            "self_attn.q_norm.weight": (text["head_dim"],),
            "self_attn.k_norm.weight": (text["head_dim"],),
        }
    else:
        Hv, V = text["linear_num_value_heads"], text["linear_value_head_dim"]
        key_width = text["linear_num_key_heads"] * text["linear_key_head_dim"]
        qkv_width = 2 * key_width + Hv * V
        shapes |= {
            "linear_attn.in_proj_qkv.weight": (qkv_width, D),
            "linear_attn.in_proj_z.weight": (Hv * V, D),
            "linear_attn.in_proj_b.weight": (Hv, D),
            "linear_attn.in_proj_a.weight": (Hv, D),
            "linear_attn.conv1d.weight": (qkv_width, 1, text["linear_conv_kernel_dim"]),
            "linear_attn.A_log": (Hv,),
            "linear_attn.dt_bias": (Hv,),
            "linear_attn.norm.weight": (V,),
            "linear_attn.out_proj.weight": (D, Hv * V),
        }
    shapes |= {
        "mlp.gate.weight": (E, D),
        "mlp.experts.gate_up_proj": (E, 2 * I, D),
        "mlp.experts.down_proj": (E, D, I),
        "mlp.shared_expert.gate_proj.weight": (S, D),
        "mlp.shared_expert.up_proj.weight": (S, D),
        "mlp.shared_expert.down_proj.weight": (D, S),
        "mlp.shared_expert_gate.weight": (1, D),
    }
    return {prefix + name: shape for name, shape in shapes.items()}


def parameter_shapes(text: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the language model and its MTP layer, as published."""
    D, vocab = text["hidden_size"], text["vocab_size"]
    shapes = {
        PREFIX + "embed_tokens.weight": (vocab, D),
        PREFIX + "norm.weight": (D,),
        "lm_head.weight": (vocab, D),
        "mtp.fc.weight": (D, 2 * D),
        "mtp.norm.weight": (D,),
        "mtp.pre_fc_norm_embedding.weight": (D,),
        "mtp.pre_fc_norm_hidden.weight": (D,),
    }
    for i, layer_type in enumerate(text["layer_types"]):
        shapes |= layer_shapes(text, f"{PREFIX}layers.{i}.", layer_type)
    return shapes | layer_shapes(text, "mtp.layers.0.", "full_attention")


def init_parameters(text: dict, seed: int) -> dict[str, Tensor]:
    """Float32 start values. Norm weights start spread around their neutral value, so that no implementation passes
    by leaving out `1 + w`, and the delta rule starts with memories from about ten to a thousand tokens."""
    rng = torch.Generator().manual_seed(seed)
    depth = len(text["layer_types"])
    params = {}
    for name, shape in parameter_shapes(text).items():
        if name.endswith("A_log"):
            value = torch.empty(shape).uniform_(0.5, 8.0, generator=rng).log()
        elif name.endswith("dt_bias"):
            step = torch.empty(shape).uniform_(math.log(1e-3), math.log(1e-1), generator=rng).exp()
            value = step + torch.log(-torch.expm1(-step))  # the inverse of softplus
        elif name.endswith("linear_attn.norm.weight"):
            value = 1.0 + 0.1 * torch.randn(shape, generator=rng)
        elif len(shape) == 1:
            value = 0.2 * torch.randn(shape, generator=rng)
        elif "embed_tokens" in name:
            value = 0.3 * torch.randn(shape, generator=rng)
        else:
            std = shape[-1] ** -0.5
            if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj", "down_proj.weight")):
                std /= math.sqrt(2 * depth)
            value = std * torch.randn(shape, generator=rng)
        params[name] = value
    return params


def fake_int4(weight: Tensor) -> Tensor:
    """Symmetric 4-bit rounding in groups of 32 along the input dimension, back in the input's dtype."""
    groups = weight.float().unflatten(-1, (-1, INT4_GROUP))
    scale = groups.abs().amax(-1, keepdim=True).clamp_min(1e-8) / 7
    return ((groups / scale).round().clamp(-8, 7) * scale).flatten(-2).to(weight.dtype)


def fake_fp8(weight: Tensor) -> Tensor:
    """float8 e4m3 rounding with one scale a row, back in the input's dtype."""
    rows = weight.float()
    scale = rows.abs().amax(-1, keepdim=True).clamp_min(1e-8) / 448
    return ((rows / scale).to(torch.float8_e4m3fn).float() * scale).to(weight.dtype)


def is_quantisable(name: str, weight: Tensor) -> bool:
    """Whether quantised checkpoints of this family hold this tensor in few bits."""
    return weight.dim() >= 2 and not any(part in name for part in KEPT_IN_16_BITS)


def working_weights(params: dict[str, Tensor], int4_gate: Tensor | None = None) -> dict[str, Tensor]:
    """Master weights rounded to their saved precision; where `int4_gate` (a 0/1 scalar) is 1, also to 4 bits.

    Gradients pass the 4-bit rounding unchanged.
    """
    weights = {}
    for name, value in params.items():
        weight = value.to(saved_dtype(name))
        if int4_gate is not None and is_quantisable(name, weight):
            weight = weight + ((fake_int4(weight) - weight) * int4_gate.to(weight.dtype)).detach()
        weights[name] = weight
    return weights


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm with factor 1 + w, computed in float32, result in bfloat16."""
    x = x.float()
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (1.0 + weight.float())).to(torch.bfloat16)


class _UnitLowerInverse(torch.autograd.Function):
    """(I + A)^-1 for strictly lower triangular A [..., CHUNK, CHUNK], CHUNK a power of two.

    Doubling keeps the inverse of the diagonal blocks of size s and fills in the block below the diagonal of the pairs,
    -M22 A21 M11. Unlike the product of squared powers of A it never forms large numbers that cancel.
    """

    @staticmethod
    def forward(ctx, A: Tensor) -> Tensor:
        size = A.shape[-1]
        index = torch.arange(size, device=A.device)
        M = torch.eye(size, device=A.device, dtype=A.dtype).expand_as(A)
        block = 1
        while block < size:
            row, column = index[:, None] // block, index[None, :] // block
            lower_left = (row == column + 1) & (row % 2 == 1)
            M = M - M @ (A * lower_left) @ M
            block *= 2
        ctx.save_for_backward(M)
        return M

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (M,) = ctx.saved_tensors
        Mt = M.transpose(-1, -2)
        return -(Mt @ grad @ Mt).tril(-1)


def chunk_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Gated delta rule from a zero state.

    q, k float32 [B, L, Hk, K], normalised and q scaled; v [B, L, Hv, V]; g (log decay), beta [B, L, Hv].
    Returns float32 [B, L, Hv, V].
    """
    B, L, Hk, K = q.shape
    Hv, V = v.shape[2:]
    N, r = L // CHUNK, Hv // Hk

    def split(x: Tensor) -> Tensor:  # [B, L, heads, ...] -> [B, heads, N, CHUNK, ...]
        return x.unflatten(1, (N, CHUNK)).movedim(3, 1)

    def to_value_heads(x: Tensor) -> Tensor:  # [B, Hk, ...] -> [B, Hv, ...], value head n reads key head n // r
        return x.unsqueeze(2).expand(-1, -1, r, *x.shape[2:]).flatten(1, 2)

    q, k, v, g, beta = split(q), split(k), split(v.float()), split(g), split(beta)
    G = g.cumsum(-1)  # [B, Hv, N, C]
    causal = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).tril()
    decay = (G.unsqueeze(-1) - G.unsqueeze(-2)).masked_fill(~causal, float("-inf")).exp()
    # [B, Hv, N, C, C]
    A = (to_value_heads(k @ k.transpose(-1, -2)) * decay * beta.unsqueeze(-1)).tril(-1)
    scores = to_value_heads(q @ k.transpose(-1, -2)) * decay
    M = _UnitLowerInverse.apply(A)
    q, k = to_value_heads(q), to_value_heads(k)
    eG = G.exp().unsqueeze(-1)
    U = M @ (v * beta.unsqueeze(-1))  # [B, Hv, N, C, V]
    if N == 1:
        return (scores @ U).movedim(1, 3).flatten(1, 2)
    W = M @ (k * (beta.unsqueeze(-1) * eG))  # [B, Hv, N, C, K]
    q_in = q * eG
    k_out = k * (G[..., -1:] - G).exp().unsqueeze(-1)
    carry = G[..., -1].exp()[..., None, None]  # [B, Hv, N, 1, 1]

    S = torch.zeros(B, Hv, K, V, device=q.device)
    outputs = []
    for n in range(N):
        new_v = U[:, :, n] - W[:, :, n] @ S
        outputs.append(q_in[:, :, n] @ S + scores[:, :, n] @ new_v)
        S = S * carry[:, :, n] + k_out[:, :, n].transpose(-1, -2) @ new_v
    return torch.stack(outputs, 2).movedim(1, 3).flatten(1, 2)


def gated_delta_net(w: dict[str, Tensor], text: dict, x: Tensor) -> Tensor:
    """The linear-attention mixer. x bfloat16 [B, L, D] -> [B, L, D]."""
    L = x.shape[1]
    Hk, K = text["linear_num_key_heads"], text["linear_key_head_dim"]
    Hv, V = text["linear_num_value_heads"], text["linear_value_head_dim"]
    taps = text["linear_conv_kernel_dim"]
    parts = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
    fused = torch.cat([w[f"linear_attn.{part}.weight"] for part in parts])
    qkv, z, b, a = (x @ fused.T).split([2 * Hk * K + Hv * V, Hv * V, Hv, Hv], -1)

    padded = F.pad(qkv, (0, 0, taps - 1, 0)).float()
    conv = w["linear_attn.conv1d.weight"].float()
    qkv = F.silu(sum(padded[:, j : j + L] * conv[:, 0, j] for j in range(taps)))
    q, k, v = qkv.split([Hk * K, Hk * K, Hv * V], -1)
    q, k, v = q.unflatten(-1, (Hk, K)), k.unflatten(-1, (Hk, K)), v.unflatten(-1, (Hv, V))
    q = q * torch.rsqrt(q.square().sum(-1, keepdim=True) + 1e-6) * K**-0.5
    k = k * torch.rsqrt(k.square().sum(-1, keepdim=True) + 1e-6)
    g = -w["linear_attn.A_log"].exp() * F.softplus(a.float() + w["linear_attn.dt_bias"].float())
    o = chunk_delta_rule(q, k, v, g, b.float().sigmoid())  # [B, L, Hv, V]
    o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + text["rms_norm_eps"]) * w["linear_attn.norm.weight"]
    o = o * F.silu(z.float().unflatten(-1, (Hv, V)))
    return o.flatten(-2).to(torch.bfloat16) @ w["linear_attn.out_proj.weight"].T


def rotary_table(text: dict, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [length, rotary/2]; text positions are alike on all three axes, so plain RoPE is exact."""
    half = int(text["head_dim"] * text["rope_parameters"]["partial_rotary_factor"]) // 2
    exponent = torch.arange(half, device=device, dtype=torch.float32) / half
    angle = torch.arange(length, device=device)[:, None] * text["rope_parameters"]["rope_theta"] ** -exponent
    return angle.cos(), angle.sin()


def gated_attention(w: dict[str, Tensor], text: dict, x: Tensor) -> Tensor:
    """The full-attention mixer with its output gate. x bfloat16 [B, L, D] -> [B, L, D]."""
    H, Kv, width, eps = text["num_attention_heads"], text["num_key_value_heads"], text["head_dim"], text["rms_norm_eps"]
    q, gate = (x @ w["self_attn.q_proj.weight"].T).unflatten(-1, (H, 2 * width)).chunk(2, -1)
    k = (x @ w["self_attn.k_proj.weight"].T).unflatten(-1, (Kv, width))
    v = (x @ w["self_attn.v_proj.weight"].T).unflatten(-1, (Kv, width))
    cos, sin = (table[:, None] for table in rotary_table(text, x.shape[1], x.device))  # [L, 1, half]
    half = cos.shape[-1]

    def rotate(t: Tensor) -> Tensor:
        a, b, rest = t.float().split([half, half, width - 2 * half], -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1).to(torch.bfloat16).transpose(1, 2)

    q = rotate(rms_norm(q, w["self_attn.q_norm.weight"], eps))
    k = rotate(rms_norm(k, w["self_attn.k_norm.weight"], eps))
    k, v = k.repeat_interleave(H // Kv, 1), v.transpose(1, 2).repeat_interleave(H // Kv, 1)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=width**-0.5).transpose(1, 2)
    return (out * gate.sigmoid()).flatten(-2) @ w["self_attn.o_proj.weight"].T


def sparse_moe(w: dict[str, Tensor], text: dict, x: Tensor) -> tuple[Tensor, Tensor]:
    """Top-k experts plus the gated shared expert, all computed densely.

    x bfloat16 [B, L, D] -> (same shape, load-balance loss: 1 when every expert is used alike, up to E).
    """
    E, I, S = text["num_experts"], text["moe_intermediate_size"], text["shared_expert_intermediate_size"]
    probability = (x @ w["mlp.gate.weight"].T).float().softmax(-1)  # [B, L, E]
    top, index = probability.topk(text["num_experts_per_tok"], -1)
    chosen = torch.zeros_like(probability).scatter(-1, index, 1.0)
    routing = (probability * chosen / top.sum(-1, keepdim=True)).to(torch.bfloat16)
    balance = E * (chosen.mean((0, 1)) / index.shape[-1] * probability.mean((0, 1))).sum()

    gate, up = (x @ w["mlp.experts.gate_up_proj"].flatten(0, 1).T).unflatten(-1, (E, 2, I)).unbind(-2)
    hidden = (F.silu(gate) * up * routing.unsqueeze(-1)).flatten(-2)  # [B, L, E * I]
    shared_in = torch.cat([w["mlp.shared_expert.gate_proj.weight"], w["mlp.shared_expert.up_proj.weight"]])
    gate, up = (x @ shared_in.T).split(S, -1)
    shared = F.silu(gate) * up * (x @ w["mlp.shared_expert_gate.weight"].T).sigmoid()
    down = torch.cat(
        [w["mlp.experts.down_proj"].transpose(0, 1).flatten(1), w["mlp.shared_expert.down_proj.weight"]], 1
    )
    return torch.cat([hidden, shared], -1) @ down.T, balance


def decoder_layer(w: dict[str, Tensor], layer_type: str, text: dict, h: Tensor) -> tuple[Tensor, Tensor]:
    """One pre-norm layer on the float32 residual stream h [B, L, D]; also returns the load-balance loss.

    `w` holds this layer's tensors alone, under names without prefix: a compiled version then serves all layers.
    """
    eps = text["rms_norm_eps"]
    mixer = gated_attention if layer_type == "full_attention" else gated_delta_net
    h = h + mixer(w, text, rms_norm(h, w["input_layernorm.weight"], eps))
    out, balance = sparse_moe(w, text, rms_norm(h, w["post_attention_layernorm.weight"], eps))
    return h + out, balance


def pick_layer(w: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors of one layer, without their prefix."""
    return {name.removeprefix(prefix): value for name, value in w.items() if name.startswith(prefix)}


def weighted_entropy(states: Tensor, head: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """Sum of weight * cross-entropy. states [B, T, D], head [vocab, D], targets and weight [B, T]."""
    logits = (states @ head.T).float().flatten(0, 1)
    losses = F.cross_entropy(logits, targets.flatten(), reduction="none")
    return (losses * weight.flatten()).sum()


# The two functions that training compiles; `compile_parts` replaces them.
PARTS = {"layer": decoder_layer, "entropy": weighted_entropy}


def compile_parts(enabled: bool) -> None:
    """Switch between the compiled and the plain form of the hot functions."""
    plain = {"layer": decoder_layer, "entropy": weighted_entropy}
    for name, function in plain.items():
        PARTS[name] = torch.compile(function, dynamic=False) if enabled else function


def language_model(w: dict[str, Tensor], text: dict, ids: Tensor) -> tuple[Tensor, Tensor]:
    """ids [B, L] -> (hidden states after the final norm, bfloat16 [B, L, D]; mean load-balance loss)."""
    h = F.embedding(ids, w[PREFIX + "embed_tokens.weight"]).float()
    balance = torch.zeros((), device=ids.device)
    for i, layer_type in enumerate(text["layer_types"]):
        h, extra = PARTS["layer"](pick_layer(w, f"{PREFIX}layers.{i}."), layer_type, text, h)
        balance = balance + extra / len(text["layer_types"])
    return rms_norm(h, w[PREFIX + "norm.weight"], text["rms_norm_eps"]), balance


def mtp_model(w: dict[str, Tensor], text: dict, ids: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The draft layer's first pass: position i sees the target's hidden state i and token i+1, and predicts i+2.

    ids [B, L], hidden bfloat16 [B, L, D] -> (bfloat16 [B, L, D], load-balance loss). The last position pairs with
    token 0 of the row and means nothing.
    """
    eps = text["rms_norm_eps"]
    embedded = F.embedding(ids.roll(-1, 1), w[PREFIX + "embed_tokens.weight"])
    embedded = rms_norm(embedded, w["mtp.pre_fc_norm_embedding.weight"], eps)
    x = torch.cat([embedded, rms_norm(hidden, w["mtp.pre_fc_norm_hidden.weight"], eps)], -1) @ w["mtp.fc.weight"].T
    h, balance = PARTS["layer"](pick_layer(w, "mtp.layers.0."), "full_attention", text, x.float())
    return rms_norm(h, w["mtp.norm.weight"], eps), balance


def loss_sums(w: dict[str, Tensor], text: dict, ids: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted cross-entropy sums over one batch, and the load-balance loss.

    ids [B, L]; weight float32 [B, L], how much predicting ids[b, l] counts. Returns (target, MTP, balance).
    """
    hidden, balance = language_model(w, text, ids)
    drafted, mtp_balance = mtp_model(w, text, ids, hidden)

    head, entropy = w["lm_head.weight"], PARTS["entropy"]
    target = entropy(hidden[:, :-1], head, ids[:, 1:], weight[:, 1:])
    draft = entropy(drafted[:, :-2], head, ids[:, 2:], weight[:, 2:])
    return target, draft, balance + 0.2 * mtp_balance
