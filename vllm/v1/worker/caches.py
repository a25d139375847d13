"""The memory of both pools, and which part of it each layer works on."""

from __future__ import annotations

import torch

from vllm.config.cache import CacheConfig
from vllm.model_executor.models.interfaces import CausalLM
from vllm.v1.core.memory_plan import PoolSizes


def bind_caches(model: CausalLM, cache: CacheConfig, sizes: PoolSizes, device: torch.device) -> None:
    """Allocate attention pages and GDN slots, zeroed, and set them on the model's stateful layers.

    Per attention layer keys and values [num_blocks, block_size, kv_heads, head_dim]; per GDN layer the convolution window
    [num_slots, conv_dim, kernel - 1] and the recurrent state [num_slots, Hv, V, K].
    """
    layers = model.stateful_layers()
    kv_dtype = torch.float8_e4m3fn if cache.kv_cache_dtype == "fp8_e4m3" else getattr(torch, cache.kv_cache_dtype)
    state_dtypes = {
        "conv_state": getattr(torch, cache.mamba_cache_dtype),
        "ssm_state": getattr(torch, cache.mamba_ssm_cache_dtype),
    }
    for attention in layers.attention:
        shape = attention.kv_shape(sizes.num_blocks, cache.block_size)
        attention.kv_cache = tuple(torch.zeros(shape, dtype=kv_dtype, device=device) for _ in "kv")
    for gdn in layers.gdn:
        for name in gdn.state_shapes():
            setattr(gdn, name, gdn.make_state(name, sizes.num_slots, state_dtypes[name], device))


def unbind_caches(model: CausalLM) -> None:
    """Let go of the pools' memory."""
    layers = model.stateful_layers()
    for attention in layers.attention:
        attention.kv_cache = None
    for gdn in layers.gdn:
        for name in gdn.state_shapes():
            setattr(gdn, name, None)
