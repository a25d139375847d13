"""The Gated DeltaNet layer: project -> convolve -> gate -> delta rule -> gated norm -> output projection.

Each value head keeps a matrix S that maps keys to values. A token first lets S fade (gate g), then replaces what S answers to its key by
its value (strength beta), then asks S its query:

    S <- e^g S,  S <- S + beta (v - S k) kᵀ,  o = S q

q, k and v pass a causal convolution over the last four tokens; q and k are normalised to unit length. Source: "Gated Delta Networks",
Yang, Kautz, Hatamizadeh, arXiv 2412.06464; layout of heads and projections: Qwen3-Next and Qwen3.5. docs/gdn.md derives the rest.

A step's rows are decoding sequences (one token each), then prompt chunks. Both kinds share the projections; in between, decoding rows
update their slots in place, and prompt chunks go through the chunked forms.

Stages that users compare have named variants (gdn_variants.py), all on the same weights: the layer holds the chosen ones, and
`set_variants` changes them between two steps.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
from torch import nn

from vllm.config.gdn import GDNConfig
from vllm.config.hf_config import TextConfig
from vllm.distributed.parallel_state import get_tensor_parallel_group
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.layernorm import RMSNormGated
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    RowParallelLinear,
    plain_plan,
    sources_of_parts,
)
from vllm.model_executor.layers.mamba.gdn_sources import (
    ONE,
    TWO,
    InProjSources,
    choose_layout,
    interleaved_sources,
    separate_sources,
)
from vllm.model_executor.layers.mamba.gdn_variants import (
    DECODE,
    IN_PROJ,
    PREFILL,
    Projected,
    Variants,
    choose_decode,
    choose_in_proj,
    choose_prefill,
    decode_auto,
    project_serial,
)
from vllm.model_executor.layers.ops.rms_norm import Unnormed
from vllm.model_executor.layers.quantization.base import take_rows
from vllm.model_executor.layers.quantization.plan import WeightPlan
from vllm.model_executor.parameter import Slot, empty_parameter
from vllm.utils.torch_utils import _encode_layer_name, register_layer

logger = init_logger(__name__)


class GatedDeltaNet(nn.Module):
    """One Gated DeltaNet layer.

    One matrix is loaded, in_proj [q | k | v | z | b | a]; variants that multiply parts of it use row views. Where a checkpoint stores
    the parts in different formats, or adapters attach to them, they stay in two matrices or three.

    Args:
        prefix: "model.layers.0.linear_attn".
        in_proj_sources: how the checkpoint names the input projection's rows.
        gdn_config: variants of the stages.

    Attributes, set by the runner before the first forward (`make_state`); slot 0 belongs to nobody:
        conv_state: [slots, conv_dim, kernel - 1], the last inputs of the convolution, oldest first.
        ssm_state: [slots, Hv, V, K], float32 or bfloat16.

    Attributes for measuring: variants (in force); two_streams_outside_graphs (False: see `use_two_streams`).
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
        self.name = register_layer(prefix, self)
        self.num_k_heads = group.share(config.linear_num_key_heads, f"{prefix}: key heads")
        self.num_v_heads = group.share(config.linear_num_value_heads, f"{prefix}: value heads")
        self.head_k_dim, self.head_v_dim = config.linear_key_head_dim, config.linear_value_head_dim
        self.key_dim, self.value_dim = self.num_k_heads * self.head_k_dim, self.num_v_heads * self.head_v_dim
        self.conv_dim, self.kernel = 2 * self.key_dim + self.value_dim, config.linear_conv_kernel_dim
        self._conv_parts = {"q": config.key_dim, "k": config.key_dim, "v": config.value_dim}

        self._build_in_proj(config, plan, in_proj_sources, gdn_config.separate_in_proj)
        self.conv1d_taps = empty_parameter(self.kernel, self.conv_dim, dtype=plan.dtype)
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
        self.conv_state: torch.Tensor | None = None
        self.ssm_state: torch.Tensor | None = None
        self.dual_stream_min, self.dual_stream_max = (
            gdn_config.gdn_dual_stream_min_tokens,
            gdn_config.gdn_dual_stream_max_tokens,
        )
        self.two_streams_outside_graphs = False
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        self._asked = Variants(gdn_config.gdn_in_proj, gdn_config.gdn_decode, gdn_config.gdn_prefill_backend)
        device = self.A_log.device.type
        self._choose_at_start("meta" if device == "cpu" else device)  # what is built on a CPU may still move

    def _build_in_proj(
        self, config: TextConfig, plan: WeightPlan, in_proj_sources: InProjSources, separate: bool
    ) -> None:
        """Sets the modules, `in_proj` (None where the parts are apart), and `in_proj_groups`, what `serial` multiplies."""
        heads = config.linear_num_value_heads
        sizes = {**self._conv_parts, "z": config.value_dim, "b": heads, "a": heads}
        modules, self._apart_because = choose_layout(
            in_proj_sources, sizes, config, self.prefix, self.group, plan, separate
        )
        for name, parts in modules.items():
            full = {part: sizes[part] for part in parts}
            sources = in_proj_sources(full, config, self.prefix, self.group)
            linear = MergedColumnParallelLinear(
                config.hidden_size, full, prefix=self.prefix, sources=sources, plan=plan
            )
            setattr(self, name, linear)
        widths = {
            ("q", "k", "v"): self.conv_dim,
            ("z",): self.value_dim,
            ("b",): self.num_v_heads,
            ("a",): self.num_v_heads,
        }
        outputs = lambda parts: [width for names, width in widths.items() if names[0] in parts]
        if modules is ONE:
            rows = self.in_proj.rows
            run = lambda parts: RowsOf(self.in_proj, slice(rows[parts[0]].start, rows[parts[-1]].stop))
            self.in_proj_groups = [(run(parts), outputs(parts)) for parts in TWO.values()]
        else:
            self.in_proj = None
            self.in_proj_groups = [(getattr(self, name), outputs(parts)) for name, parts in modules.items()]
        self._matrices = len(modules)

    # Variants

    @property
    def variants(self) -> Variants:
        """Those in force."""
        return self._variants

    def choose_variants(
        self,
        in_proj: str | None = None,
        decode: str | None = None,
        prefill: str | None = None,
        device: str | None = None,
    ) -> Variants:
        """What `set_variants` would put in force. Raises ValueError for a name that is unknown or cannot run here."""
        device, now = device or self.A_log.device.type, self._variants
        interpreted = bool(triton.knobs.runtime.interpret)
        return Variants(
            now.in_proj if in_proj is None else choose_in_proj(in_proj, self._matrices, device),
            now.decode if decode is None else choose_decode(decode, self.kernel, device),
            now.prefill if prefill is None else choose_prefill(prefill, device, interpreted),
        )

    def set_variants(
        self, in_proj: str | None = None, decode: str | None = None, prefill: str | None = None
    ) -> Variants:
        """Change stages from the next forward on; None leaves one as it is, "auto" lets the rules choose.

        Every variant works on the same weights and states, so it may change between two steps of a sequence. Returns those in force.

        Raises:
            ValueError: a name is unknown (the message lists the known ones) or cannot run here. Nothing has changed then.
        """
        return self._put_in_force(self.choose_variants(in_proj, decode, prefill))

    def _put_in_force(self, chosen: Variants) -> Variants:
        self._variants, self.project, self.prefill = chosen, IN_PROJ[chosen.in_proj], PREFILL[chosen.prefill]
        self.decode = decode_auto if chosen.decode == "auto" else DECODE[chosen.decode]
        return chosen

    def _choose_at_start(self, device: str) -> str:
        """Put in force what the flags ask for. An input projection that the weights do not allow gives way; returns why."""
        self._variants, asked, because = Variants("serial", "unpacked", "torch"), self._asked, self._apart_because
        try:
            choose_in_proj(asked.in_proj, self._matrices, device)
        except ValueError as error:
            asked, because = asked._replace(in_proj="auto"), f"{because}; {error}"
        self._put_in_force(self.choose_variants(*asked, device=device))
        return because

    def process_weights_after_loading(self) -> None:
        """The weights are on their device now, and auto means what is best there."""
        because = self._choose_at_start(self.A_log.device.type)
        in_proj, decode, prefill = self.variants
        because = f" ({because})" if because else ""
        logger.info_once("GDN layers: in_proj %s%s, decode %s, prefill %s", in_proj, because, decode, prefill)

    # Computation

    def forward(self, x: torch.Tensor | Unnormed, add_to: torch.Tensor | None = None) -> torch.Tensor | None:
        """x [T, D] -> [T, D], or added to `add_to`. Padding rows come out finite and leave every state alone."""
        projected = self.project(self, x)
        if torch.compiler.is_compiling():
            o = torch.ops.vllm.gdn_attention_core(*projected, _encode_layer_name(self.name))
        else:
            o = self.attend(projected)  # [T, Hv*V]
        return self.out_proj(o, add_to)

    def attend(self, p: Projected) -> torch.Tensor:
        """Convolution, gates, delta rule and gated norm of decoding rows and of prompt chunks, [T, Hv*V] together."""
        meta = get_forward_context().gdn
        T, d = p.mixed_qkv.shape[0], meta.num_decodes
        end = d + meta.num_prefill_tokens
        if d == T:
            return self.decode(self, p, meta.state_indices[:d]).flatten(1)
        parts = [self.decode(self, Projected(*(x[:d] for x in p)), meta.state_indices[:d])] if d else []
        if end > d:
            parts.append(self.prefill(self, Projected(*(x[d:end] for x in p)), meta))
        if end < T:
            parts.append(p.z.new_zeros(T - end, self.num_v_heads, self.head_v_dim))
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(1)

    def split_heads(self, mixed_qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[T, 2*Hk*K + Hv*V] -> views q, k [T, Hk, K], v [T, Hv, V]."""
        q, k, v = mixed_qkv.split([self.key_dim, self.key_dim, self.value_dim], dim=-1)
        return (
            q.unflatten(-1, (self.num_k_heads, self.head_k_dim)),
            k.unflatten(-1, (self.num_k_heads, self.head_k_dim)),
            v.unflatten(-1, (self.num_v_heads, self.head_v_dim)),
        )

    def gated_norm(self, o: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """o [T, Hv, V], z [T, Hv*V] -> [T, Hv, V]."""
        return self.norm(o, z.unflatten(-1, (self.num_v_heads, self.head_v_dim)))

    def events(self) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        """Fork and join of this layer's two streams, made when first used. They order work and need no clock."""
        if self._events is None:
            self._events = (torch.cuda.Event(enable_timing=False), torch.cuda.Event(enable_timing=False))
        return self._events

    # Weights and state

    @property
    def conv1d_weight(self) -> torch.Tensor:
        """[conv_dim, kernel], a view: in memory channels lie side by side, as the convolution's kernels read them."""
        return self.conv1d_taps.T

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Attribute -> shape of one slot. `conv_state` is in the activations' dtype, `ssm_state` in the recurrent state's."""
        return {
            "conv_state": (self.conv_dim, self.kernel - 1),
            "ssm_state": (self.num_v_heads, self.head_v_dim, self.head_k_dim),
        }

    def make_state(self, name: str, slots: int, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
        """A pool [slots, *shape of one slot] of zeros. Windows lie in memory as [slots, kernel - 1, conv_dim], channels side by side."""
        shape = self.state_shapes()[name]
        if name == "conv_state":
            return torch.zeros(slots, *reversed(shape), dtype=dtype, device=device).transpose(1, 2)
        return torch.zeros(slots, *shape, dtype=dtype, device=device)

    def checkpoint_slots(self) -> Iterator[Slot]:
        conv = sources_of_parts(self._conv_parts, {"conv1d": ("q", "k", "v")}, self.prefix, self.group)[0]
        yield Slot(
            f"{conv.name}.weight",
            (conv.rows, 1, self.kernel),
            self.conv1d_taps,
            transform=lambda w: take_rows(w.squeeze(1), conv.take).T,
        )
        heads = slice(self.group.rank * self.num_v_heads, (self.group.rank + 1) * self.num_v_heads)
        for name in ("A_log", "dt_bias"):
            shape = (self.num_v_heads * self.group.size,)
            yield Slot(f"{self.prefix}.{name}", shape, getattr(self, name), transform=lambda w: w[heads])

    def fill_dummy(self, generator: torch.Generator) -> None:
        self.conv1d_taps.normal_(0.0, 0.5, generator=generator)
        self.A_log.uniform_(-1.0, 2.5, generator=generator)  # decay rates of 0.4 to 12
        self.dt_bias.uniform_(-5.0, -1.0, generator=generator)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_events": None}  # a copy makes its own

    def __setstate__(self, state: dict) -> None:
        """A copy is a layer of its own, and the ops must not find the original under its name."""
        super().__setstate__(state)
        self.name = register_layer(self.prefix, self)


class RowsOf:
    """A run of another linear layer's outputs, with its weights: not a module, it owns nothing."""

    def __init__(self, linear: MergedColumnParallelLinear, rows: slice) -> None:
        self.linear, self.rows = linear, rows

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, D] -> [T, rows]."""
        return self.linear(x, self.rows)


def set_gdn_variants(
    model: nn.Module, in_proj: str | None = None, decode: str | None = None, prefill: str | None = None
) -> Variants | None:
    """`GatedDeltaNet.set_variants` of every GDN layer, or of none where one refuses. None for a model without such layers.

    What was captured in a CUDA graph stays as captured: key graphs by the variants that this returns.
    """
    layers = [module for module in model.modules() if isinstance(module, GatedDeltaNet)]
    for layer in layers:
        layer.choose_variants(in_proj, decode, prefill)
    chosen = [layer.set_variants(in_proj, decode, prefill) for layer in layers]
    return chosen[0] if chosen else None


__all__ = [
    "DECODE",
    "IN_PROJ",
    "PREFILL",
    "GatedDeltaNet",
    "InProjSources",
    "Projected",
    "RowsOf",
    "Variants",
    "interleaved_sources",
    "project_serial",
    "separate_sources",
    "set_gdn_variants",
]
