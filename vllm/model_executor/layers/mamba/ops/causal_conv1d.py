"""Depthwise causal convolution with a rolling window: whole sequences here, one or a few tokens a row in ``causal_conv1d_update.py``.

``y_t = act(bias + sum_j w[j] x_{t-(W-1)+j})`` per channel, accumulated in float32 and returned in x's dtype. The window pool holds the
last W-1 raw inputs of each slot, oldest first, so that a sequence cut anywhere continues exactly.
"""

import torch
import triton
import triton.language as tl

from .causal_conv1d_update import causal_conv1d_update, check_window, convolve, slot_ids, use_silu
from .slots import PAD_SLOT_ID, HostLengths, gather_slots, host_cu_seqlens, scatter_slots

__all__ = ["PAD_SLOT_ID", "causal_conv1d_fn", "causal_conv1d_update"]


# Integers that say where rows are may start anywhere: behind those of decoding sequences, say.
_PLACES = ("starts", "slots", "continues")


@triton.jit(do_not_specialize=["T", "N", "steps"], do_not_specialize_on_alignment=_PLACES)
def _conv_fn_kernel(
    x,
    weight,
    bias,
    windows,
    starts,
    slots,
    continues,
    y,
    T,
    N,
    steps,
    dim,
    stride_x_dim,
    stride_x_tok,
    stride_slot,
    stride_window,
    stride_tap,
    pad_slot_id,
    stride_weight,
    stride_weight_tap,
    W: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    HAS_FLAGS: tl.constexpr,
    SILU: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """y [T, dim]: blocks of tokens, cut without regard to sequences; every token finds its own by bisection."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    low = tl.zeros([BT], tl.int32)
    high = low + N
    for _ in range(steps):
        middle = (low + high) // 2
        after = tl.load(starts + middle).to(tl.int32) <= t
        low, high = tl.where(after, middle, low), tl.where(after, high, middle)
    begin = tl.load(starts + low).to(tl.int32)
    real = t < tl.load(starts + low + 1).to(tl.int32)
    slot = tl.load(slots + low).to(tl.int64) if HAS_SLOTS else low.to(tl.int64)
    real = real & (slot >= 0) & (slot != pad_slot_id)
    old = low < 0
    if HAS_FLAGS:
        old = real & (tl.load(continues + low) != 0)
    in_dim = d < dim
    acc = tl.zeros([BT, BD], tl.float32)
    if HAS_BIAS:
        acc += tl.load(bias + d, mask=in_dim, other=0.0).to(tl.float32)[None, :]
    # no input of this block lies before its sequence: true of all blocks but the first of each, and one mask fewer a tap
    inner = tl.min(tl.where(real, t - begin, 0), axis=0) >= W - 1
    for j in tl.static_range(W):
        source = t - (W - 1) + j
        w = tl.load(weight + d * stride_weight + j * stride_weight_tap, mask=in_dim, other=0.0).to(tl.float32)
        # [BT, BD]
        at_x = x + source[:, None].to(tl.int64) * stride_x_tok + d[None, :].to(tl.int64) * stride_x_dim
        if inner:
            value = tl.load(at_x, mask=in_dim[None, :], other=0.0).to(tl.float32)
        else:
            from_x = (real & (source >= begin))[:, None] & in_dim[None, :]
            from_window = (old & (source < begin))[:, None] & in_dim[None, :]
            entry = slot * stride_slot + (source - begin + W - 1) * stride_tap
            kept = tl.load(windows + entry[:, None] + d[None, :] * stride_window, mask=from_window, other=0.0)
            # a window in another dtype counts as if it had been an input
            value = tl.load(at_x, mask=from_x, other=0.0).to(tl.float32) + kept.to(x.dtype.element_ty).to(tl.float32)
        acc += value * w[None, :]
    if SILU:
        acc *= tl.sigmoid(acc)
    acc = tl.where(real[:, None], acc, 0.0)
    at = t[:, None].to(tl.int64) * dim + d[None, :]
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=(t < T)[:, None] & in_dim[None, :])


@triton.jit(do_not_specialize_on_alignment=_PLACES)
def _conv_window_kernel(
    x,
    windows,
    starts,
    slots,
    continues,
    dim,
    stride_x_dim,
    stride_x_tok,
    stride_slot,
    stride_window,
    stride_tap,
    pad_slot_id,
    W: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    HAS_FLAGS: tl.constexpr,
    BD: tl.constexpr,
    BW: tl.constexpr,
):
    """The window each sequence leaves behind. A launch of its own: blocks of the first one may still read the old window."""
    n = tl.program_id(0)
    d = (tl.program_id(1) * BD + tl.arange(0, BD))[:, None]
    j = tl.arange(0, BW)[None, :]
    begin, end = tl.load(starts + n).to(tl.int32), tl.load(starts + n + 1).to(tl.int32)
    slot = tl.load(slots + n).to(tl.int64) if HAS_SLOTS else n.to(tl.int64)
    if (end > begin) & (slot >= 0) & (slot != pad_slot_id):
        inside = (d < dim) & (j < W - 1)
        source = end - (W - 1) + j
        # [BD, BW]
        value = tl.load(
            x + source.to(tl.int64) * stride_x_tok + d.to(tl.int64) * stride_x_dim,
            mask=inside & (source >= begin),
            other=0.0,
        ).to(windows.dtype.element_ty)
        window = windows + slot * stride_slot + d * stride_window
        if HAS_FLAGS:
            old = inside & (source < tl.where(tl.load(continues + n) != 0, begin, -W))
            kept = tl.load(window + (source - begin + W - 1) * stride_tap, mask=old, other=0.0)
            value = tl.where(old, kept, value)
            # another thread may hold the entry this one overwrites
            tl.debug_barrier()
        tl.store(window + j * stride_tap, value, mask=inside)


def plan_conv(tokens: int, dim: int) -> dict[str, int]:
    """Tile of the prefill convolution: channels lie side by side in memory, so a cache line of them or more. Long prompts take many
    tokens at once, whose taps find each other's inputs in the nearest cache."""
    BT, BD = (32, 64) if tokens >= 512 else (4, 128)
    return {"BT": BT, "BD": min(BD, triton.next_power_of_2(dim)), "num_warps": 4}


def causal_conv1d_fn_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    conv_states: torch.Tensor,
    query_start_loc: torch.Tensor,
    cache_indices: torch.Tensor | None = None,
    has_initial_state: torch.Tensor | None = None,
    activation: str | None = "silu",
    pad_slot_id: int = PAD_SLOT_ID,
    query_start_loc_cpu: HostLengths | None = None,
) -> torch.Tensor:
    """Triton form of :func:`causal_conv1d_fn`: one launch for the outputs, one for the windows."""
    dim, T = x.shape
    width = check_window(dim, weight, bias, conv_states)
    N = query_start_loc.numel() - 1
    y = torch.empty(T, dim, dtype=x.dtype, device=x.device)
    if N <= 0 or T == 0:
        return y.zero_().T
    if cache_indices is not None and cache_indices.shape != (N,):
        raise ValueError(f"expected slot indices for {N} sequences, got {tuple(cache_indices.shape)}")
    flags = None if has_initial_state is None else has_initial_state.bool().view(torch.uint8)
    plan = plan_conv(T, dim)
    switches = {"HAS_SLOTS": cache_indices is not None, "HAS_FLAGS": flags is not None}
    strides = (*x.stride(), *conv_states.stride(), pad_slot_id)
    _conv_fn_kernel[(triton.cdiv(T, plan["BT"]), triton.cdiv(dim, plan["BD"]))](
        x,
        weight,
        bias,
        conv_states,
        query_start_loc,
        cache_indices,
        flags,
        y,
        T,
        N,
        N.bit_length(),
        dim,
        *strides,
        *weight.stride(),
        W=width,
        HAS_BIAS=bias is not None,
        SILU=use_silu(activation),
        **switches,
        **plan,
    )
    BD = min(256, triton.next_power_of_2(dim))
    _conv_window_kernel[(N, triton.cdiv(dim, BD))](
        x,
        conv_states,
        query_start_loc,
        cache_indices,
        flags,
        dim,
        *strides,
        W=width,
        **switches,
        BD=BD,
        BW=triton.next_power_of_2(max(width - 1, 1)),
        num_warps=4,
    )
    return y.T


def causal_conv1d_fn_torch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    conv_states: torch.Tensor,
    query_start_loc: torch.Tensor,
    cache_indices: torch.Tensor | None = None,
    has_initial_state: torch.Tensor | None = None,
    activation: str | None = "silu",
    pad_slot_id: int = PAD_SLOT_ID,
    query_start_loc_cpu: HostLengths | None = None,
) -> torch.Tensor:
    """PyTorch form of :func:`causal_conv1d_fn`, one sequence after the other."""
    dim, T = x.shape
    keep = check_window(dim, weight, bias, conv_states) - 1
    starts = host_cu_seqlens(1, T, query_start_loc, query_start_loc_cpu)
    N = len(starts) - 1
    slots = slot_ids(cache_indices, N, pad_slot_id, x.device)
    window = gather_slots(conv_states, slots)[..., :keep].to(x.dtype)  # [N, dim, W-1]
    if has_initial_state is None:
        window = torch.zeros_like(window)
    else:
        window = torch.where(has_initial_state.bool()[:, None, None], window, torch.zeros_like(window))
    out = torch.zeros_like(x)
    last = gather_slots(conv_states, slots)
    silu = use_silu(activation)
    for n in range(N):
        begin, end = starts[n], starts[n + 1]
        if begin == end:
            continue
        history = torch.cat([window[n], x[:, begin:end]], dim=-1)
        out[:, begin:end] = torch.where(slots[n] >= 0, convolve(history, weight, bias, silu), 0).to(x.dtype)
        last[n, :, :keep] = history[:, history.shape[-1] - keep :]
    scatter_slots(conv_states, slots, last)
    return out


def causal_conv1d_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    conv_states: torch.Tensor,
    query_start_loc: torch.Tensor,
    cache_indices: torch.Tensor | None = None,
    has_initial_state: torch.Tensor | None = None,
    activation: str | None = "silu",
    pad_slot_id: int = PAD_SLOT_ID,
    query_start_loc_cpu: HostLengths | None = None,
) -> torch.Tensor:
    """Convolve N sequences laid end to end, continuing from their windows, and write the windows back in place.

    Args:
        x: ``[dim, T]``. weight: ``[dim, W]``. bias: ``[dim]`` or None. conv_states: window pool ``[slots, dim, >= W-1]``. All may have any
            strides and are fastest with channels side by side, that is, as transposed views of ``[T, dim]``, ``[W, dim]`` and
            ``[slots, W-1, dim]``.
        query_start_loc: ``[N + 1]`` starts of the sequences; tokens past the last one come out as zeros.
        cache_indices: ``[N]`` slot of each sequence (0..N-1 by default). Negative or ``pad_slot_id``: the sequence is skipped, its
            outputs are zeros.
        has_initial_state: ``[N]`` bool; False (the default for all) starts from a window of zeros.
        activation: None, "silu" or "swish".
        query_start_loc_cpu: the starts on the host, for the PyTorch form on a device; the kernels do not need it.

    Returns:
        ``[dim, T]`` in x's dtype and layout. A sequence of no tokens leaves its window untouched.
    """
    form = causal_conv1d_fn_triton if x.is_cuda else causal_conv1d_fn_torch
    return form(
        x,
        weight,
        bias,
        conv_states,
        query_start_loc,
        cache_indices,
        has_initial_state,
        activation,
        pad_slot_id,
        query_start_loc_cpu,
    )
