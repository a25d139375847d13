"""The stages of the Gated DeltaNet layer that users compare, each in all its variants.

A variant is a function of the layer and its rows; tables map the flags' names to them. `choose_*` turn what was asked for into a
variant: pure functions, so that a choice can be tested without the device it is for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import torch

from vllm import envs
from vllm.forward_context import GDNAttentionMetadata
from vllm.model_executor.layers.fla.ops import (
    fused_gdn_decode,
    fused_recurrent_gated_delta_rule_packed_decode,
    fused_sigmoid_gating_delta_rule_update,
)
from vllm.model_executor.layers.fla.ops.chunk import chunk_gated_delta_rule_torch, chunk_gated_delta_rule_triton
from vllm.model_executor.layers.fla.ops.gating import fused_gdn_gating_torch, fused_gdn_gating_triton
from vllm.model_executor.layers.mamba.ops.causal_conv1d import (
    causal_conv1d_fn_torch,
    causal_conv1d_fn_triton,
    causal_conv1d_update,
)
from vllm.model_executor.layers.ops.rms_norm import Unnormed, normed
from vllm.utils.multi_stream_utils import maybe_execute_in_parallel
from vllm.utils.torch_utils import (
    LayerNameType,
    _encode_layer_name,
    aux_stream,
    direct_register_custom_op,
    find_layer,
)

if TYPE_CHECKING:
    from vllm.model_executor.layers.mamba.gdn_linear_attn import GatedDeltaNet


class Projected(NamedTuple):
    """What the input projection makes of x [T, D]. Views of wider rows: only the last dimension is contiguous."""

    mixed_qkv: torch.Tensor  # [T, 2*Hk*K + Hv*V], rows [q | k | v] before the convolution
    z: torch.Tensor  # [T, Hv*V], the output gate
    b: torch.Tensor  # [T, Hv], strength before the sigmoid
    a: torch.Tensor  # [T, Hv], decay before softplus


class Variants(NamedTuple):
    """Names of one variant a stage. CUDA graphs are captured for one such choice, and hashable it can be part of their key."""

    in_proj: str
    decode: str
    prefill: str


# The input projection, --gdn-in-proj


def project_fused(layer: GatedDeltaNet, x: torch.Tensor | Unnormed) -> Projected:
    """One GEMM over [q | k | v | z | b | a], and views of its output."""
    y = layer.in_proj(x)
    return Projected(*y.split([layer.conv_dim, layer.value_dim, layer.num_v_heads, layer.num_v_heads], dim=-1))


def project_serial(layer: GatedDeltaNet, x: torch.Tensor | Unnormed) -> Projected:
    """One GEMM after the other: [q | k | v | z], then [b | a]; or as many as there are modules where these are kept apart."""
    x = normed(x)
    return Projected(*(y for linear, widths in layer.in_proj_groups for y in linear(x).split(widths, dim=-1)))


def project_dual_stream(layer: GatedDeltaNet, x: torch.Tensor | Unnormed) -> Projected:
    """The same two GEMMs, at the same time on two CUDA streams."""
    qkvz_size, ba_size = layer.conv_dim + layer.value_dim, 2 * layer.num_v_heads
    qkvz, ba = torch.ops.vllm.gdn_in_proj(normed(x), qkvz_size, ba_size, _encode_layer_name(layer.name))
    return Projected(*qkvz.split([layer.conv_dim, layer.value_dim], dim=-1), *ba.chunk(2, dim=-1))


def gdn_in_proj(
    hidden_states: torch.Tensor, qkvz_size: int, ba_size: int, layer_name: LayerNameType
) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden_states [T, D] -> [q | k | v | z] [T, qkvz_size], [b | a] [T, ba_size]."""
    layer = find_layer(layer_name)
    stream = aux_stream() if hidden_states.is_cuda and use_two_streams(layer, hidden_states.shape[0]) else None
    events = layer.events() if stream is not None else (None, None)
    (qkvz, _), (ba, _) = layer.in_proj_groups
    return maybe_execute_in_parallel(lambda: qkvz(hidden_states), lambda: ba(hidden_states), *events, stream)


def use_two_streams(layer: GatedDeltaNet, tokens: int) -> bool:
    """Inside the window of tokens, while a CUDA graph is captured.

    Launched one by one, the kernels of a short prompt take longer to launch than to run, and forking adds a quarter to the launching of
    a whole layer (benchmarks/results/gdn_variants_h200.json, in_proj_eager_prompt): it would delay the first token.
    """
    if not layer.dual_stream_min <= tokens <= layer.dual_stream_max:
        return False
    return layer.two_streams_outside_graphs or torch.cuda.is_current_stream_capturing()


def gdn_in_proj_fake(
    hidden_states: torch.Tensor, qkvz_size: int, ba_size: int, layer_name: LayerNameType
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sizes are arguments because they come from the model's configuration: a repacked weight has another shape."""
    T = hidden_states.shape[0]
    return hidden_states.new_empty(T, qkvz_size), hidden_states.new_empty(T, ba_size)


IN_PROJ: dict[str, Callable[[GatedDeltaNet, torch.Tensor | Unnormed], Projected]] = {
    "serial": project_serial,
    "dual_stream": project_dual_stream,
    "fused": project_fused,
}
"""(layer, x [T, D]) -> what the projection makes of x."""


def choose_in_proj(asked: str, matrices: int, device: str) -> str:
    """Args: matrices that the parts are kept in: 1 (all together), 2 ([q k v z], [b a]) or more; the device's type.

    Raises ValueError for a variant that these matrices cannot run.
    """
    check_known("--gdn-in-proj", asked, IN_PROJ)
    if matrices > {"fused": 1, "dual_stream": 2}.get(asked, matrices):
        raise ValueError(f"--gdn-in-proj {asked} cannot run: the weights are kept in {matrices} matrices")
    if asked != "auto":
        return asked
    # benchmarks/results/gdn_variants_h200.json: one GEMM is within 2% of two streams up to 32 tokens, and ahead above and outside graphs
    if matrices == 1:
        return "fused"
    return "dual_stream" if matrices == 2 and device == "cuda" else "serial"


# Decoding rows, --gdn-decode


def decode_unpacked(layer: GatedDeltaNet, p: Projected, slots: torch.Tensor) -> torch.Tensor:
    """Four kernels and three copies: convolution; q, k, v each contiguous; gating with the recurrence; gated norm."""
    mixed_qkv = causal_conv1d_update(
        p.mixed_qkv, layer.conv_state, layer.conv1d_weight, None, "silu", conv_state_indices=slots
    )
    q, k, v = (part.contiguous()[:, None] for part in layer.split_heads(mixed_qkv))  # [S, 1, H, .]
    o, _ = fused_sigmoid_gating_delta_rule_update(
        layer.A_log,
        p.a,
        p.b,
        layer.dt_bias,
        q,
        k,
        v,
        initial_state=layer.ssm_state,
        inplace_final_state=True,
        ssm_state_indices=slots,
        use_qk_l2norm_in_kernel=True,
    )
    return layer.gated_norm(o[:, 0], p.z)


def decode_packed(layer: GatedDeltaNet, p: Projected, slots: torch.Tensor) -> torch.Tensor:
    """Three kernels: convolution; gating, l2norm and recurrence on the packed rows; gated norm."""
    mixed_qkv = causal_conv1d_update(
        p.mixed_qkv, layer.conv_state, layer.conv1d_weight, None, "silu", conv_state_indices=slots
    )
    o, _ = fused_recurrent_gated_delta_rule_packed_decode(
        mixed_qkv,
        p.a,
        p.b,
        layer.A_log,
        layer.dt_bias,
        None,
        layer.ssm_state,
        None,
        slots,
        use_qk_l2norm_in_kernel=True,
    )
    return layer.gated_norm(o[:, 0], p.z)


def decode_fused(layer: GatedDeltaNet, p: Projected, slots: torch.Tensor) -> torch.Tensor:
    """One kernel from the projection to the gated norm."""
    return fused_gdn_decode(
        p.mixed_qkv,
        p.z,
        p.a,
        p.b,
        layer.conv_state,
        layer.conv1d_weight,
        None,
        layer.A_log,
        layer.dt_bias,
        layer.norm.weight,
        layer.norm.eps,
        layer.ssm_state,
        slots,
        gate_activation=layer.norm.activation,
    )


DECODE: dict[str, Callable[[GatedDeltaNet, Projected, torch.Tensor], torch.Tensor]] = {
    "unpacked": decode_unpacked,
    "packed": decode_packed,
    "fused": decode_fused,
}
"""From convolution to gated norm, one token a row: (layer, rows, slots [S]; negative: a row of nobody) -> [S, Hv, V]."""

FUSED_MAX_ROWS = 16
"""benchmarks/results/gdn_variants_h200.json, either state dtype: the single launch wins to 16 rows, packed from 32 on."""


def decode_auto(layer: GatedDeltaNet, p: Projected, slots: torch.Tensor) -> torch.Tensor:
    """The fastest on a GPU, by rows. Variants round alike, so that a sequence may meet both."""
    return (decode_fused if slots.shape[0] <= FUSED_MAX_ROWS else decode_packed)(layer, p, slots)


def choose_decode(asked: str, kernel: int, device: str) -> str:
    """Args: taps of the convolution; the device's type. Raises ValueError for a variant that these cannot run.

    Returns "auto" where the choice is left to each batch (`decode_auto`).
    """
    check_known("--gdn-decode", asked, DECODE)
    if asked == "fused" and kernel < 2:
        raise ValueError("--gdn-decode fused needs a convolution of at least two taps")
    if asked != "auto":
        return asked
    if not envs.VLLM_ENABLE_FLA_PACKED_RECURRENT_DECODE:
        return "unpacked"
    if device != "cuda":
        return "unpacked"  # its PyTorch form goes over the states few at a time, so that they stay in the cache
    return "auto" if kernel >= 2 else "packed"


# Prompt chunks, --gdn-prefill-backend


class PrefillOps(NamedTuple):
    conv: Callable
    gating: Callable
    delta_rule: Callable


def prefill_chunked(ops: PrefillOps, layer: GatedDeltaNet, p: Projected, meta: GDNAttentionMetadata) -> torch.Tensor:
    """Convolution, gating, chunked delta rule and gated norm, from the chunks' slots (zeros at a prompt's start) and back."""
    slots, lens = meta.state_indices[meta.num_decodes :], meta.prefill_query_lens_cpu
    starts = None if lens is None else list(accumulate(lens, initial=0))
    mixed_qkv = ops.conv(
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
    g, beta = ops.gating(layer.A_log, p.a, p.b, layer.dt_bias)  # [1, T, Hv]
    o, _ = ops.delta_rule(
        q[None],
        k[None],
        v[None],
        g,
        beta,
        initial_state=layer.ssm_state,
        cu_seqlens=meta.prefill_query_start_loc,
        cu_seqlens_cpu=starts,
        chunk_indices=meta.prefill_chunk_indices,
        chunk_offsets=meta.prefill_chunk_offsets,
        ssm_state_indices=slots,
        has_initial_state=meta.prefill_has_initial_state,
        use_qk_l2norm_in_kernel=True,
    )
    return layer.gated_norm(o[0], p.z)


PREFILL: dict[str, Callable[[GatedDeltaNet, Projected, GDNAttentionMetadata], torch.Tensor]] = {
    "triton": partial(
        prefill_chunked, PrefillOps(causal_conv1d_fn_triton, fused_gdn_gating_triton, chunk_gated_delta_rule_triton)
    ),
    "torch": partial(
        prefill_chunked, PrefillOps(causal_conv1d_fn_torch, fused_gdn_gating_torch, chunk_gated_delta_rule_torch)
    ),
}
"""From convolution to gated norm over prompt chunks: (layer, rows [T tokens], the step's metadata) -> [T, Hv, V]."""


def choose_prefill(asked: str, device: str, interpreted: bool = False) -> str:
    """Args: the device's type; whether Triton interprets kernels, which then run anywhere. Raises ValueError for what cannot run."""
    check_known("--gdn-prefill-backend", asked, PREFILL)
    if asked == "triton" and device == "cpu" and not interpreted:
        raise ValueError("--gdn-prefill-backend triton needs a GPU")
    if asked != "auto":
        return asked
    return "triton" if device == "cuda" else "torch"


def check_known(flag: str, name: str, table: dict[str, Callable]) -> None:
    if name != "auto" and name not in table:
        raise ValueError(f"{flag} must be one of auto, {', '.join(table)}; got {name!r}")


# The part of the layer that keeps state, as one op: what torch.compile sees of it


def gdn_attention_core(
    mixed_qkv: torch.Tensor, z: torch.Tensor, b: torch.Tensor, a: torch.Tensor, layer_name: LayerNameType
) -> torch.Tensor:
    """`GatedDeltaNet.attend` of the named layer: -> [T, Hv*V]. Which rows belong to whom is in the forward context."""
    return find_layer(layer_name).attend(Projected(mixed_qkv, z, b, a))


def gdn_attention_core_fake(
    mixed_qkv: torch.Tensor, z: torch.Tensor, b: torch.Tensor, a: torch.Tensor, layer_name: LayerNameType
) -> torch.Tensor:
    return mixed_qkv.new_empty(z.shape)


direct_register_custom_op("gdn_in_proj", gdn_in_proj, (), gdn_in_proj_fake)
direct_register_custom_op("gdn_attention_core", gdn_attention_core, (), gdn_attention_core_fake)
