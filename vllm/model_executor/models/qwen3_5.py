"""Qwen3.5 and Qwen3.6, dense and mixture of experts: three Gated DeltaNet layers, then one of gated attention, and again."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import nn

from vllm.config.gdn import GDNConfig
from vllm.config.hf_config import TextConfig
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.folding import NOTHING, Folds, Part, step_folds, where
from vllm.model_executor.layers.fused_moe import FusedMoE, SharedExpert
from vllm.model_executor.layers.layernorm import GemmaRMSNorm
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.mamba.gdn_linear_attn import GatedDeltaNet, InProjSources, separate_sources
from vllm.model_executor.layers.ops.attention_torch import ProjectedRows
from vllm.model_executor.layers.ops.rms_norm import Unnormed, normed
from vllm.model_executor.layers.quantization.plan import WeightPlan
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, TiedLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import StatefulLayers


class Qwen3_5ForCausalLM(nn.Module):
    """The language model. See `vllm.model_executor.models.interfaces.CausalLM`."""

    in_proj_sources: InProjSources = staticmethod(separate_sources)
    """How this family's checkpoints name the rows of the GDN input projection."""

    def __init__(self, config: TextConfig, plan: WeightPlan, gdn_config: GDNConfig | None = None) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, prefix="model.embed_tokens", plan=plan
        )
        self.rotary_emb = get_rope(
            config.head_dim, config.rotary_dim, config.max_position_embeddings, config.rope_theta, config.mrope_section
        )
        self.layers = nn.ModuleList(
            DecoderLayer(config, i, plan, self.in_proj_sources, gdn_config) for i in range(config.num_hidden_layers)
        )
        self.norm = GemmaRMSNorm(config.hidden_size, config.rms_norm_eps, prefix="model.norm", dtype=plan.dtype)
        if config.tie_word_embeddings:
            self.lm_head = TiedLMHead(self.embed_tokens)
        else:
            self.lm_head = ParallelLMHead(config.hidden_size, config.vocab_size, prefix="lm_head", plan=plan)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """input_ids [T], positions [T] or [3, T] -> hidden [T, D] after the final norm."""
        hidden = self.embed_tokens(input_ids)
        cos_sin = self.rotary_emb.cos_sin(positions)  # [T, rotary_dim]
        folds = self.folds(hidden)
        hidden, residual = (None, hidden) if folds.input else (hidden, torch.zeros_like(hidden))
        for layer in self.layers:
            hidden, residual = layer(hidden, residual, cos_sin, folds)
        return normed(self.norm(hidden, residual)[0])

    def folds(self, hidden: torch.Tensor) -> Folds:
        """The norms of a residual [T, D] that are left to the projections behind them."""
        if not hidden.is_cuda or torch.compiler.is_compiling():
            return NOTHING
        gdn = next((layer.linear_attn.variants.in_proj for layer in self.layers if layer.is_gdn), "fused")
        return step_folds(hidden.shape[0], hidden.dtype, where(hidden.device), gdn, self._parts)

    @cached_property
    def _parts(self) -> frozenset[Part]:
        return frozenset(part for layer in self.layers for part in layer.parts())

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [N, D] -> [N, vocab]."""
        return self.lm_head(hidden)

    def stateful_layers(self) -> StatefulLayers:
        return StatefulLayers(
            attention=[layer.self_attn.attn for layer in self.layers if not layer.is_gdn],
            gdn=[layer.linear_attn for layer in self.layers if layer.is_gdn],
        )


class DecoderLayer(nn.Module):
    """A token mixer (Gated DeltaNet or attention) and a feed-forward net (dense or experts), each behind a norm."""

    def __init__(
        self,
        config: TextConfig,
        index: int,
        plan: WeightPlan,
        in_proj_sources: InProjSources,
        gdn_config: GDNConfig | None,
    ) -> None:
        super().__init__()
        prefix = f"model.layers.{index}"
        self.is_gdn = config.layer_types[index] == "linear_attention"
        if self.is_gdn:
            self.linear_attn = GatedDeltaNet(
                config,
                prefix=f"{prefix}.linear_attn",
                plan=plan,
                in_proj_sources=in_proj_sources,
                gdn_config=gdn_config,
            )
        else:
            self.self_attn = GatedAttention(config, f"{prefix}.self_attn", plan)
        sparse = config.num_experts > 0 and config.sparse_layers[index]
        self.mlp = (SparseMoE if sparse else DenseMLP)(config, f"{prefix}.mlp", plan)
        self.input_layernorm, self.post_attention_layernorm = (
            GemmaRMSNorm(config.hidden_size, config.rms_norm_eps, prefix=f"{prefix}.{name}", dtype=plan.dtype)
            for name in ("input_layernorm", "post_attention_layernorm")
        )

    def forward(
        self,
        hidden: torch.Tensor | None,
        residual: torch.Tensor,
        cos_sin: torch.Tensor,
        folds: Folds = NOTHING,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """hidden (not yet added; None: it has been) and residual [T, D] -> the same of the next layer.

        Args:
            folds: norms that are left to what is behind them (`layers/folding.py`); what is in front adds to the residual by itself.
        """
        hidden, residual = self.input_layernorm(hidden, residual)
        hidden = self.mix(hidden, cos_sin, residual if folds.post else None)
        hidden, residual = self.post_attention_layernorm(hidden, residual)
        return self.mlp(hidden, residual if folds.input else None), residual

    def mix(
        self, x: torch.Tensor | Unnormed, cos_sin: torch.Tensor, add_to: torch.Tensor | None
    ) -> torch.Tensor | None:
        """What the mixer makes of x [T, D]; None where it is added to `add_to`."""
        return self.linear_attn(x, add_to) if self.is_gdn else self.self_attn(x, cos_sin, add_to)

    def parts(self) -> Iterator[Part]:
        """What stands between residual and residual."""
        if self.is_gdn:
            linears = self.linear_attn.in_proj, self.linear_attn.out_proj
        else:
            linears = self.self_attn.qkv_proj, self.self_attn.o_proj
        yield from (linear.product for linear in linears if linear is not None)
        yield from self.mlp.parts()


class GatedAttention(nn.Module):
    """Attention with normalised queries and keys, and a gate on its output.

    A query head's projection carries the query and, beside it, that head's gate.
    """

    def __init__(self, config: TextConfig, prefix: str, plan: WeightPlan) -> None:
        super().__init__()
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            config.head_dim,
            config.num_attention_heads,
            config.num_key_value_heads,
            query_size=2 * config.head_dim,
            prefix=prefix,
            bias=config.attention_bias,
            plan=plan,
        )
        self.q_norm, self.k_norm = (
            GemmaRMSNorm(config.head_dim, config.rms_norm_eps, prefix=f"{prefix}.{name}", dtype=plan.dtype)
            for name in ("q_norm", "k_norm")
        )
        self.attn = Attention(self.qkv_proj.num_heads, config.head_dim, self.qkv_proj.num_kv_heads)
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * config.head_dim,
            config.hidden_size,
            prefix=f"{prefix}.o_proj",
            bias=config.attention_bias,
            plan=plan,
        )

    def forward(
        self, x: torch.Tensor | Unnormed, cos_sin: torch.Tensor, add_to: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """x [T, D], cos_sin [T, rotary_dim] -> [T, D], or added to `add_to`."""
        weights = self.q_norm.weight, self.k_norm.weight
        rows = ProjectedRows(self.qkv_proj(x), cos_sin, *weights, self.q_norm.eps)
        return self.o_proj(self.attn.gated(rows), add_to)


class DenseMLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, config: TextConfig, prefix: str, plan: WeightPlan, intermediate_size: int | None = None) -> None:
        super().__init__()
        D, intermediate = config.hidden_size, intermediate_size or config.intermediate_size
        self.gate_up_proj = MergedColumnParallelLinear(
            D, {"gate_proj": intermediate, "up_proj": intermediate}, prefix=prefix, plan=plan
        )
        self.act = SiluAndMul()
        self.down_proj = RowParallelLinear(intermediate, D, prefix=f"{prefix}.down_proj", plan=plan)

    def forward(self, x: torch.Tensor | Unnormed, add_to: torch.Tensor | None = None) -> torch.Tensor | None:
        """x [T, D] -> [T, D], or added to `add_to`."""
        return self.down_proj(self.act(self.gate_up_proj(x)), add_to)

    def parts(self) -> Iterator[Part]:
        yield from (self.gate_up_proj.product, self.down_proj.product)


class SparseMoE(nn.Module):
    """A few experts a token, chosen by a router, and one shared expert behind a gate of its own."""

    def __init__(self, config: TextConfig, prefix: str, plan: WeightPlan) -> None:
        super().__init__()
        D = config.hidden_size
        self.gate = ReplicatedLinear(D, config.num_experts, prefix=f"{prefix}.gate", plan=plan)
        self.experts = FusedMoE(
            config.num_experts,
            config.num_experts_per_tok,
            D,
            config.moe_intermediate_size,
            prefix=f"{prefix}.experts",
            plan=plan,
        )
        self.shared_expert = DenseMLP(config, f"{prefix}.shared_expert", plan, config.shared_expert_intermediate_size)
        self.shared_expert_gate = ReplicatedLinear(D, 1, prefix=f"{prefix}.shared_expert_gate", plan=plan)

    @property
    def shared(self) -> SharedExpert:
        return SharedExpert(self.shared_expert, self.shared_expert_gate)

    def forward(self, x: torch.Tensor | Unnormed, add_to: torch.Tensor | None = None) -> torch.Tensor | None:
        """x [T, D] -> [T, D], or added to `add_to`."""
        return self.experts(x, self.gate, self.shared, add_to)

    def parts(self) -> Iterator[Part]:
        yield self.experts.part(self.gate, self.shared)
