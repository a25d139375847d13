"""Where the device's memory goes: weights, workspace, GDN slots, attention pages. Arithmetic only; torch is not imported.

Two pools of two sizes share what the weights leave over:

    slots   one a running sequence: the convolution window and the recurrent matrix of every GDN layer; any length
    pages   `block_size` tokens of keys and values of every attention layer; as many as the sequences are long

Slot 0 and page 0 are nobody's: padding rows point at them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from vllm.config.hf_config import TextConfig
from vllm.config.quantization import QuantConfig

GiB = 1 << 30

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8_e4m3": 1}

GROWTH_BYTES = 384 << 20
"""Kept back on a GPU for what comes after the pools: graphs of sampling that no measured step needed, and what the driver rounds up."""

RUNTIME_RESERVE = (640 << 20) + GROWTH_BYTES
"""An allowance for CUDA's context, loaded kernels and cuBLAS workspaces, and what is kept back; not a measurement."""

_MORE = "raise --gpu-memory-utilization (on a CPU --kv-cache-memory-bytes)"

CHUNK = 64
"""Tokens in one chunk of the chunked delta rule."""

EDITED_LOGITS = 1 << 24
"""Logits that penalties, masks and the like are applied to at once (`v1/sample/sampler.py`)."""


class MemoryPlanError(ValueError):
    """The limits asked for do not fit; the message says what would, and which flag changes it."""


@dataclass(frozen=True)
class PoolSizes:
    """What the runner allocates. Both numbers include the entry that is nobody's."""

    num_blocks: int
    num_slots: int
    bytes_per_block: int
    bytes_per_slot: int

    @property
    def kv_bytes(self) -> int:
        return self.num_blocks * self.bytes_per_block

    @property
    def state_bytes(self) -> int:
        return self.num_slots * self.bytes_per_slot


def kv_bytes_per_token(text: TextConfig, kv_dtype: str = "bfloat16") -> int:
    """Keys and values of one token in all attention layers."""
    return text.num_attention_layers * 2 * text.num_key_value_heads * text.head_dim * DTYPE_BYTES[kv_dtype]


def state_bytes_per_slot(text: TextConfig, conv_dtype: str = "bfloat16", ssm_dtype: str = "float32") -> int:
    """Convolution window [conv_dim, kernel - 1] and recurrent matrix [Hv, V, K] of all GDN layers."""
    window = text.conv_dim * (text.linear_conv_kernel_dim - 1) * DTYPE_BYTES[conv_dtype]
    matrix = (
        text.linear_num_value_heads * text.linear_value_head_dim * text.linear_key_head_dim * DTYPE_BYTES[ssm_dtype]
    )
    return text.num_gdn_layers * (window + matrix)


def plan_pools(
    text: TextConfig,
    budget_bytes: int,
    *,
    max_model_len: int,
    max_num_seqs: int,
    block_size: int = 16,
    kv_dtype: str = "bfloat16",
    conv_dtype: str = "bfloat16",
    ssm_dtype: str = "float32",
    num_gpu_blocks_override: int | None = None,
) -> PoolSizes:
    """Divide a budget: first a slot for every sequence that may run, then pages with the rest.

    There are never more pages than `max_num_seqs` sequences of `max_model_len` tokens need.
    `num_gpu_blocks_override` sets the number of pages (page 0 included) and is not held against the budget.

    Raises:
        MemoryPlanError: the slots, or the pages of one sequence of `max_model_len` tokens, do not fit.
    """
    slot = state_bytes_per_slot(text, conv_dtype, ssm_dtype)
    block = block_size * kv_bytes_per_token(text, kv_dtype)
    blocks_per_seq = -(-max_model_len // block_size)
    num_slots = 1 + max_num_seqs

    if num_gpu_blocks_override is not None:
        if num_gpu_blocks_override - 1 < blocks_per_seq:
            raise MemoryPlanError(
                f"--num-gpu-blocks-override {num_gpu_blocks_override}: one sequence of --max-model-len {max_model_len} "
                f"needs {blocks_per_seq} pages of {block_size} tokens, and one page stays unused: at least {blocks_per_seq + 1}"
            )
        return PoolSizes(num_gpu_blocks_override, num_slots, block, slot)

    left = budget_bytes - num_slots * slot
    if left < 2 * block or left < 0:
        raise MemoryPlanError(_slots_message(budget_bytes, slot, block, max_num_seqs))
    fitting = left // block - 1 if block else max_num_seqs * blocks_per_seq
    if fitting < blocks_per_seq:
        tokens = fitting * block_size
        advice = f"{tokens:,} tokens would fit: --max-model-len {tokens}"
        seqs = _slots_beside(budget_bytes, slot, block, blocks_per_seq) - 1
        if seqs >= 1:
            advice += f", or make room with --max-num-seqs {seqs} (a sequence's state takes {format_bytes(slot)})"
        raise MemoryPlanError(
            f"--max-model-len {max_model_len} needs {format_bytes((blocks_per_seq + 1) * block)} of attention pages but "
            f"{format_bytes(left)} are left; {advice}, or {_MORE}"
        )
    return PoolSizes(1 + min(fitting, max_num_seqs * blocks_per_seq), num_slots, block, slot)


def context_ceiling(
    text: TextConfig,
    budget_bytes: int,
    concurrency: int,
    *,
    block_size: int = 16,
    kv_dtype: str = "bfloat16",
    conv_dtype: str = "bfloat16",
    ssm_dtype: str = "float32",
) -> int:
    """Tokens that each of `concurrency` sequences may hold at the same time, up to what the model was made for; 0: none."""
    block = block_size * kv_bytes_per_token(text, kv_dtype)
    left = budget_bytes - (1 + concurrency) * state_bytes_per_slot(text, conv_dtype, ssm_dtype) - block
    if left < 0:
        return 0
    if not block:
        return text.max_position_embeddings
    return min(left // block // concurrency * block_size, text.max_position_embeddings)


def _slots_beside(budget: int, slot: int, block: int, blocks: int) -> int:
    """Slots that fit beside page 0 and `blocks` pages; at least 0."""
    return max((budget - (blocks + 1) * block) // slot, 0) if slot else 1


def _slots_message(budget: int, slot: int, block: int, max_num_seqs: int) -> str:
    seqs = _slots_beside(budget, slot, block, 1) - 1
    need = f"--max-num-seqs {max_num_seqs} needs {format_bytes((1 + max_num_seqs) * slot)} of GDN state ({format_bytes(slot)} a sequence)"
    have = f"{format_bytes(max(budget, 0))} are left for state and pages"
    if seqs < 1:
        return f"{need} but {have}, too little for even one sequence: use a larger GPU, or {_MORE}"
    return f"{need} but {have}; --max-num-seqs {seqs} is the most that fits, or {_MORE}"


def weight_parameters(text: TextConfig) -> dict[str, int]:
    """Parameters by component. Vision tower and MTP layer are not part of it: this version does not load them."""
    hidden, head = text.hidden_size, text.head_dim
    query = text.num_attention_heads * head
    gdn = (
        hidden * (text.conv_dim + text.value_dim + 2 * text.linear_num_value_heads)  # in_proj: q, k, v, z, b, a
        + text.conv_dim * text.linear_conv_kernel_dim
        + 2 * text.linear_num_value_heads  # A_log, dt_bias
        + text.linear_value_head_dim  # norm
        + text.value_dim * hidden  # out_proj
    )
    attention = hidden * (2 * query + 2 * text.num_key_value_heads * head) + query * hidden + 2 * head
    if text.attention_bias:
        attention += 2 * query + 2 * text.num_key_value_heads * head + hidden
    sparse = sum(text.sparse_layers)
    return {
        "embeddings": text.vocab_size * hidden,
        "lm_head": 0 if text.tie_word_embeddings else text.vocab_size * hidden,
        "GDN": text.num_gdn_layers * gdn,
        "attention": text.num_attention_layers * attention,
        "dense MLP": (text.num_hidden_layers - sparse) * 3 * hidden * text.intermediate_size,
        "routed experts": sparse * text.num_experts * 3 * hidden * text.moe_intermediate_size,
        "shared expert": sparse * 3 * hidden * text.shared_expert_intermediate_size,
        "router": sparse * hidden * (text.num_experts + 1),
        "norms": (2 * text.num_hidden_layers + 1) * hidden,
    }


def weight_bytes(text: TextConfig, dtype: str = "bfloat16", quant: QuantConfig | None = None) -> dict[str, int]:
    """Bytes by component, once everything is loaded. What a quantised linear layer takes, its format says."""
    return dict(_weight_bytes(text, dtype, quant))


@functools.lru_cache(
    maxsize=8
)  # tables of plans ask for the same again and again, and lists of ignored modules are long
def _weight_bytes(text: TextConfig, dtype: str, quant: QuantConfig | None) -> dict[str, int]:
    parameters = weight_parameters(text)
    total = {name: count * DTYPE_BYTES[dtype] for name, count in parameters.items()}
    # A_log, dt_bias and the gated norm stay in float32.
    small = text.num_gdn_layers * (2 * text.linear_num_value_heads + text.linear_value_head_dim)
    total["GDN"] += small * (DTYPE_BYTES["float32"] - DTYPE_BYTES[dtype])
    if quant is None:
        return total

    def save(component: str, module: str, rows: int, columns: int, count: int = 1) -> None:
        if form := quant.format_of(module):
            total[component] -= count * (rows * columns * DTYPE_BYTES[dtype] - form.matrix_bytes(rows, columns))

    for i, (kind, sparse) in enumerate(zip(text.layer_types, text.sparse_layers)):
        for component, module, *shape in _linear_layers(text, kind, sparse):
            save(component, f"model.layers.{i}.{module}", *shape)
    if parameters["lm_head"]:
        save("lm_head", "lm_head", text.vocab_size, text.hidden_size)
    return total


def _linear_layers(text: TextConfig, kind: str, sparse: bool) -> list[tuple[str, str, int, int, int]]:
    """(component, module name inside the layer, outputs, inputs, how many) of one decoder layer, as checkpoints name them."""
    hidden, head = text.hidden_size, text.head_dim
    query, kv = text.num_attention_heads * head, text.num_key_value_heads * head
    if kind == "linear_attention":
        z, heads = text.value_dim, text.linear_num_value_heads
        if text.model_type == "qwen3_next":
            sizes = {"qkvz": text.conv_dim + z, "ba": 2 * heads}
        else:
            sizes = {"qkv": text.conv_dim, "z": z, "b": heads, "a": heads}
        found = [("GDN", f"linear_attn.in_proj_{name}", size, hidden, 1) for name, size in sizes.items()]
        found.append(("GDN", "linear_attn.out_proj", hidden, text.value_dim, 1))
    else:
        sizes = {"q": 2 * query, "k": kv, "v": kv}
        found = [("attention", f"self_attn.{x}_proj", size, hidden, 1) for x, size in sizes.items()]
        found.append(("attention", "self_attn.o_proj", hidden, query, 1))

    def swiglu(component: str, module: str, inner: int, count: int = 1) -> list[tuple[str, str, int, int, int]]:
        up = [(component, f"{module}.{part}", inner, hidden, count) for part in ("gate_proj", "up_proj")]
        return [*up, (component, f"{module}.down_proj", hidden, inner, count)]

    if not sparse:
        return found + swiglu("dense MLP", "mlp", text.intermediate_size)
    # experts are alike: the first one's answer counts for all
    found += swiglu("routed experts", "mlp.experts.0", text.moe_intermediate_size, text.num_experts)
    found += swiglu("shared expert", "mlp.shared_expert", text.shared_expert_intermediate_size)
    found.append(("router", "mlp.gate", text.num_experts, hidden, 1))
    return [*found, ("router", "mlp.shared_expert_gate", 1, hidden, 1)]


def workspace_bytes(
    text: TextConfig,
    *,
    max_num_batched_tokens: int = 4096,
    max_num_seqs: int = 256,
    dtype: str = "bfloat16",
    quant: QuantConfig | None = None,
) -> int:
    """The most that activations take during one step, somewhat pessimistic; the engine measures it where there is a GPU.

    T tokens of S prompts run through one part of one layer at a time, with or without a CUDA graph in the same memory, so beside the residual
    the largest part counts:

        residual     4 T D                     hidden state, residual, normed input, the part's output
        GDN          T (2 conv_dim + 3 Hv V)   projected, convolved, and z, delta-rule output, gated output
                     T Hv K                    the chunks' product w
                     (T / 64 + S) Hv V K       one recurrent matrix a chunk; at the most T chunks
        attention    T (3 H + 2 Hkv) 256       query, gate, output, keys, values
        MoE          T k (3 I + D)             gate, up, their product, down, for each of the k chosen experts
                     T E 12                    router logits and probabilities in fp32, sort keys
        dense        T 3 I
        logits       S vocab                   and 16 bytes each of 2^24 of them, which are edited at once
        weight       N K                       a quantised weight, dequantised for many tokens
    """
    tokens, size = max_num_batched_tokens, DTYPE_BYTES[dtype]
    heads, key, value = text.linear_num_value_heads, text.linear_key_head_dim, text.linear_value_head_dim
    residual = 4 * tokens * text.hidden_size * size
    gdn = tokens * (2 * text.conv_dim + 3 * text.value_dim + heads * key) * size
    chunks = min(tokens, -(-tokens // CHUNK) + max_num_seqs - 1)
    gdn += chunks * heads * value * key * size
    attention = tokens * (3 * text.num_attention_heads + 2 * text.num_key_value_heads) * text.head_dim * size
    experts = tokens * text.num_experts_per_tok * (3 * text.moe_intermediate_size + text.hidden_size) * size
    experts += tokens * text.num_experts * 12 + 3 * tokens * text.shared_expert_intermediate_size * size
    dense = 0 if all(text.sparse_layers) else 3 * tokens * text.intermediate_size * size
    edited = min(max_num_seqs * text.vocab_size, EDITED_LOGITS)
    logits = max_num_seqs * text.vocab_size * size + 16 * edited
    return residual + max(gdn, attention, experts, dense, logits) + _largest_quantised(text, quant) * size


@functools.lru_cache(maxsize=8)
def _largest_quantised(text: TextConfig, quant: QuantConfig | None) -> int:
    """Elements of the largest quantised linear layer, experts aside: those are multiplied as they are."""
    layers = enumerate(zip(text.layer_types, text.sparse_layers)) if quant else ()
    sizes: dict[tuple[int, str, bool], int] = {}
    for i, kind in layers:
        for component, module, rows, columns, _ in _linear_layers(text, *kind):
            if component != "routed experts" and quant.format_of(f"model.layers.{i}.{module}"):
                part = i, component, module.endswith(("out_proj", "o_proj", "down_proj"))  # all others are one matrix
                sizes[part] = sizes.get(part, 0) + rows * columns
    return max(sizes.values(), default=0)


@dataclass(frozen=True)
class MemoryPlan:
    """One device's memory, divided. `pools` is None where the limits do not fit; then `problem` says why."""

    device_bytes: int
    utilization: float
    weights: dict[str, int]
    workspace: int
    budget: int  # what is left for slots and pages; negative where the weights alone are too large
    max_model_len: int
    max_num_seqs: int
    block_size: int
    pools: PoolSizes | None
    problem: str | None

    @property
    def weight_total(self) -> int:
        return sum(self.weights.values())

    def describe(self) -> str:
        """A few lines a person can read."""
        lines = [
            f"{format_bytes(self.device_bytes)} x {self.utilization:g} = {format_bytes(int(self.device_bytes * self.utilization))}: "
            f"weights {format_bytes(self.weight_total)}, workspace {format_bytes(self.workspace)}, runtime {format_bytes(RUNTIME_RESERVE)}, "
            f"left for state and pages {format_bytes(max(self.budget, 0))}"
        ]
        if self.pools is None:
            return "\n".join([*lines, self.problem or ""])
        tokens = (self.pools.num_blocks - 1) * self.block_size
        lines += [
            f"GDN state: {format_bytes(self.pools.state_bytes)} in {self.pools.num_slots} slots of {format_bytes(self.pools.bytes_per_slot)}",
            f"KV pages:  {format_bytes(self.pools.kv_bytes)} in {self.pools.num_blocks:,} pages, {tokens:,} tokens: "
            f"{tokens / self.max_model_len:.1f} sequences of {self.max_model_len:,}",
        ]
        return "\n".join(lines)


def plan(
    text: TextConfig,
    *,
    device_bytes: int,
    utilization: float,
    max_model_len: int,
    max_num_seqs: int,
    max_num_batched_tokens: int = 4096,
    block_size: int = 16,
    dtype: str = "bfloat16",
    kv_dtype: str = "bfloat16",
    conv_dtype: str = "bfloat16",
    ssm_dtype: str = "float32",
    quant: QuantConfig | None = None,
    kv_cache_memory_bytes: int | None = None,
    num_gpu_blocks_override: int | None = None,
) -> MemoryPlan:
    """Plan a device without touching it. Limits that do not fit come back as `MemoryPlan.problem`, not as an exception."""
    weights = weight_bytes(text, dtype, quant)
    workspace = workspace_bytes(
        text,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=max_num_seqs,
        dtype=dtype,
        quant=quant,
    )
    budget = kv_cache_memory_bytes
    if budget is None:
        budget = int(device_bytes * utilization) - sum(weights.values()) - workspace - RUNTIME_RESERVE
    pools, problem = None, None
    if budget <= 0:
        problem = (
            f"weights ({format_bytes(sum(weights.values()))}), workspace and runtime leave nothing of {format_bytes(device_bytes)} x {utilization:g} "
            "for state and pages: use a larger GPU, a quantised checkpoint, or raise --gpu-memory-utilization"
        )
    else:
        try:
            pools = plan_pools(
                text,
                budget,
                max_model_len=max_model_len,
                max_num_seqs=max_num_seqs,
                block_size=block_size,
                kv_dtype=kv_dtype,
                conv_dtype=conv_dtype,
                ssm_dtype=ssm_dtype,
                num_gpu_blocks_override=num_gpu_blocks_override,
            )
        except MemoryPlanError as error:
            problem = str(error)
    return MemoryPlan(
        device_bytes, utilization, weights, workspace, budget, max_model_len, max_num_seqs, block_size, pools, problem
    )


def format_bytes(count: int) -> str:
    """1536 -> "1.5 KiB"."""
    for unit, name in ((GiB, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if abs(count) >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} B"
