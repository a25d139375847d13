"""What the rest of the engine may assume of a model."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from vllm.config.gdn import GDNConfig
from vllm.config.hf_config import TextConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.mamba.gdn_linear_attn import GatedDeltaNet
from vllm.model_executor.layers.quantization.plan import WeightPlan


class StatefulLayers(NamedTuple):
    """Layers that keep something between steps, first to last.

    The runner sets `attention[i].kv_cache`, of `attention[i].kv_shape(...)`, and every attribute that `gdn[i].state_shapes()` names.
    """

    attention: list[Attention]
    gdn: list[GatedDeltaNet]


class CausalLM(Protocol):
    """A language model: a constructor from its configuration, two computations, and the layers whose state the runner owns."""

    def __init__(self, config: TextConfig, plan: WeightPlan, gdn_config: GDNConfig | None = None) -> None: ...

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Inside `set_forward_context`: input_ids [T] and positions [T] (or [3, T]) -> hidden [T, D] after the final norm."""

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [N, D] -> [N, vocab], in the model's dtype."""

    def stateful_layers(self) -> StatefulLayers: ...
