"""One decode step of the delta rule that reads q, k and v where the convolution left them: packed rows ``[q | k | v]``."""

import torch

from vllm.model_executor.layers.mamba.ops.slots import gather_slots, scatter_slots

from .fused_recurrent import check_state, launch_recurrent
from .naive import delta_step, gating, l2norm


def split_packed(mixed_qkv: torch.Tensor, Hv: int, K: int, V: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views q, k ``[B, Hk, K]`` and v ``[B, Hv, V]`` of packed rows ``[B, 2*Hk*K + Hv*V]``; Hk follows from the width."""
    B, width = mixed_qkv.shape
    Hk, rest = divmod(width - Hv * V, 2 * K)
    if Hk <= 0 or rest or Hv % Hk:
        raise ValueError(
            f"rows of {width} do not split into q, k of Hk x {K} and v of {Hv} x {V} with Hk dividing {Hv}"
        )
    q, k, v = mixed_qkv.split([Hk * K, Hk * K, Hv * V], dim=-1)
    return q.view(B, Hk, K), k.view(B, Hk, K), v.view(B, Hv, V)


def fused_recurrent_gated_delta_rule_packed_decode_triton(
    mixed_qkv: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    scale: float | None,
    initial_state: torch.Tensor,
    out: torch.Tensor | None,
    ssm_state_indices: torch.Tensor,
    use_qk_l2norm_in_kernel: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Triton form of :func:`fused_recurrent_gated_delta_rule_packed_decode`.

    The recurrent kernel takes any distance between tokens, so packed rows need views and no kernel of their own.
    """
    _, Hv, V, K = initial_state.shape
    q, k, v = (x[:, None] for x in split_packed(mixed_qkv, Hv, K, V))
    shape = (q.shape[0], 1, Hv, V)
    if out is not None and not out.is_contiguous():
        raise ValueError(f"out must be contiguous, got strides {out.stride()}")
    o, _ = launch_recurrent(
        q,
        k,
        v,
        a[:, None],
        b[:, None],
        (A_log, dt_bias, 1.0, 20.0),
        scale,
        initial_state,
        True,
        None,
        ssm_state_indices,
        None,
        use_qk_l2norm_in_kernel,
        None if out is None else out.view(shape),
    )
    return (o if out is None else out), initial_state


def fused_recurrent_gated_delta_rule_packed_decode_torch(
    mixed_qkv: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    scale: float | None,
    initial_state: torch.Tensor,
    out: torch.Tensor | None,
    ssm_state_indices: torch.Tensor,
    use_qk_l2norm_in_kernel: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """PyTorch form of :func:`fused_recurrent_gated_delta_rule_packed_decode`."""
    _, Hv, V, K = initial_state.shape
    check_state(initial_state, Hv, K, V)
    q, k, v = split_packed(mixed_qkv, Hv, K, V)
    B, Hk = q.shape[:2]
    g, beta = gating(a, b, A_log, dt_bias)
    q, k = (l2norm(x) if use_qk_l2norm_in_kernel else x.float() for x in (q, k))
    q = (q * (K**-0.5 if scale is None else scale)).repeat_interleave(Hv // Hk, dim=1)
    k = k.repeat_interleave(Hv // Hk, dim=1)
    o, state = delta_step(gather_slots(initial_state, ssm_state_indices).float(), q, k, v.float(), g, beta)
    o = torch.where((ssm_state_indices >= 0)[:, None, None], o, 0).to(mixed_qkv.dtype)
    scatter_slots(initial_state, ssm_state_indices, state)
    if out is None:
        out = o.view(B, 1, Hv, V)
    else:
        out.copy_(o.view(out.shape))
    return out, initial_state


def fused_recurrent_gated_delta_rule_packed_decode(
    mixed_qkv: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    scale: float | None,
    initial_state: torch.Tensor,
    out: torch.Tensor | None,
    ssm_state_indices: torch.Tensor,
    use_qk_l2norm_in_kernel: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate, normalise, update the state and read it out, for one token a row and in one launch.

    Args:
        mixed_qkv: ``[B, 2*Hk*K + Hv*V]``, rows ``[q | k | v]`` after convolution and activation; any row stride.
        a, b: ``[B, Hv]`` raw projections. A_log, dt_bias: ``[Hv]``.
        scale: factor on q; None means ``K ** -0.5``.
        initial_state: pool ``[slots, Hv, V, K]``, updated in place.
        out: ``[B, 1, Hv, V]`` or ``[B, Hv, V]`` to write to, or None for a new ``[B, 1, Hv, V]``.
        ssm_state_indices: ``[B]``; negative marks a padding row (zeros out, no state touched).

    Returns:
        ``(out, initial_state)``.
    """
    cuda = mixed_qkv.is_cuda
    form = (
        fused_recurrent_gated_delta_rule_packed_decode_triton
        if cuda
        else fused_recurrent_gated_delta_rule_packed_decode_torch
    )
    return form(mixed_qkv, a, b, A_log, dt_bias, scale, initial_state, out, ssm_state_indices, use_qk_l2norm_in_kernel)
