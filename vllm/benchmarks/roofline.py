"""The least that a decode step has to read and write, by component, and how near to it a measured step comes.

A step of N sequences reads every weight that any of them needs once. Of E experts, a token takes k at random, so that N tokens meet
E (1 - (1 - k/E)^N) different ones on average. Each sequence's recurrent state is read and written, and its keys and values are read.
Activations are left out: they stay in the caches.
"""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig
from vllm.entrypoints.cli import plan
from vllm.v1.core.memory_plan import DTYPE_BYTES


def distinct_experts(experts: int, chosen: int, tokens: int) -> float:
    """How many of the experts at least one of the tokens takes, on average. No experts: 0."""
    return experts * (1 - (1 - chosen / experts) ** tokens) if experts else 0.0


def step_bytes(config: VllmConfig, concurrency: int, context: float) -> dict[str, int]:
    """Bytes that one decode step moves, by component.

    Args:
        concurrency: sequences that decode.
        context: tokens that each of them holds, on average.
    """
    text, sizes = config.hf_config.text, plan.as_json(config, None)
    weights = dict(sizes["weight_bytes"])
    table = weights.pop("embeddings")
    if not weights.get("lm_head"):
        weights["lm_head"] = table  # tied: the head multiplies by the table
    share = distinct_experts(text.num_experts, text.num_experts_per_tok, concurrency) / max(text.num_experts, 1)
    weights["routed experts"] = weights.get("routed experts", 0) * share
    row = text.hidden_size * DTYPE_BYTES[config.model_config.dtype]
    moved = {
        "GDN projections": weights.pop("GDN"),
        "attention projections": weights.pop("attention"),
        **weights,
        "embeddings": concurrency * row,
        "GDN state": 2 * concurrency * sizes["state_bytes_per_sequence"],
        "KV cache": concurrency * (context + 1) * sizes["kv_bytes_per_token"],
    }
    return {name: round(count) for name, count in moved.items() if count}


def reached(moved: dict[str, int], step_ms: float, read_bytes_s: float) -> dict[str, Any]:
    """A measured step beside the memory's: {"bytes", "total", "floor_ms", "step_ms", "share", "bytes_s"}.

    Args:
        moved: of `step_bytes`.
        read_bytes_s: bandwidth that reading alone reaches on this device.
    """
    total = sum(moved.values())
    return {
        "bytes": moved,
        "total": total,
        "floor_ms": total / read_bytes_s * 1e3,
        "step_ms": step_ms,
        "share": total / read_bytes_s * 1e3 / step_ms,
        "bytes_s": total / step_ms * 1e3,
    }
