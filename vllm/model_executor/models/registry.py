"""Architecture names of config.json -> model classes, imported when asked for."""

from __future__ import annotations

from importlib import import_module

from torch import nn

ARCHITECTURES: dict[str, tuple[str, str]] = {
    "Qwen3_5ForCausalLM": ("qwen3_5", "Qwen3_5ForCausalLM"),
    "Qwen3_5ForConditionalGeneration": ("qwen3_5", "Qwen3_5ForCausalLM"),
    "Qwen3_5MoeForCausalLM": ("qwen3_5", "Qwen3_5ForCausalLM"),
    "Qwen3_5MoeForConditionalGeneration": ("qwen3_5", "Qwen3_5ForCausalLM"),
    "Qwen3NextForCausalLM": ("qwen3_next", "Qwen3NextForCausalLM"),
}


def model_class(architecture: str) -> type[nn.Module]:
    """The class of an architecture. Raises ValueError, naming those there are, for any other."""
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture {architecture!r} is not supported; supported: {', '.join(ARCHITECTURES)}")
    module, name = ARCHITECTURES[architecture]
    return getattr(import_module(f"vllm.model_executor.models.{module}"), name)
