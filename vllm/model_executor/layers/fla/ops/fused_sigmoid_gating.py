"""Gating and recurrence in one launch: :func:`fused_recurrent_gated_delta_rule` that calculates g and beta itself."""

import torch

from vllm.model_executor.layers.mamba.ops.slots import HostLengths

from .fused_recurrent import fused_recurrent_gated_delta_rule_torch, launch_recurrent
from .naive import gating


def fused_sigmoid_gating_delta_rule_update_triton(
    A_log: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    dt_bias: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: float = 1.0,
    threshold: float = 20.0,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    inplace_final_state: bool = True,
    cu_seqlens: torch.Tensor | None = None,
    ssm_state_indices: torch.Tensor | None = None,
    num_accepted_tokens: torch.Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens_cpu: HostLengths | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Triton form of :func:`fused_sigmoid_gating_delta_rule_update`: the recurrent kernel, fed with the raw projections."""
    shape = v.shape[:3]
    return launch_recurrent(
        q,
        k,
        v,
        a.reshape(shape),
        b.reshape(shape),
        (A_log, dt_bias, beta, threshold),
        scale,
        initial_state,
        inplace_final_state,
        cu_seqlens,
        ssm_state_indices,
        num_accepted_tokens,
        use_qk_l2norm_in_kernel,
    )


def fused_sigmoid_gating_delta_rule_update_torch(
    A_log: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    dt_bias: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: float = 1.0,
    threshold: float = 20.0,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    inplace_final_state: bool = True,
    cu_seqlens: torch.Tensor | None = None,
    ssm_state_indices: torch.Tensor | None = None,
    num_accepted_tokens: torch.Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens_cpu: HostLengths | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """PyTorch form of :func:`fused_sigmoid_gating_delta_rule_update`."""
    shape = v.shape[:3]
    g, strength = gating(a.reshape(shape), b.reshape(shape), A_log, dt_bias, beta, threshold)
    return fused_recurrent_gated_delta_rule_torch(
        q,
        k,
        v,
        g,
        strength,
        scale,
        initial_state,
        inplace_final_state,
        cu_seqlens,
        ssm_state_indices,
        num_accepted_tokens,
        use_qk_l2norm_in_kernel,
        cu_seqlens_cpu,
    )


def fused_sigmoid_gating_delta_rule_update(
    A_log: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    dt_bias: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: float = 1.0,
    threshold: float = 20.0,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    inplace_final_state: bool = True,
    cu_seqlens: torch.Tensor | None = None,
    ssm_state_indices: torch.Tensor | None = None,
    num_accepted_tokens: torch.Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens_cpu: HostLengths | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The delta rule with its gates calculated on the way, in float32.

    Args:
        A_log, dt_bias: ``[Hv]``. a, b: ``[T, Hv]`` (or ``[B, T, Hv]``), raw projections.
        beta, threshold: of softplus (not the write strength, which is ``sigmoid(b)``).

    The other arguments and the result are those of :func:`~.fused_recurrent.fused_recurrent_gated_delta_rule`.
    """
    form = fused_sigmoid_gating_delta_rule_update_triton if q.is_cuda else fused_sigmoid_gating_delta_rule_update_torch
    return form(
        A_log,
        a,
        b,
        dt_bias,
        q,
        k,
        v,
        beta,
        threshold,
        scale,
        initial_state,
        inplace_final_state,
        cu_seqlens,
        ssm_state_indices,
        num_accepted_tokens,
        use_qk_l2norm_in_kernel,
        cu_seqlens_cpu,
    )
