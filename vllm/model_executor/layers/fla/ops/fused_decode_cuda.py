"""The fused decode step in CUDA C++ (csrc/gdn_decode.cu): when it applies, how it is cut, and its launch.

A cluster of thread blocks serves the value heads of one key head, so what the Triton kernel settles through counters in memory (who may
roll the window of q and k, who knows a whole head's sum of squares) takes one barrier inside the chip.
"""

from functools import lru_cache

import torch

from vllm import _custom_ops as ops
from vllm.model_executor.layers.mamba.ops.causal_conv1d_update import use_silu

from .device import multiprocessors
from .layernorm_guard import GATES
from .packed_decode import split_packed

TAPS = 4
MAX_CLUSTER = 8


def plan_fused_decode_cuda(
    B: int, Hk: int, Hv: int, head_dim: int, multiprocessors: int
) -> dict[str, int | bool] | None:
    """How many rows of a head's state a thread block takes, and whether it fetches them ahead of its turn.

    Returns:
        ``{"rows_a_block": 32 or 64, "early": bool}``, or None where a cluster would need too many blocks.
    """
    blocks = lambda rows: Hv // Hk * (head_dim // rows)
    few = B * Hk * blocks(32) <= 8 * multiprocessors
    fitting = [rows for rows in ((32, 64) if few else (64, 32)) if blocks(rows) <= MAX_CLUSTER]
    if not fitting:
        return None
    return {"rows_a_block": fitting[0], "early": few}


def prefers_cuda(heads: int, state: torch.dtype, multiprocessors: int) -> bool:
    """Whether the CUDA form is the faster one, as measured on an H200 (benchmarks/results/gdn_decode_h200.json).

    Few heads are a matter of latency, where barriers on the chip beat counters in memory. Many are a matter of bytes in flight, where
    the Triton kernel's small independent programs beat clusters, whose blocks wait for each other.

    Args:
        heads: value heads times batch rows.
    """
    return heads * (2 if state == torch.bfloat16 else 1) <= multiprocessors


@lru_cache
def _available(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0) and ops.available(device)


def fits_fused_decode_cuda(
    mixed_qkv: torch.Tensor,
    conv_state: torch.Tensor,
    conv_weight: torch.Tensor,
    vectors: tuple[torch.Tensor, ...],
    ssm_state: torch.Tensor,
) -> bool:
    """Whether the CUDA form takes these tensors: 16-bit activations, K = V of 64 or 128, four taps, a device with clusters, csrc/ built.

    Args:
        vectors: A_log, dt_bias and the norm's weight.
    """
    if not mixed_qkv.is_cuda or mixed_qkv.dtype not in (torch.bfloat16, torch.float16):
        return False
    _, Hv, V, K = ssm_state.shape
    Hk = (mixed_qkv.shape[1] - Hv * V) // (2 * K)
    dtype = mixed_qkv.dtype
    return (
        K == V
        and K in (64, 128)
        and Hk > 0
        and conv_weight.shape[1] == TAPS
        and conv_weight.dtype == conv_state.dtype == dtype
        and all(vector.dtype in (dtype, torch.float32) for vector in vectors)
        and plan_fused_decode_cuda(1, Hk, Hv, K, 1) is not None
        and _available(mixed_qkv.device)
    )


def fused_gdn_decode_cuda(
    mixed_qkv: torch.Tensor,
    z: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    conv_state: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor | None,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    ssm_state: torch.Tensor,
    state_indices: torch.Tensor,
    scale: float | None = None,
    out: torch.Tensor | None = None,
    activation: str = "silu",
    gate_activation: str = "silu",
    use_qk_l2norm_in_kernel: bool = True,
) -> torch.Tensor:
    """CUDA form of :func:`~.fused_decode.fused_gdn_decode`."""
    B = mixed_qkv.shape[0]
    _, Hv, V, K = ssm_state.shape
    Hk = split_packed(mixed_qkv, Hv, K, V)[0].shape[1]
    if gate_activation not in GATES:
        raise ValueError(f"gate_activation must be one of {GATES}, got {gate_activation!r}")
    plan = plan_fused_decode_cuda(B, Hk, Hv, K, multiprocessors(mixed_qkv.device))
    if plan is None:
        raise ValueError(f"{Hv // Hk} value heads of {V} rows a key head do not fit a cluster of {MAX_CLUSTER} blocks")
    z, a, b = (t if t.stride(1) == 1 else t.contiguous() for t in (z.reshape(B, Hv * V), a, b))
    y = torch.empty(B, Hv, V, dtype=mixed_qkv.dtype, device=mixed_qkv.device) if out is None else out
    ops.gdn_decode(
        y,
        mixed_qkv,
        z,
        a,
        b,
        conv_state,
        conv_weight,
        conv_bias,
        A_log,
        dt_bias,
        norm_weight,
        eps,
        ssm_state,
        state_indices.contiguous(),
        K**-0.5 if scale is None else scale,
        use_silu(activation),
        gate_activation == "sigmoid",
        use_qk_l2norm_in_kernel,
        **plan,
    )
    return y
