"""Mixture of experts: the router, and the experts' matrices with the ways to multiply with them."""

from vllm.model_executor.layers.fused_moe.layer import FusedMoE, SharedExpert
from vllm.model_executor.layers.fused_moe.router import topk_softmax

__all__ = ["FusedMoE", "SharedExpert", "topk_softmax"]
