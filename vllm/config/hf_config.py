"""config.json as a typed, checked value: the layouts Qwen3.5 dense, Qwen3.5-MoE (3.6 uses both) and Qwen3-Next.

transformers has classes for these, but importing them takes seconds, and they fill a missing key with a default that no
published model has (rope_theta 10000, 32768 positions). Here a key that decides the model's output must be there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TextConfig:
    """The language model's shape; names follow config.json."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    layer_types: tuple[str, ...]  # "linear_attention" or "full_attention", one a layer
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    torch_dtype: str  # "bfloat16", ...
    # attention
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary_dim: int  # leading dims of a head that RoPE turns
    rope_theta: float
    mrope_section: tuple[int, ...]  # () for plain one-dimensional RoPE
    # GDN
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    mamba_ssm_dtype: str
    output_gate_type: str  # "silu" or "sigmoid"
    # feed-forward
    intermediate_size: int  # dense layers
    num_experts: int  # 0: dense
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    sparse_layers: tuple[bool, ...]  # layer i has experts
    mtp_num_hidden_layers: int
    attention_bias: bool = False

    @property
    def conv_dim(self) -> int:
        """Channels of the causal convolution: [q | k | v]."""
        return 2 * self.key_dim + self.value_dim

    @property
    def value_dim(self) -> int:
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def key_dim(self) -> int:
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def num_gdn_layers(self) -> int:
        return sum(t == "linear_attention" for t in self.layer_types)

    @property
    def num_attention_layers(self) -> int:
        return self.num_hidden_layers - self.num_gdn_layers


@dataclass(frozen=True)
class HFConfig:
    """A checkpoint's config.json: the parsed language model, and what else the engine needs of it."""

    architecture: str
    text: TextConfig
    has_vision: bool
    eos_token_ids: tuple[int, ...]
    quantization: dict[str, Any] | None = None  # quantization_config, verbatim
    raw: dict[str, Any] = field(default_factory=dict, repr=False)  # the whole config.json, overrides merged in


ARCHITECTURES = {
    "Qwen3_5ForConditionalGeneration": "qwen3_5_text",
    "Qwen3_5ForCausalLM": "qwen3_5_text",
    "Qwen3_5MoeForConditionalGeneration": "qwen3_5_moe_text",
    "Qwen3_5MoeForCausalLM": "qwen3_5_moe_text",
    "Qwen3NextForCausalLM": "qwen3_next",
}
"""Architecture -> TextConfig.model_type."""

# Keys that are read though a config.json may lack them: what --hf-overrides may add.
_OUTER = {"architectures", "dtype", "eos_token_id", "quantization_config", "tie_word_embeddings", "torch_dtype"}
_OPTIONAL = {
    *TextConfig.__dataclass_fields__,
    *("dtype", "eos_token_id", "full_attention_interval", "rope_parameters", "rope_scaling", "partial_rotary_factor"),
    *("decoder_sparse_step", "mlp_only_layers", "norm_topk_prob", "hidden_act", "attn_output_gate"),
}


def merge(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """A copy of `base` with `extra` laid over it, folder by folder; neither argument changes."""
    merged = dict(base)
    for key, value in extra.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def parse_hf_config(
    raw: dict[str, Any], overrides: dict[str, Any] | None = None, source: str = "config.json"
) -> HFConfig:
    """Read a config.json that is already a dict.

    Args:
        raw: the file's content; not changed.
        overrides: merged into `raw` first. Shortening `num_hidden_layers` also cuts `layer_types`.
        source: the file's name, for error messages.

    Raises:
        ValueError: in one line, the key that is missing, inconsistent or not supported, and the file.
    """
    if not isinstance(raw, dict):
        raise ValueError(f"{source}: expected a JSON object")
    if overrides:
        _check_overrides(raw, overrides, source)
        raw = _fit_layer_types(merge(raw, overrides), overrides)

    architecture = _architecture(raw, source)
    nested = isinstance(raw.get("text_config"), dict)
    keys = _Keys(raw["text_config"] if nested else raw, source, "text_config." if nested else "")
    # In the nested layout the outer value decides, as in transformers' multimodal classes.
    tied = bool(raw.get("tie_word_embeddings", keys.values.get("tie_word_embeddings", False)))
    dtype = keys.get("dtype", None) or keys.get("torch_dtype", None) or raw.get("dtype") or raw.get("torch_dtype")

    text = TextConfig(
        model_type=ARCHITECTURES[architecture],
        vocab_size=keys.count("vocab_size"),
        hidden_size=keys.count("hidden_size"),
        num_hidden_layers=keys.count("num_hidden_layers"),
        layer_types=_layer_types(keys),
        max_position_embeddings=keys.count("max_position_embeddings"),
        rms_norm_eps=float(keys.get("rms_norm_eps", 1e-6)),
        tie_word_embeddings=tied,
        torch_dtype=_dtype_name(dtype or "bfloat16", "dtype", source),
        num_attention_heads=keys.count("num_attention_heads"),
        num_key_value_heads=keys.count("num_key_value_heads"),
        head_dim=keys.count("head_dim", 256),
        **_rope(keys),
        linear_num_key_heads=keys.count("linear_num_key_heads"),
        linear_num_value_heads=keys.count("linear_num_value_heads"),
        linear_key_head_dim=keys.count("linear_key_head_dim"),
        linear_value_head_dim=keys.count("linear_value_head_dim"),
        linear_conv_kernel_dim=keys.count("linear_conv_kernel_dim", 4),
        mamba_ssm_dtype=_dtype_name(keys.get("mamba_ssm_dtype", "float32"), "mamba_ssm_dtype", source),
        output_gate_type=_output_gate(keys),
        **_feed_forward(keys, ARCHITECTURES[architecture]),
        mtp_num_hidden_layers=keys.count("mtp_num_hidden_layers", 0, least=0),
        attention_bias=bool(keys.get("attention_bias", False)),
    )
    _check_shapes(text, keys)
    return HFConfig(
        architecture=architecture,
        text=text,
        has_vision=isinstance(raw.get("vision_config"), dict),
        eos_token_ids=_token_ids(keys.get("eos_token_id", None)) or _token_ids(raw.get("eos_token_id")),
        quantization=raw.get("quantization_config") or raw.get("compression_config") or None,
        raw=raw,
    )


class _Keys:
    """The language model's part of config.json, with errors that name the key and the file."""

    def __init__(self, values: dict[str, Any], source: str, prefix: str):
        self.values, self.source, self.prefix = values, source, prefix

    def error(self, key: str, what: str) -> ValueError:
        return ValueError(f"{self.source}: {self.prefix}{key} {what}")

    def get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    def count(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = self.get(key, default)
        if value is None:
            raise self.error(key, "is missing")
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.error(key, f"must be an integer of at least {least}; got {value!r}")
        return value


def _architecture(raw: dict[str, Any], source: str) -> str:
    names = raw.get("architectures")
    if not isinstance(names, list) or not names:
        raise ValueError(f"{source}: architectures is missing")
    for name in names:
        if name in ARCHITECTURES:
            return name
    raise ValueError(f"{source}: architectures {names} is not supported; this server runs {', '.join(ARCHITECTURES)}")


def _check_overrides(raw: dict[str, Any], overrides: dict[str, Any], source: str) -> None:
    """An override that changes nothing, because its key is read nowhere, is a typing error: say so."""
    nested = isinstance(raw.get("text_config"), dict)
    for key in overrides:
        if key in raw or key in _OUTER:
            continue
        if nested and key in _OPTIONAL:
            raise ValueError(
                f"--hf-overrides.{key}: {source} keeps it in text_config; use --hf-overrides.text_config.{key}"
            )
        if key not in _OPTIONAL:
            raise ValueError(f"--hf-overrides.{key}: {source} has no such key, and nothing would read it")
    inner = overrides.get("text_config")
    if nested and isinstance(inner, dict):
        for key in inner:
            if key not in raw["text_config"] and key not in _OPTIONAL:
                raise ValueError(
                    f"--hf-overrides.text_config.{key}: {source} has no such key, and nothing would read it"
                )


def _fit_layer_types(raw: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Where only the number of layers was overridden, the first layers are meant."""
    nested = isinstance(raw.get("text_config"), dict)
    text = raw["text_config"] if nested else raw
    given = overrides.get("text_config", {}) if nested else overrides
    types, layers = text.get("layer_types"), text.get("num_hidden_layers")
    if "num_hidden_layers" not in given or "layer_types" in given or not isinstance(types, list):
        return raw
    if not isinstance(layers, int) or len(types) <= layers:
        return raw
    text = {**text, "layer_types": types[:layers]}
    return {**raw, "text_config": text} if nested else text


def _layer_types(keys: _Keys) -> tuple[str, ...]:
    layers = keys.count("num_hidden_layers")
    types = keys.get("layer_types", None)
    if types is None:
        interval = keys.count("full_attention_interval", 4)
        types = ["linear_attention" if (i + 1) % interval else "full_attention" for i in range(layers)]
    if len(types) != layers:
        raise keys.error("layer_types", f"names {len(types)} layers, but num_hidden_layers is {layers}")
    for name in types:
        if name not in ("linear_attention", "full_attention"):
            raise keys.error("layer_types", f"holds {name!r}; expected linear_attention or full_attention")
    return tuple(types)


def _rope(keys: _Keys) -> dict[str, Any]:
    """rope_parameters (transformers 5), or rope_scaling and flat keys beside it (transformers 4)."""
    rope = keys.get("rope_parameters", None) or keys.get("rope_scaling", None) or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise keys.error("rope_parameters", f"has rope_type {kind!r}; only default is supported")
    theta = rope.get("rope_theta", keys.get("rope_theta", None))
    if theta is None:
        raise keys.error("rope_parameters.rope_theta", "is missing (published models of this family have 10000000)")
    head_dim = keys.count("head_dim", 256)
    rotary_dim = int(head_dim * rope.get("partial_rotary_factor", keys.get("partial_rotary_factor", 0.25)))
    section = tuple(rope.get("mrope_section") or ())
    if rotary_dim < 2 or rotary_dim % 2 or rotary_dim > head_dim:
        raise keys.error(
            "partial_rotary_factor", f"turns {rotary_dim} of {head_dim} dims; expected an even number of them"
        )
    if section and (len(section) != 3 or sum(section) != rotary_dim // 2):
        raise keys.error(
            "rope_parameters.mrope_section", f"{list(section)} must be three numbers that add up to {rotary_dim // 2}"
        )
    if section and rope.get("mrope_interleaved") is False:
        raise keys.error("rope_parameters.mrope_interleaved", "is false; only the interleaved form is supported")
    return {"rotary_dim": rotary_dim, "rope_theta": float(theta), "mrope_section": section}


def _output_gate(keys: _Keys) -> str:
    gate = {"swish": "silu"}.get(keys.get("output_gate_type", "silu"), keys.get("output_gate_type", "silu"))
    if gate not in ("silu", "sigmoid"):
        raise keys.error("output_gate_type", f"must be silu, swish or sigmoid; got {gate!r}")
    return gate


def _feed_forward(keys: _Keys, model_type: str) -> dict[str, Any]:
    layers = keys.count("num_hidden_layers")
    if model_type == "qwen3_5_text":
        return {
            "intermediate_size": keys.count("intermediate_size"),
            "num_experts": 0,
            "num_experts_per_tok": 0,
            "moe_intermediate_size": 0,
            "shared_expert_intermediate_size": 0,
            "sparse_layers": (False,) * layers,
        }
    if keys.get("norm_topk_prob", True) is not True:
        raise keys.error("norm_topk_prob", "is false; only renormalised expert weights are supported")
    sparse = (True,) * layers
    if model_type == "qwen3_next":  # only Next's network reads these two keys
        step, dense = keys.count("decoder_sparse_step", 1), keys.get("mlp_only_layers", [])
        sparse = tuple((i + 1) % step == 0 and i not in dense for i in range(layers))
    experts, top_k = keys.count("num_experts"), keys.count("num_experts_per_tok")
    if top_k > experts:
        raise keys.error("num_experts_per_tok", f"is {top_k}, more than num_experts {experts}")
    return {
        "intermediate_size": keys.get("intermediate_size", 0) if all(sparse) else keys.count("intermediate_size"),
        "num_experts": experts,
        "num_experts_per_tok": top_k,
        "moe_intermediate_size": keys.count("moe_intermediate_size"),
        "shared_expert_intermediate_size": keys.count("shared_expert_intermediate_size"),
        "sparse_layers": sparse,
    }


def _check_shapes(text: TextConfig, keys: _Keys) -> None:
    if text.num_attention_heads % text.num_key_value_heads:
        raise keys.error(
            "num_attention_heads",
            f"{text.num_attention_heads} is not a multiple of num_key_value_heads {text.num_key_value_heads}",
        )
    if text.linear_num_value_heads % text.linear_num_key_heads:
        raise keys.error(
            "linear_num_value_heads",
            f"{text.linear_num_value_heads} is not a multiple of linear_num_key_heads {text.linear_num_key_heads}",
        )
    if keys.get("hidden_act", "silu") not in ("silu", "swish"):
        raise keys.error("hidden_act", f"is {keys.get('hidden_act', None)!r}; only silu is supported")
    if keys.get("attn_output_gate", True) is not True:
        raise keys.error("attn_output_gate", "is false; only gated attention is supported")


def _dtype_name(value: Any, key: str, source: str) -> str:
    name = str(value).removeprefix("torch.")
    if name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"{source}: {key} must be bfloat16, float16 or float32; got {value!r}")
    return name


def _token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)
