"""The Gated DeltaNet layer: project -> convolve -> gate -> delta rule -> gated norm -> output projection.

Each value head keeps a matrix S that maps keys to values. A token first lets S fade (gate g), then replaces what S answers to its key by
its value (strength beta), then asks S its query:

    S <- e^g S,  S <- S + beta (v - S k) kᵀ,  o = S q

q, k and v pass a causal convolution over the last four tokens; q and k are normalised to unit length. Source: "Gated Delta Networks",
Yang, Kautz, Hatamizadeh, arXiv 2412.06464; layout of heads and projections: Qwen3-Next and Qwen3.5.

A step's rows are decoding sequences (one token each), then prompt chunks. Both kinds share the projections and the norm; in between,
decoding rows update their slots in place, and prompt chunks go through the chunked forms.

Stages that users compare have named variants, in the tables below. A variant is a small function; the layer picks it when it is built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import nn

from vllm.config.gdn import GDNConfig
from vllm.config.hf_config import TextConfig
from vllm.distributed.parallel_state import TensorParallelGroup, get_tensor_parallel_group
from vllm.forward_context import GDNAttentionMetadata, get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.fla.ops import (
    chunk_gated_delta_rule,
    fused_gdn_gating,
    fused_sigmoid_gating_delta_rule_update,
)
from vllm.model_executor.layers.layernorm import RMSNormGated
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    RowParallelLinear,
    plain_plan,
    sources_of_parts,
)
from vllm.model_executor.layers.mamba.ops.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from vllm.model_executor.layers.quantization.base import take_rows
from vllm.model_executor.layers.quantization.plan import WeightPlan
from vllm.model_executor.parameter import Slot, Source, empty_parameter

logger = init_logger(__name__)


class Projected(NamedTuple):
    """What the input projection makes of x [T, D]. Views of wider rows: only the last dimension is contiguous."""

    mixed_qkv: torch.Tensor  # [T, 2*Hk*K + Hv*V], rows [q | k | v] before the convolution
    z: torch.Tensor  # [T, Hv*V], the output gate
    b: torch.Tensor  # [T, Hv], strength before the sigmoid
    a: torch.Tensor  # [T, Hv], decay before softplus


def project_fused(layer: GatedDeltaNet, x: torch.Tensor) -> Projected:
    """One GEMM over [q | k | v | z | b | a]."""
    y = layer.in_proj(x)
    return Projected(*y.split([layer.conv_dim, layer.value_dim, layer.num_v_heads, layer.num_v_heads], dim=-1))


def project_serial(layer: GatedDeltaNet, x: torch.Tensor) -> Projected:
    """Two GEMMs, one after the other: [q | k | v | z], then [b | a]."""
    qkvz, ba = layer.in_proj_qkvz(x), layer.in_proj_ba(x)
    return Projected(*qkvz.split([layer.conv_dim, layer.value_dim], dim=-1), *ba.chunk(2, dim=-1))


IN_PROJ: dict[str, Callable[[GatedDeltaNet, torch.Tensor], Projected]] = {
    "fused": project_fused,
    "serial": project_serial,
}
"""The input projection, --gdn-in-proj: (layer, x [T, D]) -> what it makes of x."""


def decode_unpacked(layer: GatedDeltaNet, p: Projected, state_indices: torch.Tensor) -> torch.Tensor:
    """Convolution update, then gating and recurrence, on slots of the state pools. Padding rows come out as zeros."""
    # [S, 2*Hk*K + Hv*V]
    mixed_qkv = causal_conv1d_update(
        p.mixed_qkv, layer.conv_state, layer.conv1d_weight, None, "silu", conv_state_indices=state_indices
    )
    q, k, v = layer.split_heads(mixed_qkv)  # [S, H, .]
    o, _ = fused_sigmoid_gating_delta_rule_update(
        layer.A_log,
        p.a,
        p.b,
        layer.dt_bias,
        q[:, None],
        k[:, None],
        v[:, None],
        initial_state=layer.ssm_state,
        inplace_final_state=True,
        ssm_state_indices=state_indices,
        use_qk_l2norm_in_kernel=True,
    )
    return o[:, 0]


DECODE: dict[str, Callable[[GatedDeltaNet, Projected, torch.Tensor], torch.Tensor]] = {
    "unpacked": decode_unpacked,
}
"""From convolution to delta rule for decoding rows: (layer, rows, state_indices [S]) -> o [S, Hv, V]."""


def prefill_chunked(layer: GatedDeltaNet, p: Projected, meta: GDNAttentionMetadata) -> torch.Tensor:
    """Convolution and chunked delta rule over prompt chunks [T tokens], from their slots (zeros at a prompt's start) and back.

    Returns o [T, Hv, V].
    """
    slots = meta.state_indices[meta.num_decodes :]
    starts = list(accumulate(meta.prefill_query_lens_cpu, initial=0))
    mixed_qkv = causal_conv1d_fn(
        p.mixed_qkv.T,
        layer.conv1d_weight,
        None,
        layer.conv_state,
        meta.prefill_query_start_loc,
        cache_indices=slots,
        has_initial_state=meta.prefill_has_initial_state,
        activation="silu",
        query_start_loc_cpu=starts,
    ).T
    q, k, v = layer.split_heads(mixed_qkv)  # [T, H, .]
    g, beta = fused_gdn_gating(layer.A_log, p.a, p.b, layer.dt_bias)  # [1, T, Hv]
    o, _ = chunk_gated_delta_rule(
        q[None],
        k[None],
        v[None],
        g,
        beta,
        initial_state=layer.ssm_state,
        cu_seqlens=meta.prefill_query_start_loc,
        cu_seqlens_cpu=starts,
        ssm_state_indices=slots,
        has_initial_state=meta.prefill_has_initial_state,
        use_qk_l2norm_in_kernel=True,
    )
    return o[0]


PartSizes = dict[str, int]
InProjSources = Callable[[PartSizes, TextConfig, str, TensorParallelGroup], list[Source]]
"""How a family's checkpoints name the input projection's rows: (full sizes of parts, config, prefix, group) -> sources."""


def separate_sources(parts: PartSizes, config: TextConfig, prefix: str, group: TensorParallelGroup) -> list[Source]:
    """Qwen3.5: in_proj_qkv [q | k | v], in_proj_z, in_proj_b, in_proj_a. Modules whose parts are not among `parts` are left out."""
    modules = {
        "in_proj_qkv": ("q", "k", "v"),
        "in_proj_z": ("z",),
        "in_proj_b": ("b",),
        "in_proj_a": ("a",),
    }
    wanted = {module: names for module, names in modules.items() if names[0] in parts}
    return sources_of_parts(parts, wanted, prefix, group)


def interleaved_sources(parts: PartSizes, config: TextConfig, prefix: str, group: TensorParallelGroup) -> list[Source]:
    """Qwen3-Next: in_proj_qkvz and in_proj_ba, whose rows go key head by key head, (q, k, v's, z's) and (b's, a's)."""
    sources, begin = [], 0
    for module, names in {"in_proj_qkvz": ("q", "k", "v", "z"), "in_proj_ba": ("b", "a")}.items():
        if names[0] not in parts:
            continue
        heads = config.linear_num_key_heads
        widths = [parts[name] // heads for name in names]  # rows of each part in one key head
        by_head = torch.arange(heads * sum(widths), device="cpu").view(heads, sum(widths))
        mine = by_head.tensor_split(group.size)[group.rank]
        take = torch.cat([part.flatten() for part in mine.split(widths, dim=1)])
        sources.append(Source(f"{prefix}.{module}", by_head.numel(), slice(begin, begin + take.numel()), take))
        begin += take.numel()
    return sources


class GatedDeltaNet(nn.Module):
    """One Gated DeltaNet layer.

    One matrix is loaded, in_proj [q | k | v | z | b | a]; variants that multiply parts of it use row views. Where a checkpoint stores
    [q | k | v | z] and [b | a] in different formats, the two stay apart, and only `serial` applies.

    Args:
        prefix: "model.layers.0.linear_attn".
        in_proj_sources: how the checkpoint names the input projection's rows.
        gdn_config: variants of the stages.

    Attributes, set by the runner before the first forward; slot 0 belongs to nobody:
        conv_state: [slots, conv_dim, kernel - 1], the last inputs of the convolution, oldest first.
        ssm_state: [slots, Hv, V, K], float32 or bfloat16.
    """

    def __init__(
        self,
        config: TextConfig,
        *,
        prefix: str,
        plan: WeightPlan | None = None,
        in_proj_sources: InProjSources = separate_sources,
        gdn_config: GDNConfig | None = None,
    ) -> None:
        super().__init__()
        plan, gdn_config, group = plan or plain_plan(), gdn_config or GDNConfig(), get_tensor_parallel_group()
        self.prefix, self.group = prefix, group
        self.num_k_heads = group.share(config.linear_num_key_heads, f"{prefix}: key heads")
        self.num_v_heads = group.share(config.linear_num_value_heads, f"{prefix}: value heads")
        self.head_k_dim, self.head_v_dim = config.linear_key_head_dim, config.linear_value_head_dim
        self.key_dim, self.value_dim = self.num_k_heads * self.head_k_dim, self.num_v_heads * self.head_v_dim
        self.conv_dim, self.kernel = 2 * self.key_dim + self.value_dim, config.linear_conv_kernel_dim
        self._conv_parts = {"q": config.key_dim, "k": config.key_dim, "v": config.value_dim}

        self._build_in_proj(config, plan, in_proj_sources, gdn_config.gdn_in_proj)
        self.conv1d_weight = empty_parameter(self.conv_dim, self.kernel, dtype=plan.dtype)
        self.A_log = empty_parameter(self.num_v_heads, dtype=plan.small_dtype(f"{prefix}.A_log"))
        self.dt_bias = empty_parameter(self.num_v_heads, dtype=plan.small_dtype(f"{prefix}.dt_bias"))
        self.norm = RMSNormGated(
            self.head_v_dim,
            config.rms_norm_eps,
            activation=config.output_gate_type,
            prefix=f"{prefix}.norm",
            dtype=plan.small_dtype(f"{prefix}.norm.weight"),
        )
        self.out_proj = RowParallelLinear(config.value_dim, config.hidden_size, prefix=f"{prefix}.out_proj", plan=plan)
        self.decode = DECODE["unpacked"]
        self.prefill = prefill_chunked
        self.conv_state: torch.Tensor | None = None
        self.ssm_state: torch.Tensor | None = None

    def _build_in_proj(
        self, config: TextConfig, plan: WeightPlan, in_proj_sources: InProjSources, variant: str
    ) -> None:
        D, prefix, group = config.hidden_size, self.prefix, self.group
        qkvz = {**self._conv_parts, "z": config.value_dim}
        ba = {"b": config.linear_num_value_heads, "a": config.linear_num_value_heads}

        def merged(parts: PartSizes) -> MergedColumnParallelLinear:
            sources = in_proj_sources(parts, config, prefix, group)
            return MergedColumnParallelLinear(D, parts, prefix=prefix, sources=sources, plan=plan)

        modules = [source.name for source in in_proj_sources({**qkvz, **ba}, config, prefix, group)]
        if plan.can_fuse(modules, D):
            self.in_proj = merged({**qkvz, **ba})
            rows = self.in_proj.rows
            self.in_proj_qkvz = RowsOf(self.in_proj, slice(0, rows["z"].stop))
            self.in_proj_ba = RowsOf(self.in_proj, slice(rows["b"].start, rows["a"].stop))
            chosen = "fused" if variant == "auto" else variant
        else:
            self.in_proj = None
            self.in_proj_qkvz, self.in_proj_ba = merged(qkvz), merged(ba)
            chosen = "serial"
            logger.info_once(
                "GDN input projections run as serial: the checkpoint stores q, k, v, z and b, a in different formats%s.",
                "" if variant in ("auto", chosen) else f" (--gdn-in-proj {variant} needs them to be alike)",
            )
        self.project = IN_PROJ[chosen]

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Attribute -> shape of one slot. `conv_state` is in the activations' dtype, `ssm_state` in the recurrent state's."""
        return {
            "conv_state": (self.conv_dim, self.kernel - 1),
            "ssm_state": (self.num_v_heads, self.head_v_dim, self.head_k_dim),
        }

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, D] -> [T, D]. Padding rows come out finite and leave every state alone."""
        meta = get_forward_context().gdn
        projected = self.project(self, x)
        o = self._delta_rule(projected, meta)  # [T, Hv, V]
        o = self.norm(o, projected.z.unflatten(-1, (self.num_v_heads, self.head_v_dim)))
        return self.out_proj(o.flatten(1))

    def _delta_rule(self, projected: Projected, meta: GDNAttentionMetadata) -> torch.Tensor:
        """Convolution, gates and recurrence of decoding rows and of prompt chunks, [T, Hv, V] together."""
        T, d = projected.mixed_qkv.shape[0], meta.num_decodes
        end = d + meta.num_prefill_tokens
        if d == T:
            return self.decode(self, projected, meta.state_indices[:d])
        if d == 0 and end == T:
            return self.prefill(self, projected, meta)
        o = projected.mixed_qkv.new_zeros(T, self.num_v_heads, self.head_v_dim)
        if d:
            o[:d] = self.decode(self, Projected(*(x[:d] for x in projected)), meta.state_indices[:d])
        if end > d:
            o[d:end] = self.prefill(self, Projected(*(x[d:end] for x in projected)), meta)
        return o

    def split_heads(self, mixed_qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[T, 2*Hk*K + Hv*V] -> views q, k [T, Hk, K], v [T, Hv, V]."""
        q, k, v = mixed_qkv.split([self.key_dim, self.key_dim, self.value_dim], dim=-1)
        return (
            q.unflatten(-1, (self.num_k_heads, self.head_k_dim)),
            k.unflatten(-1, (self.num_k_heads, self.head_k_dim)),
            v.unflatten(-1, (self.num_v_heads, self.head_v_dim)),
        )

    def checkpoint_slots(self) -> Iterator[Slot]:
        conv = sources_of_parts(self._conv_parts, {"conv1d": ("q", "k", "v")}, self.prefix, self.group)[0]
        yield Slot(
            f"{conv.name}.weight",
            (conv.rows, 1, self.kernel),
            self.conv1d_weight,
            transform=lambda w: take_rows(w.squeeze(1), conv.take),
        )
        heads = slice(self.group.rank * self.num_v_heads, (self.group.rank + 1) * self.num_v_heads)
        for name in ("A_log", "dt_bias"):
            shape = (self.num_v_heads * self.group.size,)
            yield Slot(f"{self.prefix}.{name}", shape, getattr(self, name), transform=lambda w: w[heads])

    def fill_dummy(self, generator: torch.Generator) -> None:
        self.conv1d_weight.normal_(0.0, 0.5, generator=generator)
        self.A_log.uniform_(-1.0, 2.5, generator=generator)  # decay rates of 0.4 to 12
        self.dt_bias.uniform_(-5.0, -1.0, generator=generator)


class RowsOf:
    """A run of another linear layer's outputs, with its weights: not a module, it owns nothing."""

    def __init__(self, linear: MergedColumnParallelLinear, rows: slice) -> None:
        self.linear, self.rows = linear, rows

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, D] -> [T, rows]."""
        return self.linear(x, self.rows)


__all__ = ["DECODE", "IN_PROJ", "GatedDeltaNet", "Projected", "interleaved_sources", "separate_sources"]
