"""The gated delta rule token by token, on states that live in a pool: decoding, and short pieces of speculative drafts.

Mathematics and layouts: ``naive.py``. Here each sequence has a slot of the pool ``[slots, Hv, V, K]`` (float32 or bfloat16; calculated
in float32 either way, rounded when stored), found through ``ssm_state_indices``.
"""

from itertools import pairwise

import torch
import triton
import triton.language as tl

from vllm.model_executor.layers.mamba.ops.slots import (
    HostLengths,
    gather_slots,
    host_cu_seqlens,
    scatter_slots,
    to_device,
)

from .device import multiprocessors, softplus
from .index import cdiv
from .naive import L2NORM_EPS, check_delta_rule, delta_step, l2norm

CPU_CACHE_BYTES = 1 << 20


def check_state(state: torch.Tensor, Hv: int, K: int, V: int) -> None:
    if state.dim() != 4 or state.shape[1:] != (Hv, V, K):
        raise ValueError(f"the state pool must be [slots, Hv={Hv}, V={V}, K={K}], got {tuple(state.shape)}")
    if state.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"states are kept in float32 or bfloat16, got {state.dtype}")


@triton.jit
def _recurrent_kernel(
    q,
    k,
    v,
    g,
    beta,
    A_log,
    dt_bias,
    o,
    state,
    final,
    starts,
    slots,
    accepted,
    T,
    scale,
    softplus_beta,
    threshold,
    eps,
    stride_q,
    stride_k,
    stride_v,
    stride_g,
    stride_beta,
    stride_o,
    stride_state,
    stride_slots,
    Hk: tl.constexpr,
    Hv: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    VARLEN: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    HAS_ACCEPTED: tl.constexpr,
    EVERY_TOKEN: tl.constexpr,
    INPLACE: tl.constexpr,
    GATING: tl.constexpr,
    L2NORM: tl.constexpr,
):
    """BV rows of one head's state; with GATING, g and beta point at the raw projections a and b."""
    n, head = (tl.program_id(0) // Hv).to(tl.int64), tl.program_id(0) % Hv
    dk, dv = tl.arange(0, BK), tl.program_id(1) * BV + tl.arange(0, BV)
    in_k, in_v = dk < K, dv < V
    if VARLEN:
        begin = tl.load(starts + n).to(tl.int64)
        tokens = (tl.load(starts + n + 1) - begin).to(tl.int32)
    else:
        begin, tokens = n * T, T
    slot = n
    if HAS_SLOTS:
        first = 0
        if HAS_ACCEPTED:
            first = tl.maximum(tl.load(accepted + n).to(tl.int32) - 1, 0)
        slot = tl.load(slots + n * stride_slots + first).to(tl.int64)
    at_o = o + begin * stride_o + head * V + dv
    # [BV, BK]
    inside = in_v[:, None] & in_k[None, :]
    tile = head * (V * K) + dv[:, None] * K + dk[None, :]
    if slot < 0:
        for t in range(tokens):
            tl.store(at_o + t * stride_o, tl.zeros([BV], o.dtype.element_ty), mask=in_v)
        if not INPLACE:
            tl.store(final + n * (Hv * V * K) + tile, tl.zeros([BV, BK], final.dtype.element_ty), mask=inside)
        return
    S = tl.zeros([BV, BK], tl.float32)
    if HAS_STATE:
        S += tl.load(state + slot * stride_state + tile, mask=inside, other=0.0).to(tl.float32)
    key_head = head // (Hv // Hk)
    at_q, at_k = q + begin * stride_q + key_head * K + dk, k + begin * stride_k + key_head * K + dk
    at_v = v + begin * stride_v + head * V + dv
    at_g, at_beta = g + begin * stride_g + head, beta + begin * stride_beta + head
    decay, bias = 0.0, 0.0
    if GATING:
        decay, bias = tl.exp(tl.load(A_log + head).to(tl.float32)), tl.load(dt_bias + head).to(tl.float32)
    for t in range(tokens):
        # [BK], [BV]
        q_t = tl.load(at_q, mask=in_k, other=0.0).to(tl.float32)
        k_t = tl.load(at_k, mask=in_k, other=0.0).to(tl.float32)
        v_t = tl.load(at_v, mask=in_v, other=0.0).to(tl.float32)
        g_t, beta_t = tl.load(at_g).to(tl.float32), tl.load(at_beta).to(tl.float32)
        if GATING:
            g_t, beta_t = -decay * softplus(g_t + bias, softplus_beta, threshold), tl.sigmoid(beta_t)
        if L2NORM:
            q_t *= tl.rsqrt(tl.sum(q_t * q_t, axis=0) + eps)
            k_t *= tl.rsqrt(tl.sum(k_t * k_t, axis=0) + eps)
        S, o_t = delta_update(S, q_t * scale, k_t, v_t, g_t, beta_t)
        tl.store(at_o, o_t.to(o.dtype.element_ty), mask=in_v)
        if EVERY_TOKEN:
            target = tl.load(slots + n * stride_slots + t).to(tl.int64)
            if target >= 0:
                tl.store(state + target * stride_state + tile, S.to(state.dtype.element_ty), mask=inside)
        at_q, at_k, at_v, at_o = at_q + stride_q, at_k + stride_k, at_v + stride_v, at_o + stride_o
        at_g, at_beta = at_g + stride_g, at_beta + stride_beta
    if not EVERY_TOKEN:
        if INPLACE:
            tl.store(state + slot * stride_state + tile, S.to(state.dtype.element_ty), mask=inside)
        else:
            tl.store(final + n * (Hv * V * K) + tile, S.to(final.dtype.element_ty), mask=inside)


@triton.jit
def delta_update(S, q, k, v, g, beta):
    """One token on a tile S [BV, BK]: returns the new tile and o [BV]."""
    S = S * tl.exp(g)
    delta = beta * (v - tl.sum(S * k[None, :], axis=1))
    S = S + delta[:, None] * k[None, :]
    return S, tl.sum(S * q[None, :], axis=1)


def plan_recurrent(heads: int, K: int, V: int, multiprocessors: int) -> dict[str, int]:
    """Tile of a state: as many rows as still leave every multiprocessor a few programs.

    Args:
        heads: value heads times sequences, each an independent state.
    """
    BV = min(32, triton.next_power_of_2(V))
    while BV > 8 and heads * cdiv(V, BV) < 4 * multiprocessors:
        BV //= 2
    BK = triton.next_power_of_2(K)
    return {"BK": BK, "BV": BV, "num_warps": 1 if BV == 32 else max(1, min(4, BK * BV // 1024))}


def token_rows(x: torch.Tensor) -> torch.Tensor:
    """``[B, T, H, D]`` as ``[B * T, H, D]`` with heads side by side; a view where the strides allow it."""
    x = x.reshape(-1, *x.shape[2:])
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def launch_recurrent(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    gates: tuple[torch.Tensor, torch.Tensor, float, float] | None,
    scale: float | None,
    initial_state: torch.Tensor | None,
    inplace_final_state: bool,
    cu_seqlens: torch.Tensor | None,
    ssm_state_indices: torch.Tensor | None,
    num_accepted_tokens: torch.Tensor | None,
    use_qk_l2norm_in_kernel: bool,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel for both entry points; ``gates`` = (A_log, dt_bias, softplus beta, threshold) if g, beta are raw a, b."""
    B, T, Hk, Hv, K, V = check_delta_rule(q, k, v, g, beta)
    N = B if cu_seqlens is None else cu_seqlens.numel() - 1
    if initial_state is not None:
        check_state(initial_state, Hv, K, V)
    slots = None if initial_state is None else ssm_state_indices
    every_token = slots is not None and slots.dim() == 2
    if slots is not None and slots.shape[0] != N:
        raise ValueError(f"{N} sequences need as many slot indices, got {tuple(slots.shape)}")
    pool = initial_state
    if every_token and not inplace_final_state:
        pool, inplace_final_state = initial_state.clone(), True
    if pool is None:
        pool, inplace_final_state = torch.empty(N, Hv, V, K, dtype=torch.float32, device=q.device), True
    if pool.stride()[1:] != (V * K, K, 1):
        raise ValueError(f"each slot of the state pool must be contiguous, got strides {pool.stride()}")
    final = pool if inplace_final_state else pool.new_empty(N, Hv, V, K)
    if out is None:
        # tokens past the last sequence belong to no program
        make = torch.empty if cu_seqlens is None else torch.zeros
        out = make(B, T, Hv, V, dtype=v.dtype, device=v.device)
    if N == 0 or T == 0:
        return out, final
    rows_q, rows_k, rows_v, rows_o = (token_rows(x) for x in (q, k, v, out))
    rows_g, rows_beta = (x.reshape(-1, Hv) for x in (g, beta))
    rows_g, rows_beta = (x if x.stride(1) == 1 else x.contiguous() for x in (rows_g, rows_beta))
    A_log, dt_bias, softplus_beta, threshold = (None, None, 1.0, 20.0) if gates is None else gates
    plan = plan_recurrent(N * Hv, K, V, multiprocessors(q.device))
    _recurrent_kernel[(N * Hv, triton.cdiv(V, plan["BV"]))](
        rows_q,
        rows_k,
        rows_v,
        rows_g,
        rows_beta,
        A_log,
        dt_bias,
        rows_o,
        pool,
        final,
        cu_seqlens,
        slots,
        num_accepted_tokens,
        1 if cu_seqlens is not None else T,
        K**-0.5 if scale is None else scale,
        float(softplus_beta),
        float(threshold),
        L2NORM_EPS,
        rows_q.stride(0),
        rows_k.stride(0),
        rows_v.stride(0),
        rows_g.stride(0),
        rows_beta.stride(0),
        rows_o.stride(0),
        pool.stride(0),
        0 if slots is None else slots.stride(0),
        Hk=Hk,
        Hv=Hv,
        K=K,
        V=V,
        VARLEN=cu_seqlens is not None,
        HAS_STATE=initial_state is not None,
        HAS_SLOTS=slots is not None,
        HAS_ACCEPTED=every_token and num_accepted_tokens is not None,
        EVERY_TOKEN=every_token,
        INPLACE=inplace_final_state,
        GATING=gates is not None,
        L2NORM=use_qk_l2norm_in_kernel,
        **plan,
    )
    return out, final


def fused_recurrent_gated_delta_rule_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    inplace_final_state: bool = True,
    cu_seqlens: torch.Tensor | None = None,
    ssm_state_indices: torch.Tensor | None = None,
    num_accepted_tokens: torch.Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens_cpu: HostLengths | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Triton form of :func:`fused_recurrent_gated_delta_rule`."""
    return launch_recurrent(
        q,
        k,
        v,
        g,
        beta,
        None,
        scale,
        initial_state,
        inplace_final_state,
        cu_seqlens,
        ssm_state_indices,
        num_accepted_tokens,
        use_qk_l2norm_in_kernel,
    )


def fused_recurrent_gated_delta_rule_torch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    inplace_final_state: bool = True,
    cu_seqlens: torch.Tensor | None = None,
    ssm_state_indices: torch.Tensor | None = None,
    num_accepted_tokens: torch.Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens_cpu: HostLengths | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """PyTorch form of :func:`fused_recurrent_gated_delta_rule`: step t of all sequences at once."""
    B, T, Hk, Hv, K, V = check_delta_rule(q, k, v, g, beta)
    starts = host_cu_seqlens(B, T, cu_seqlens, cu_seqlens_cpu)
    lengths = [b - a for a, b in pairwise(starts)]
    N, device = len(lengths), q.device
    if initial_state is None:
        initial_state, slots, inplace_final_state = q.new_zeros(N, Hv, V, K, dtype=torch.float32), None, True
    else:
        check_state(initial_state, Hv, K, V)
        slots = ssm_state_indices
    slots = torch.arange(N, device=device) if slots is None else slots
    first = slots if slots.dim() == 1 else slots[:, 0]
    if slots.dim() == 2 and num_accepted_tokens is not None:
        first = slots.gather(1, (num_accepted_tokens.long() - 1).clamp(min=0)[:, None])[:, 0]
    pool = initial_state if inplace_final_state else initial_state.clone()

    def tokens(x: torch.Tensor, repeat: int = 1) -> torch.Tensor:
        return x.reshape(B * T, *x.shape[2:]).float().repeat_interleave(repeat, dim=1)

    q, k = (l2norm(x) if use_qk_l2norm_in_kernel else x.float() for x in (q, k))
    q, k = tokens(q * (K**-0.5 if scale is None else scale), Hv // Hk), tokens(k, Hv // Hk)
    o_dtype, v, g, beta = v.dtype, tokens(v), tokens(g), tokens(beta)
    o = torch.zeros(B * T, Hv, V, dtype=torch.float32, device=device)
    # Each step passes over the states several times: on a CPU a few sequences at once, so that they stay in its cache.
    at_once = N if q.is_cuda else max(1, CPU_CACHE_BYTES // (4 * Hv * V * K))
    for begin in range(0, N, max(1, at_once)):
        mine = slice(begin, begin + at_once)
        state = gather_slots(pool, first[mine]).float()  # [n, Hv, V, K]
        for t in range(max(lengths[mine])):
            alive = [n for n in range(begin, min(begin + at_once, N)) if lengths[n] > t]
            everyone = len(alive) == state.shape[0]
            row = slice(None) if everyone else to_device([n - begin for n in alive], torch.int64, device)
            at = to_device([starts[n] + t for n in alive], torch.int64, device)
            real = first[mine][row] >= 0
            o_t, new = delta_step(state[row], q[at], k[at], v[at], g[at], beta[at])
            o[at] = torch.where(real[:, None, None], o_t, 0)
            if everyone:
                state = new
            else:
                state[row] = new
            if slots.dim() == 2:
                scatter_slots(pool, torch.where(real, slots[mine][row, t], -1), new)
        if slots.dim() == 1:
            scatter_slots(pool, slots[mine], state)
    o = o.to(o_dtype).view(B, T, Hv, V)
    return o, (pool if inplace_final_state or slots.dim() == 2 else gather_slots(pool, slots))


def fused_recurrent_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    inplace_final_state: bool = True,
    cu_seqlens: torch.Tensor | None = None,
    ssm_state_indices: torch.Tensor | None = None,
    num_accepted_tokens: torch.Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens_cpu: HostLengths | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The delta rule over short sequences, from and into the state pool.

    Args:
        q, k: ``[B, T, Hk, K]``. v: ``[B, T, Hv, V]``. g (log decay) and beta: ``[B, T, Hv]``.
        scale: factor on q, by default ``K ** -0.5``.
        initial_state: pool ``[slots, Hv, V, K]``; None starts N sequences from zeros.
        inplace_final_state: write each final state over its slot; otherwise the pool stays as it is.
        cu_seqlens: ``[N + 1]`` starts of N sequences when B is 1; else every batch row is one. ``cu_seqlens_cpu`` is its host twin,
            needed by the PyTorch form on a device only.
        ssm_state_indices: ``[N]`` slot of each sequence (0..N-1 by default), or ``[N, S]``: the state after token t goes to slot
            ``[n, t]``, and the start is slot ``[n, num_accepted_tokens[n] - 1]`` (``[n, 0]`` without them). A sequence whose starting
            slot is negative is padding: nothing is read or written, its outputs are zeros.
        num_accepted_tokens: ``[N]``, at least 1; for speculative decoding.

    Returns:
        ``(o [B, T, Hv, V], states)``: the pool itself when written in place, else the final states ``[N, Hv, V, K]`` (for
        ``[N, S]`` indices, an updated copy of the pool).
    """
    form = fused_recurrent_gated_delta_rule_triton if q.is_cuda else fused_recurrent_gated_delta_rule_torch
    return form(
        q,
        k,
        v,
        g,
        beta,
        scale,
        initial_state,
        inplace_final_state,
        cu_seqlens,
        ssm_state_indices,
        num_accepted_tokens,
        use_qk_l2norm_in_kernel,
        cu_seqlens_cpu,
    )
