"""Gated delta rule operators; the public names are in ``vllm.model_executor.layers.fla.ops``."""
