"""Qwen3-Next: the layers of Qwen3.5, whose GDN input projections are stored interleaved, key head by key head."""

from __future__ import annotations

from vllm.model_executor.layers.mamba.gdn_linear_attn import InProjSources, interleaved_sources
from vllm.model_executor.models.qwen3_5 import Qwen3_5ForCausalLM


class Qwen3NextForCausalLM(Qwen3_5ForCausalLM):
    in_proj_sources: InProjSources = staticmethod(interleaved_sources)
