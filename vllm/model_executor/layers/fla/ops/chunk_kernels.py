"""The three kernels of ``chunk.py``; notation as in :func:`~.naive.naive_chunk_gated_delta_rule`.

Chunks have BT = 64 tokens. Keys and queries stay raw in every product, whose result is divided by their lengths where those apply:
normalising them first would cost a pass over memory and, in bfloat16, a rounding.
"""

import triton
import triton.language as tl

from .device import dot

# Integers that say where rows are may start anywhere: behind those of decoding sequences, say.
_PLACES = ("starts", "chunks", "offsets", "slots", "flags")


@triton.jit
def _unit_lower_inverse(A):
    """``inv(I + A)`` of a strictly lower triangular A [64, 64].

    The four 16 x 16 blocks on the diagonal by forward substitution, side by side; then twice inv([[P, 0], [L, Q]]) =
    [[inv P, 0], [-inv Q L inv P, inv Q]], written as X - X L X on the full matrix. Summing powers of A instead would need no loop, but
    for keys that resemble each other those powers grow like binomials and cancel.
    """
    block, lane, row = tl.arange(0, 4), tl.arange(0, 16), tl.arange(0, 64)
    # [4, 16, 16]
    on_diagonal = block[:, None, None, None] == block[None, None, :, None]
    X = -tl.sum(tl.where(on_diagonal, tl.reshape(A, [4, 16, 4, 16]), 0.0), axis=2)
    for i in tl.static_range(1, 16):
        this = (lane == i)[None, :, None]
        # [4, 16]: row i, whose earlier rows are final
        x = tl.sum(tl.where(this, X, 0.0), axis=1)
        x += tl.sum(x[:, :, None] * X, axis=1)
        X = tl.where(this, x[:, None, :], X)
    X += (lane[:, None] == lane[None, :]).to(tl.float32)[None, :, :]
    # [64, 64] with those blocks on its diagonal
    X = tl.reshape(tl.broadcast_to(tl.reshape(X, [64, 1, 16]), [64, 4, 16]), [64, 64])
    i, j = row[:, None], row[None, :]
    X = tl.where(i // 16 == j // 16, X, 0.0)
    L = tl.where((i // 32 == j // 32) & (i // 16 > j // 16), A, 0.0)
    X -= dot(dot(X, L), X)
    L = tl.where(i // 32 > j // 32, A, 0.0)
    X -= dot(dot(X, L), X)
    return X


@triton.jit(do_not_specialize_on_alignment=_PLACES)
def chunk_prepare_kernel(
    k,
    v,
    g,
    beta,
    rstd,
    G,
    u,
    w,
    starts,
    chunks,
    slots,
    eps,
    stride_k,
    stride_v,
    Hk: tl.constexpr,
    Hv: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    L2NORM: tl.constexpr,
):
    """What a chunk knows without the state: G, U and W of one chunk and head, and the keys' lengths."""
    chunk, head = tl.program_id(0) // Hv, tl.program_id(0) % Hv
    key_head = head // (Hv // Hk)
    n, c = tl.load(chunks + 2 * chunk), tl.load(chunks + 2 * chunk + 1)
    if (tl.load(slots + n) if HAS_SLOTS else 0) < 0:
        return
    begin, end = tl.load(starts + n).to(tl.int64) + c * BT, tl.load(starts + n + 1)
    if begin >= end:  # a list of chunks may be longer than there are
        return
    t = begin + tl.arange(0, BT)
    real = t < end
    dk = tl.arange(0, BK)
    # [BT]
    G_t = tl.cumsum(tl.load(g + t * Hv + head, mask=real, other=0.0).to(tl.float32), axis=0)
    tl.store(G + t * Hv + head, G_t, mask=real)
    beta_t = tl.load(beta + t * Hv + head, mask=real, other=0.0).to(tl.float32)
    # [BT, BK]
    in_k = real[:, None] & (dk < K)[None, :]
    k_t = tl.load(k + t[:, None] * stride_k + key_head * K + dk[None, :], mask=in_k, other=0.0)
    # keys stay as they are for the tensor cores; their lengths are divided out of the products
    A = dot(k_t, tl.trans(k_t))
    weight = beta_t * tl.exp(G_t)
    if L2NORM:
        k32 = k_t.to(tl.float32)
        r_t = tl.rsqrt(tl.sum(k32 * k32, axis=1) + eps)
        if head % (Hv // Hk) == 0:
            tl.store(rstd + t * Hk + key_head, r_t, mask=real)
        A *= r_t[:, None] * r_t[None, :]
        weight *= r_t
    # [BT, BT]; above the diagonal the exponent is positive and could overflow
    lower = tl.arange(0, BT)[:, None] > tl.arange(0, BT)[None, :]
    A *= beta_t[:, None] * tl.exp(tl.where(lower, G_t[:, None] - G_t[None, :], float("-inf")))
    A = tl.where(lower, A, 0.0)
    X = _unit_lower_inverse(A).to(k_t.dtype)
    w_t = dot(X, (k_t.to(tl.float32) * weight[:, None]).to(k_t.dtype))
    tl.store(w + t[:, None] * (Hv * K) + head * K + dk[None, :], w_t.to(w.dtype.element_ty), mask=in_k)
    for i in tl.static_range(0, V, BV):
        dv = i + tl.arange(0, BV)
        in_v = real[:, None] & (dv < V)[None, :]
        # [BT, BV]
        v_t = tl.load(v + t[:, None] * stride_v + head * V + dv[None, :], mask=in_v, other=0.0)
        u_t = dot(X, (v_t.to(tl.float32) * beta_t[:, None]).to(v_t.dtype))
        tl.store(u + t[:, None] * (Hv * V) + head * V + dv[None, :], u_t.to(u.dtype.element_ty), mask=in_v)


@triton.jit(do_not_specialize_on_alignment=_PLACES)
def chunk_state_kernel(
    k,
    u,
    w,
    G,
    rstd,
    h,
    initial,
    final,
    starts,
    offsets,
    slots,
    flags,
    stride_k,
    stride_initial,
    stride_final,
    Hk: tl.constexpr,
    Hv: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_FLAGS: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    STORE_FINAL: tl.constexpr,
    L2NORM: tl.constexpr,
):
    """From chunk to chunk: BV rows of one head's state. Turns U into V' in place and leaves in h the state each chunk starts from."""
    n, head = tl.program_id(0) // Hv, tl.program_id(0) % Hv
    key_head = head // (Hv // Hk)
    dk, dv = tl.arange(0, BK), tl.program_id(1) * BV + tl.arange(0, BV)
    begin, end = tl.load(starts + n).to(tl.int64), tl.load(starts + n + 1).to(tl.int64)
    slot = n.to(tl.int64)
    if HAS_SLOTS:
        slot = tl.load(slots + n).to(tl.int64)
        # a sequence without tokens leaves its slot alone
        if (slot < 0) | (begin == end):
            return
    # [BV, BK]
    inside = (dv < V)[:, None] & (dk < K)[None, :]
    tile = head * (V * K) + dv[:, None] * K + dk[None, :]
    S = tl.zeros([BV, BK], tl.float32)
    if HAS_INITIAL:
        wanted = inside
        if HAS_FLAGS:
            wanted = inside & (dv < tl.where(tl.load(flags + n) != 0, V, 0))[:, None]
        S += tl.load(initial + slot * stride_initial + tile, mask=wanted, other=0.0).to(tl.float32)
    at_h = h + tl.load(offsets + n).to(tl.int64) * (Hv * V * K) + tile
    for c in range(tl.cdiv((end - begin).to(tl.int32), BT)):
        tl.store(at_h, S.to(h.dtype.element_ty), mask=inside)
        at_h += Hv * V * K
        t = begin + c * BT + tl.arange(0, BT)
        real = t < end
        # [BT, BK], [BT, BV]
        in_k, in_v = real[:, None] & (dk < K)[None, :], real[:, None] & (dv < V)[None, :]
        w_t = tl.load(w + t[:, None] * (Hv * K) + head * K + dk[None, :], mask=in_k, other=0.0)
        at_u = u + t[:, None] * (Hv * V) + head * V + dv[None, :]
        new = tl.load(at_u, mask=in_v, other=0.0).to(tl.float32) - dot(w_t, tl.trans(S.to(w_t.dtype)))
        tl.store(at_u, new.to(u.dtype.element_ty), mask=in_v)
        # [BT]
        G_t = tl.load(G + t * Hv + head, mask=real, other=0.0)
        G_last = tl.load(G + (tl.minimum(begin + (c + 1) * BT, end) - 1) * Hv + head)
        decay = tl.where(real, tl.exp(G_last - G_t), 0.0)
        if L2NORM:
            decay *= tl.load(rstd + t * Hk + key_head, mask=real, other=0.0)
        k_t = tl.load(k + t[:, None] * stride_k + key_head * K + dk[None, :], mask=in_k, other=0.0)
        S = S * tl.exp(G_last) + dot(tl.trans((new * decay[:, None]).to(k_t.dtype)), k_t)
    if STORE_FINAL:
        tl.store(final + slot * stride_final + tile, S.to(final.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize_on_alignment=_PLACES)
def chunk_output_kernel(
    q,
    k,
    u,
    G,
    rstd,
    h,
    o,
    starts,
    chunks,
    slots,
    scale,
    eps,
    stride_q,
    stride_k,
    Hk: tl.constexpr,
    Hv: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    L2NORM: tl.constexpr,
):
    """O of one chunk, one head and BV value channels: the state's answer plus that of the chunk's own tokens. It may replace u."""
    chunk, head = tl.program_id(0) // Hv, tl.program_id(0) % Hv
    key_head = head // (Hv // Hk)
    n, c = tl.load(chunks + 2 * chunk), tl.load(chunks + 2 * chunk + 1)
    begin, end = tl.load(starts + n).to(tl.int64) + c * BT, tl.load(starts + n + 1)
    if begin >= end:
        return
    t = begin + tl.arange(0, BT)
    real = t < end
    dk, dv = tl.arange(0, BK), tl.program_id(1) * BV + tl.arange(0, BV)
    in_k, in_v = real[:, None] & (dk < K)[None, :], real[:, None] & (dv < V)[None, :]
    at_o = o + t[:, None] * (Hv * V) + head * V + dv[None, :]
    if (tl.load(slots + n) if HAS_SLOTS else 0) < 0:
        tl.store(at_o, tl.zeros([BT, BV], o.dtype.element_ty), mask=in_v)
        return
    # [BT, BK], [BV, BK], [BT, BV]
    q_t = tl.load(q + t[:, None] * stride_q + key_head * K + dk[None, :], mask=in_k, other=0.0)
    k_t = tl.load(k + t[:, None] * stride_k + key_head * K + dk[None, :], mask=in_k, other=0.0)
    tile = (chunk.to(tl.int64) * Hv + head) * (V * K) + dv[:, None] * K + dk[None, :]
    h_t = tl.load(h + tile, mask=(dv < V)[:, None] & (dk < K)[None, :], other=0.0)
    u_t = tl.load(u + t[:, None] * (Hv * V) + head * V + dv[None, :], mask=in_v, other=0.0)
    G_t = tl.load(G + t * Hv + head, mask=real, other=0.0)
    acc = dot(q_t, tl.trans(h_t)) * tl.exp(G_t)[:, None]
    P = dot(q_t, tl.trans(k_t))
    row = tl.arange(0, BT)
    # lanes past the end have G = 0, which may be far above the rest
    lower = (row[:, None] >= row[None, :]) & real[:, None]
    P *= tl.exp(tl.where(lower, G_t[:, None] - G_t[None, :], float("-inf")))
    if L2NORM:
        P *= tl.load(rstd + t * Hk + key_head, mask=real, other=0.0)[None, :]
    acc += dot(P.to(u_t.dtype), u_t)
    if L2NORM:
        q32 = q_t.to(tl.float32)
        acc *= tl.rsqrt(tl.sum(q32 * q32, axis=1) + eps)[:, None]
    tl.debug_barrier()  # all warps have read u
    tl.store(at_o, (acc * scale).to(o.dtype.element_ty), mask=in_v)
