"""Plain-PyTorch truth of the gated delta rule; every kernel of this package is tested against these functions.

One head keeps a state S [K, V]. With a decay g_t <= 0, a write strength beta_t in (0, 1), keys and queries of unit length::

    S <- exp(g_t) S                       forget
    S <- S + k_t (beta_t (v_t - S' k_t))' replace what the state answers to k_t by v_t
    o_t = S' q_t                          read

In memory a state is [Hv, V, K]: the transposed matrix, so that both products above reduce along the contiguous axis.
Value head n reads query and key head n // (Hv // Hk). Source: "Gated Delta Networks", Yang, Kautz, Hatamizadeh, arXiv 2412.06464.
Everything is computed in float32, or in float64 where the inputs are float64.
"""

import torch
import torch.nn.functional as F

from vllm.model_executor.layers.mamba.ops.slots import HostLengths, host_cu_seqlens, to_device

from .index import CHUNK_SIZE, chunk_counts

L2NORM_EPS = 1e-6


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The precision references calculate in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def l2norm(x: torch.Tensor, eps: float = L2NORM_EPS) -> torch.Tensor:
    """``x / sqrt(sum(x**2) + eps)`` over the last axis, returned in float32 (float64 for float64)."""
    x = x.to(compute_dtype(x))
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


def gating(
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    softplus_beta: float = 1.0,
    threshold: float = 20.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log decay and write strength of each token and value head.

    ``g = -exp(A_log) * softplus(a + dt_bias)``, ``beta = sigmoid(b)``. softplus is the identity where ``softplus_beta * x`` exceeds
    ``threshold``, since exp would overflow there and the difference is below float32's resolution.

    Args:
        a, b: ``[..., Hv]``. A_log, dt_bias: ``[Hv]``.

    Returns:
        ``(g, beta)``, both float32 of the shape of ``a``.
    """
    dtype = compute_dtype(a)
    x = a.to(dtype) + dt_bias.to(dtype)
    g = -A_log.to(dtype).exp() * F.softplus(x, beta=softplus_beta, threshold=threshold)
    return g, b.to(dtype).sigmoid()


def check_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
) -> tuple[int, int, int, int, int, int]:
    """Check the shapes of one call and return ``(B, T, Hk, Hv, K, V)``; raises ValueError naming the shape that does not fit."""
    if q.dim() != 4 or q.shape != k.shape:
        raise ValueError(f"q and k must both be [B, T, Hk, K], got {tuple(q.shape)} and {tuple(k.shape)}")
    B, T, Hk, K = q.shape
    if v.dim() != 4 or v.shape[:2] != (B, T) or v.shape[2] % Hk:
        raise ValueError(f"v must be [{B}, {T}, Hv, V] with Hv a multiple of {Hk}, got {tuple(v.shape)}")
    Hv, V = v.shape[2:]
    if g.shape != (B, T, Hv) or beta.shape != (B, T, Hv):
        raise ValueError(f"g and beta must be [{B}, {T}, {Hv}], got {tuple(g.shape)} and {tuple(beta.shape)}")
    return B, T, Hk, Hv, K, V


def delta_step(
    state: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token of many rows. state ``[N, Hv, V, K]``; q (scaled), k ``[N, Hv, K]``; v ``[N, Hv, V]``; g, beta ``[N, Hv]``.

    Returns:
        ``(o [N, Hv, V], new state)``; the given state is left alone.
    """
    state = state * g.exp()[..., None, None]
    delta = beta[..., None] * (v - torch.einsum("nhvk,nhk->nhv", state, k))
    state = state + delta[..., None] * k[..., None, :]
    return torch.einsum("nhvk,nhk->nhv", state, q), state


def naive_recurrent_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = True,
    cu_seqlens: torch.Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens_cpu: HostLengths | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The recurrence, one sequence and one token at a time: slow, and short enough to be checked by eye.

    Args:
        q, k: ``[B, T, Hk, K]``. v: ``[B, T, Hv, V]``. g (log decay), beta: ``[B, T, Hv]``.
        scale: factor on q, by default ``K ** -0.5``.
        initial_state: ``[N, Hv, V, K]``, zeros by default; not modified.
        cu_seqlens: ``[N + 1]`` token starts of the N sequences when B is 1; else each batch row is a sequence.

    Returns:
        ``(o [B, T, Hv, V] in v's dtype, final state [N, Hv, V, K] or None)``; zeros for tokens past the last sequence.
    """
    B, T, Hk, Hv, K, V = check_delta_rule(q, k, v, g, beta)
    starts = host_cu_seqlens(B, T, cu_seqlens, cu_seqlens_cpu)
    dtype = compute_dtype(q)
    q, k = (l2norm(x) if use_qk_l2norm_in_kernel else x.to(dtype) for x in (q, k))
    q = (q * (K**-0.5 if scale is None else scale)).repeat_interleave(Hv // Hk, dim=2).reshape(B * T, Hv, K)
    k = k.repeat_interleave(Hv // Hk, dim=2).reshape(B * T, Hv, K)
    v, g, beta, o_dtype = (
        v.reshape(-1, Hv, V).to(dtype),
        g.reshape(-1, Hv).to(dtype),
        beta.reshape(-1, Hv).to(dtype),
        v.dtype,
    )
    N = len(starts) - 1
    o = torch.zeros(B * T, Hv, V, dtype=dtype, device=q.device)
    states = q.new_zeros(N, Hv, V, K) if initial_state is None else initial_state.to(dtype).clone()
    for n in range(N):
        state = states[n : n + 1]
        for t in range(starts[n], starts[n + 1]):
            row = slice(t, t + 1)
            o[row], state = delta_step(state, q[row], k[row], v[row], g[row], beta[row])
        states[n] = state[0]
    final = states.to(torch.float32 if initial_state is None else initial_state.dtype) if output_final_state else None
    return o.to(o_dtype).view(B, T, Hv, V), final


def naive_chunk_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = True,
    cu_seqlens: torch.Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens_cpu: HostLengths | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The same recurrence in chunks of ``chunk_size`` tokens: matrix products inside a chunk, a short loop from chunk to chunk.

    With G the running sum of g in a chunk and D_ij = exp(G_i - G_j) for j <= i, the corrections beta (v - S'k) of a whole chunk solve
    the unit lower triangular system (I + A) X = R, A = strictly_lower(diag(beta) K K' * D). R = diag(beta) V gives U, and
    R = diag(beta exp(G)) K gives W; then V' = U - W S, O = diag(exp G) Q S + (Q K' * D) V', S <- exp(G_C) S + K' diag(exp(G_C - G)) V'.

    Arguments and results are those of :func:`naive_recurrent_gated_delta_rule`. ``cu_seqlens_cpu`` gives the starts as host integers,
    so that nothing waits for a device.
    """
    B, T, Hk, Hv, K, V = check_delta_rule(q, k, v, g, beta)
    starts = host_cu_seqlens(B, T, cu_seqlens, cu_seqlens_cpu)
    N, C, r, device = len(starts) - 1, chunk_size, Hv // Hk, q.device
    dtype, o_dtype = compute_dtype(q), v.dtype
    state_dtype = torch.float32 if initial_state is None else initial_state.dtype
    counts = chunk_counts(starts, C)
    S = (
        q.new_zeros(N, Hv, K, V, dtype=dtype)
        if initial_state is None
        else initial_state.to(dtype).transpose(-1, -2).clone()
    )
    o_flat = torch.zeros(B * T, Hv, V, dtype=o_dtype, device=device)
    if sum(counts):
        begins = [starts[n] + c * C for n in range(N) for c in range(counts[n])]
        sizes = [min(C, starts[n + 1] - starts[n] - c * C) for n in range(N) for c in range(counts[n])]
        lane = torch.arange(C, device=device)
        tokens = to_device(begins, torch.int64, device)[:, None] + lane  # [NT, C]
        inside = lane < to_device(sizes, torch.int64, device)[:, None]
        tokens = tokens.clamp(max=B * T - 1)

        def chunks(x: torch.Tensor) -> torch.Tensor:
            """[B, T, H, D] -> [NT, Hv, C, D], zeros in the unused lanes of a last chunk."""
            x = x.reshape(B * T, x.shape[2], x.shape[3])[tokens].masked_fill(~inside[..., None, None], 0).to(dtype)
            return x.transpose(1, 2)

        qc, kc = (chunks(x) for x in (q, k))
        if use_qk_l2norm_in_kernel:
            qc, kc = l2norm(qc), l2norm(kc)
        qc = (qc * (K**-0.5 if scale is None else scale)).repeat_interleave(r, dim=1)
        kc = kc.repeat_interleave(r, dim=1)
        vc, bc = chunks(v), chunks(beta[..., None])
        G = chunks(g[..., None]).squeeze(-1).cumsum(-1)  # [NT, Hv, C]
        # exp is taken of masked differences: above the diagonal G_i - G_j is positive and may overflow
        later = torch.ones(C, C, dtype=torch.bool, device=device).triu(1)
        D = (G[..., :, None] - G[..., None, :]).masked_fill(later, float("-inf")).exp()
        A = (bc * (kc @ kc.transpose(-1, -2)) * D).tril(-1)
        rhs = torch.cat([bc * vc, bc * G.exp()[..., None] * kc], dim=-1)
        U, W = torch.linalg.solve_triangular(A, rhs, upper=False, unitriangular=True).split([V, K], dim=-1)
        q_in, qk = qc * G.exp()[..., None], (qc @ kc.transpose(-1, -2)) * D
        k_out, last = kc * (G[..., -1:] - G).exp()[..., None], G[..., -1].exp()[..., None, None]
        oc = torch.empty_like(vc)
        offsets = [sum(counts[:n]) for n in range(N)]
        for c in range(max(counts)):
            alive = [n for n in range(N) if counts[n] > c]
            i = to_device([offsets[n] + c for n in alive], torch.int64, device)
            n_idx = to_device(alive, torch.int64, device)
            S_n = S[n_idx]
            v_new = U[i] - W[i] @ S_n
            oc[i] = q_in[i] @ S_n + qk[i] @ v_new
            S[n_idx] = last[i] * S_n + k_out[i].transpose(-1, -2) @ v_new
        lanes = [offsets[n] * C + t for n in range(N) for t in range(starts[n + 1] - starts[n])]
        o_flat[: starts[-1]] = oc.transpose(1, 2).reshape(-1, Hv, V)[to_device(lanes, torch.int64, device)].to(o_dtype)
    final = S.transpose(-1, -2).contiguous().to(state_dtype) if output_final_state else None
    return o_flat.view(B, T, Hv, V), final
