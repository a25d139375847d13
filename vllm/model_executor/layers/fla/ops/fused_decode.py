"""A whole decode step of the GDN layer between its projections, in one launch: in Triton here, in CUDA C++ in ``fused_decode_cuda.py``.

Convolution update, gating, l2norm, delta rule and gated RMS norm: the state is read and written once, and nothing between the stages
goes through memory. Values are rounded to the activations' dtype where the separate kernels would store them (after the convolution,
before the norm), so that this variant can replace them in the middle of a sequence.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from vllm.model_executor.layers.mamba.ops.causal_conv1d_update import (
    causal_conv1d_update_torch,
    check_window,
    use_silu,
)
from vllm.utils.torch_utils import kept

from .device import multiprocessors, overlaps_launches, softplus
from .fused_decode_cuda import fits_fused_decode_cuda, fused_gdn_decode_cuda, prefers_cuda
from .fused_recurrent import check_state, delta_update
from .layernorm_guard import GATES, gate_value, rmsnorm_gated_torch
from .naive import L2NORM_EPS
from .packed_decode import fused_recurrent_gated_delta_rule_packed_decode_torch, split_packed


@triton.jit
def _convolved(
    x,
    windows,
    weight,
    bias,
    channels,
    mask,
    stride_window,
    stride_tap,
    stride_weight,
    stride_weight_tap,
    W: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
):
    """One token through the convolution: float32 [C], rounded as a store in x's dtype would. Pointers are at the row and the slot."""
    # [C]
    token = tl.load(x + channels, mask=mask, other=0.0)
    acc = tl.zeros(channels.shape, tl.float32)
    if HAS_BIAS:
        acc += tl.load(bias + channels, mask=mask, other=0.0).to(tl.float32)
    for j in tl.static_range(W - 1):
        w = tl.load(weight + channels * stride_weight + j * stride_weight_tap, mask=mask, other=0.0).to(tl.float32)
        old = tl.load(windows + channels * stride_window + j * stride_tap, mask=mask, other=0.0)
        acc += old.to(token.dtype).to(tl.float32) * w
    w = tl.load(weight + channels * stride_weight + (W - 1) * stride_weight_tap, mask=mask, other=0.0).to(tl.float32)
    acc += token.to(tl.float32) * w
    if SILU:
        acc *= tl.sigmoid(acc)
    return acc.to(token.dtype).to(tl.float32)


@triton.jit
def _rolled(x, windows, channels, mask, stride_window, stride_tap, W: tl.constexpr, BW: tl.constexpr):
    """The window after this token, [C, BW] with W-1 used columns."""
    j = tl.arange(0, BW)
    at = windows + channels[:, None] * stride_window + (1 + j[None, :]) * stride_tap
    old = tl.load(at, mask=mask[:, None] & (j < W - 2)[None, :], other=0.0)
    token = tl.load(x + channels, mask=mask, other=0.0).to(old.dtype)
    return tl.where((j == W - 2)[None, :], token[:, None], old)


@triton.jit
def _store_window(windows, new, channels, mask, stride_window, stride_tap, W: tl.constexpr, BW: tl.constexpr):
    j = tl.arange(0, BW)
    at = windows + channels[:, None] * stride_window + j[None, :] * stride_tap
    tl.store(at, new, mask=mask[:, None] & (j < W - 1)[None, :])


@triton.jit
def _normed(o, z, weight, mask, eps, V: tl.constexpr, SIGMOID: tl.constexpr):
    """Gated RMS norm of one whole head o [V], in o's dtype."""
    value = o.to(tl.float32)
    value *= tl.rsqrt(tl.sum(tl.where(mask, value * value, 0.0), axis=0) / V + eps)
    value *= tl.load(weight, mask=mask, other=0.0).to(tl.float32)
    value *= gate_value(tl.load(z, mask=mask, other=0.0).to(tl.float32), SIGMOID)
    return value.to(o.dtype)


@triton.jit
def _fused_decode_kernel(
    x,
    z,
    a,
    b,
    windows,
    weight,
    bias,
    A_log,
    dt_bias,
    norm_weight,
    state,
    slots,
    y,
    counters,
    scale,
    norm_eps,
    l2_eps,
    stride_x,
    stride_z,
    stride_a,
    stride_b,
    stride_slot_window,
    stride_window,
    stride_tap,
    stride_weight,
    stride_weight_tap,
    stride_state,
    Hk: tl.constexpr,
    Hv: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    W: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BW: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    SIGMOID: tl.constexpr,
    L2NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    """ROWS rows of one head's state for one token, BV at a time; PARTS programs share a head.

    The convolution window of q and k belongs to a key head, which Hv / Hk * PARTS programs read. Whichever of them is counted last rolls
    that window; the counter goes back to zero. With several parts it also applies the norm, which needs whole heads: the parts leave their
    raw outputs in y. No program ever waits for another.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    R: tl.constexpr = Hv // Hk
    READERS: tl.constexpr = R * PARTS
    part, head = tl.program_id(0) % PARTS, (tl.program_id(0) // PARTS) % Hv
    row = (tl.program_id(0) // (PARTS * Hv)).to(tl.int64)
    key_head = head // R
    dk, rows = tl.arange(0, BK), part * ROWS + tl.arange(0, ROWS)
    in_k, in_rows = dk < K, rows < V
    y += row * (Hv * V)
    slot = tl.load(slots + row).to(tl.int64)
    if slot < 0:
        tl.store(y + head * V + rows, tl.zeros([ROWS], y.dtype.element_ty), mask=in_rows)
        return
    x += row * stride_x
    z += row * stride_z
    windows += slot * stride_slot_window
    state += slot * stride_state + head * (V * K)
    # the first tile now, and later each one before the previous is worked on: these loads are what takes time
    # [BV, BK]
    dv = part * ROWS + tl.arange(0, BV)
    tile = dv[:, None] * K + dk[None, :]
    S = tl.load(state + tile, mask=(dv < V)[:, None] & in_k[None, :], other=0.0)
    # [BK]
    c_q, c_k = key_head * K + dk, (Hk + key_head) * K + dk
    q = _convolved(
        x,
        windows,
        weight,
        bias,
        c_q,
        in_k,
        stride_window,
        stride_tap,
        stride_weight,
        stride_weight_tap,
        W,
        HAS_BIAS,
        SILU,
    )
    k = _convolved(
        x,
        windows,
        weight,
        bias,
        c_k,
        in_k,
        stride_window,
        stride_tap,
        stride_weight,
        stride_weight_tap,
        W,
        HAS_BIAS,
        SILU,
    )
    if L2NORM:
        q *= tl.rsqrt(tl.sum(q * q, axis=0) + l2_eps)
        k *= tl.rsqrt(tl.sum(k * k, axis=0) + l2_eps)
    q *= scale
    last = READERS - 1
    if READERS > 1 and PARTS == 1:
        # only the window is handed over, so this thread block's reads of it are all that must be done: nothing is stored yet, and the
        # fence that comes with the count has no stores to wait for
        tl.debug_barrier()
        last = tl.atomic_add(counters + row * Hk + key_head, 1, sem="acq_rel", scope="gpu")
    gate = tl.load(a + row * stride_a + head).to(tl.float32) + tl.load(dt_bias + head).to(tl.float32)
    g = -tl.exp(tl.load(A_log + head).to(tl.float32)) * softplus(gate, 1.0, 20.0)
    beta = tl.sigmoid(tl.load(b + row * stride_b + head).to(tl.float32))
    for i in tl.static_range(0, ROWS, BV):
        dv = part * ROWS + i + tl.arange(0, BV)
        tile = dv[:, None] * K + dk[None, :]
        inside = (dv < V)[:, None] & in_k[None, :]
        ahead = S
        if i + BV < ROWS:
            ahead = tl.load(state + tile + BV * K, mask=(dv + BV < V)[:, None] & in_k[None, :], other=0.0)
        # [BV]
        c_v = 2 * Hk * K + head * V + dv
        v = _convolved(
            x,
            windows,
            weight,
            bias,
            c_v,
            dv < V,
            stride_window,
            stride_tap,
            stride_weight,
            stride_weight_tap,
            W,
            HAS_BIAS,
            SILU,
        )
        new, o = delta_update(S.to(tl.float32), q, k, v, g, beta)
        tl.store(state + tile, new.to(state.dtype.element_ty), mask=inside)
        tl.store(y + head * V + dv, o.to(y.dtype.element_ty), mask=dv < V)
        S = ahead
    # [ROWS, BW]; a thread may hold an entry that another still reads, hence the barrier
    c_v = 2 * Hk * K + head * V + rows
    rolled = _rolled(x, windows, c_v, in_rows, stride_window, stride_tap, W, BW)
    tl.debug_barrier()
    _store_window(windows, rolled, c_v, in_rows, stride_window, stride_tap, W, BW)
    if PARTS == 1:
        at = head * V + rows
        whole = _normed(
            tl.load(y + at, mask=in_rows, other=0.0), z + at, norm_weight + rows, in_rows, norm_eps, V, SIGMOID
        )
        tl.store(y + at, whole, mask=in_rows)
    else:
        last = tl.atomic_add(counters + row * Hk + key_head, 1, sem="acq_rel", scope="gpu")
    if last == READERS - 1:
        new_q = _rolled(x, windows, c_q, in_k, stride_window, stride_tap, W, BW)
        new_k = _rolled(x, windows, c_k, in_k, stride_window, stride_tap, W, BW)
        tl.debug_barrier()
        _store_window(windows, new_q, c_q, in_k, stride_window, stride_tap, W, BW)
        _store_window(windows, new_k, c_k, in_k, stride_window, stride_tap, W, BW)
        if READERS > 1:
            tl.store(counters + row * Hk + key_head, 0)
        if PARTS > 1:
            d = tl.arange(0, PARTS * ROWS)
            for i in tl.static_range(R):
                at = (key_head * R + i) * V + d
                # .cg: the other parts wrote through L2, an L1 line could be stale
                raw = tl.load(y + at, mask=d < V, other=0.0, cache_modifier=".cg")
                tl.store(y + at, _normed(raw, z + at, norm_weight + d, d < V, norm_eps, V, SIGMOID), mask=d < V)


def plan_fused_decode(heads: int, K: int, V: int, multiprocessors: int) -> dict[str, int]:
    """How many programs share a head, how many rows of the state each takes, and how many at a time.

    Args:
        heads: value heads times batch rows.
    """
    BK, whole = triton.next_power_of_2(K), triton.next_power_of_2(V)
    # Measured on an H200: one-warp programs beat larger ones at every batch. A few rows of the batch need the most programs and all of a
    # tile in flight at once; many need long programs, whose next tile is under way while one is worked on.
    if heads < 7 * multiprocessors:
        ROWS, BV = min(whole, 32), 32
    else:
        ROWS, BV = min(whole, 64), 8
    return {"BK": BK, "BV": min(ROWS, BV), "ROWS": ROWS, "PARTS": whole // ROWS, "num_warps": 1}


@cache
def _counters(device: torch.device, size: int) -> torch.Tensor:
    """Zeros that every launch leaves as zeros. Kept for good, as captured CUDA graphs remember their address; launches that may run at
    the same time on two streams must not share them, which one model's layers never do."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"run fused_gdn_decode once with {size} or more counters before capturing it in a CUDA graph"
        )
    return kept(lambda device: torch.zeros(size, dtype=torch.int32, device=device), device)


def fused_gdn_decode_triton(
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
    """Triton form of :func:`fused_gdn_decode`."""
    B, dim = mixed_qkv.shape
    _, Hv, V, K = ssm_state.shape
    check_state(ssm_state, Hv, K, V)
    Hk = split_packed(mixed_qkv, Hv, K, V)[0].shape[1]
    W = check_window(dim, conv_weight, conv_bias, conv_state)
    if ssm_state.stride()[1:] != (V * K, K, 1) or mixed_qkv.stride(1) != 1:
        raise ValueError(
            "slots of the state pool and rows of mixed_qkv must be contiguous, got strides "
            f"{ssm_state.stride()} and {mixed_qkv.stride()}"
        )
    if W < 2 or state_indices.shape != (B,) or gate_activation not in GATES:
        raise ValueError(
            f"needs a kernel of at least 2 taps, {B} slot indices and a gate of {GATES}; got {W}, "
            f"{tuple(state_indices.shape)} and {gate_activation!r}"
        )
    z = z.reshape(B, Hv * V)
    z, a, b = (t if t.stride(1) == 1 else t.contiguous() for t in (z, a, b))
    y = torch.empty(B, Hv, V, dtype=mixed_qkv.dtype, device=mixed_qkv.device) if out is None else out
    if not y.is_contiguous() or y.numel() != B * Hv * V:
        raise ValueError(f"out must be a contiguous [{B}, {Hv}, {V}], got {tuple(y.shape)} with strides {y.stride()}")
    if B == 0:
        return y
    plan = plan_fused_decode(B * Hv, K, V, multiprocessors(mixed_qkv.device))
    overlap = overlaps_launches(mixed_qkv.device)
    _fused_decode_kernel[(B * Hv * plan["PARTS"],)](
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
        ssm_state,
        state_indices.contiguous(),
        y,
        _counters(mixed_qkv.device, triton.next_power_of_2(max(B * Hk, 1 << 14))),
        K**-0.5 if scale is None else scale,
        eps,
        L2NORM_EPS,
        mixed_qkv.stride(0),
        z.stride(0),
        a.stride(0),
        b.stride(0),
        *conv_state.stride(),
        *conv_weight.stride(),
        ssm_state.stride(0),
        Hk=Hk,
        Hv=Hv,
        K=K,
        V=V,
        W=W,
        BW=triton.next_power_of_2(W),
        HAS_BIAS=conv_bias is not None,
        SILU=use_silu(activation),
        SIGMOID=gate_activation == "sigmoid",
        L2NORM=use_qk_l2norm_in_kernel,
        PDL=overlap,
        **({"launch_pdl": True} if overlap else {}),
        **plan,
    )
    return y


def fused_gdn_decode_torch(
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
    """PyTorch form of :func:`fused_gdn_decode`: the separate stages one after the other."""
    B = mixed_qkv.shape[0]
    _, Hv, V, _ = ssm_state.shape
    mixed = causal_conv1d_update_torch(mixed_qkv, conv_state, conv_weight, conv_bias, activation, state_indices)
    o, _ = fused_recurrent_gated_delta_rule_packed_decode_torch(
        mixed, a, b, A_log, dt_bias, scale, ssm_state, None, state_indices, use_qk_l2norm_in_kernel
    )
    y = rmsnorm_gated_torch(o.view(B, Hv, V), norm_weight, z.reshape(B, Hv, V), eps, gate_activation)
    # a padding row may carry garbage in z, and 0 * inf is not 0
    y = torch.where((state_indices >= 0)[:, None, None], y, 0)
    return y if out is None else out.copy_(y.view(out.shape))


def fused_gdn_decode(
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
    """From raw projections to the input of the output projection, for one token a row.

    Args:
        mixed_qkv: ``[B, 2*Hk*K + Hv*V]`` rows ``[q | k | v]`` straight from the projection, any row stride; not modified.
        z: ``[B, Hv*V]`` or ``[B, Hv, V]``, any row stride. a, b: ``[B, Hv]``, any row stride.
        conv_state: window pool ``[slots, dim, >= W-1]``. conv_weight: ``[dim, W]``. conv_bias: ``[dim]`` or None. Any strides; fastest
            with channels side by side, that is, as transposed views of ``[slots, W-1, dim]`` and ``[W, dim]``.
        A_log, dt_bias: ``[Hv]``. norm_weight: ``[V]``. eps: of the gated norm.
        ssm_state: pool ``[slots, Hv, V, K]``. state_indices: ``[B]``, the slot in both pools, distinct; negative marks a padding row.
        scale: factor on q; None means ``K ** -0.5``.
        out: ``[B, Hv, V]`` or ``[B, Hv*V]`` to write to.

    Returns:
        ``out``, or a new ``[B, Hv, V]`` in mixed_qkv's dtype; zeros in padding rows. Both pools are updated in place.
    """
    form = fused_gdn_decode_torch
    if mixed_qkv.is_cuda:
        heads = mixed_qkv.shape[0] * ssm_state.shape[1]
        vectors = A_log, dt_bias, norm_weight
        cuda = prefers_cuda(heads, ssm_state.dtype, multiprocessors(mixed_qkv.device))
        cuda = cuda and fits_fused_decode_cuda(mixed_qkv, conv_state, conv_weight, vectors, ssm_state)
        form = fused_gdn_decode_cuda if cuda else fused_gdn_decode_triton
    return form(
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
        state_indices,
        scale,
        out,
        activation,
        gate_activation,
        use_qk_l2norm_in_kernel,
    )
