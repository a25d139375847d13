"""Causal convolution of the next one or few tokens of each row (decode), and what both convolutions share.

The window pool holds the last W-1 raw inputs of each slot, oldest first. Windows may be longer, ``[slots, dim, W-1 + drafts]``: without
``num_accepted_tokens`` their first W-1 entries are the window.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .slots import PAD_SLOT_ID, gather_slots, scatter_slots

ACTIVATIONS = (None, "silu", "swish")


def use_silu(activation: str | bool | None) -> bool:
    if isinstance(activation, bool):
        return activation
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    return activation is not None


def check_window(dim: int, weight: torch.Tensor, bias: torch.Tensor | None, window: torch.Tensor) -> int:
    if weight.dim() != 2 or weight.shape[0] != dim:
        raise ValueError(f"weight must be [dim, width] with dim {dim}, got {tuple(weight.shape)}")
    if bias is not None and bias.shape != (dim,):
        raise ValueError(f"bias must be [{dim}], got {tuple(bias.shape)}")
    width = weight.shape[1]
    if window.dim() != 3 or window.shape[1] != dim or window.shape[2] < width - 1:
        raise ValueError(f"the window pool must be [slots, {dim}, >= {width - 1}], got {tuple(window.shape)}")
    return width


def slot_ids(indices: torch.Tensor | None, n: int, pad_slot_id: int, device: torch.device) -> torch.Tensor:
    """``[N]`` slots with every kind of padding turned into -1."""
    if indices is None:
        return torch.arange(n, device=device)
    if indices.shape[:1] != (n,):
        raise ValueError(f"expected slot indices for {n} sequences, got {tuple(indices.shape)}")
    return indices.masked_fill(indices == pad_slot_id, -1)


def convolve(history: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, silu: bool) -> torch.Tensor:
    """history ``[..., dim, W-1 + L]`` -> float32 ``[..., dim, L]``."""
    width = weight.shape[1]
    length = history.shape[-1] - width + 1
    history, weight = history.float(), weight.float()
    y = 0 if bias is None else bias.float()[:, None]
    for j in range(width):
        y = y + history[..., j : j + length] * weight[:, j, None]
    return F.silu(y) if silu else y


def _check_drafts(num_accepted_tokens: torch.Tensor | None, width: int, length: int, state_len: int) -> None:
    if num_accepted_tokens is not None and width - 2 + length > state_len:
        raise ValueError(
            f"a window of {state_len} entries cannot hold the {width - 2 + length} inputs of {length} tokens a row"
        )


@triton.jit
def _conv_update_kernel(
    x,
    weight,
    bias,
    windows,
    slots,
    accepted,
    starts,
    y,
    dim,
    length,
    stride_x_row,
    stride_x_dim,
    stride_x_tok,
    stride_y_row,
    stride_y_dim,
    stride_y_tok,
    stride_slot,
    stride_window,
    stride_tap,
    stride_weight,
    stride_weight_tap,
    stride_slots,
    pad_slot_id,
    W: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    HAS_ACCEPTED: tl.constexpr,
    VARLEN: tl.constexpr,
    SILU: tl.constexpr,
    BD: tl.constexpr,
    BS: tl.constexpr,
):
    n = tl.program_id(0)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    in_dim = d < dim
    if VARLEN:
        begin = tl.load(starts + n).to(tl.int64)
        tokens = (tl.load(starts + n + 1) - begin).to(tl.int32)
        x += begin * stride_x_tok + d.to(tl.int64) * stride_x_dim
        y += begin * stride_y_tok + d.to(tl.int64) * stride_y_dim
    else:
        tokens = length
        x += n.to(tl.int64) * stride_x_row + d.to(tl.int64) * stride_x_dim
        y += n.to(tl.int64) * stride_y_row + d.to(tl.int64) * stride_y_dim
    slot = tl.load(slots + n * stride_slots).to(tl.int64) if HAS_SLOTS else n.to(tl.int64)
    if (slot < 0) | (slot == pad_slot_id):
        for t in range(tokens):
            tl.store(y + t * stride_y_tok, tl.zeros([BD], y.dtype.element_ty), mask=in_dim)
        return
    first = 0
    if HAS_ACCEPTED:
        first = tl.maximum(tl.load(accepted + n).to(tl.int32) - 1, 0)
    window = windows + slot * stride_slot + d * stride_window
    for t in range(tokens):
        acc = tl.zeros([BD], tl.float32)
        if HAS_BIAS:
            acc += tl.load(bias + d, mask=in_dim, other=0.0).to(tl.float32)
        for j in tl.static_range(W):
            source = t - (W - 1) + j
            # [BD]
            value = tl.load(x + source * stride_x_tok, mask=d < tl.where(source >= 0, dim, 0), other=0.0).to(tl.float32)
            kept = tl.load(
                window + (first + source + W - 1) * stride_tap, mask=d < tl.where(source < 0, dim, 0), other=0.0
            )
            w = tl.load(weight + d * stride_weight + j * stride_weight_tap, mask=in_dim, other=0.0).to(tl.float32)
            acc += (value + kept.to(x.dtype.element_ty).to(tl.float32)) * w
        if SILU:
            acc *= tl.sigmoid(acc)
        tl.store(y + t * stride_y_tok, acc.to(y.dtype.element_ty), mask=in_dim)
    # the new window, as entries of [old window | x]: without drafts the last W-1, with drafts all but the oldest
    if tokens > 0:
        s = tl.arange(0, BS)
        if HAS_ACCEPTED:
            entry, size = 1 + s, W - 2 + tokens
        else:
            entry, size = tokens + s, W - 1
        inside = in_dim[:, None] & (s < size)[None, :]
        # [BD, BS]
        kept = tl.load(
            window[:, None] + ((first + entry) * stride_tap)[None, :], mask=inside & (entry < W - 1)[None, :], other=0.0
        )
        value = tl.load(
            x[:, None] + ((entry - (W - 1)) * stride_x_tok)[None, :], mask=inside & (entry >= W - 1)[None, :], other=0.0
        )
        new = tl.where((entry < W - 1)[None, :], kept, value.to(kept.dtype))
        # another thread may hold the entry this one overwrites
        tl.debug_barrier()
        tl.store(window[:, None] + (s * stride_tap)[None, :], new, mask=inside)


def causal_conv1d_update_triton(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | bool | None = None,
    conv_state_indices: torch.Tensor | None = None,
    num_accepted_tokens: torch.Tensor | None = None,
    query_start_loc: torch.Tensor | None = None,
    max_query_len: int = -1,
    pad_slot_id: int = PAD_SLOT_ID,
) -> torch.Tensor:
    """Triton form of :func:`causal_conv1d_update`."""
    varlen = query_start_loc is not None
    dim, length = x.shape[1], max_query_len if varlen else (1 if x.dim() == 2 else x.shape[2])
    width = check_window(dim, weight, bias, conv_state)
    if varlen:
        N = query_start_loc.numel() - 1
        y = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
        x_strides, y_strides = (0, x.stride(1), x.stride(0)), (0, 1, dim)
    else:
        N = x.shape[0]
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        x_strides, y_strides = (*x.stride(), 0)[:3], (*y.stride(), 0)[:3]
    _check_drafts(num_accepted_tokens, width, length, conv_state.shape[2])
    if N <= 0 or x.numel() == 0:
        return y
    slots = conv_state_indices
    if slots is not None and slots.shape[0] != N:
        raise ValueError(f"expected slot indices for {N} sequences, got {tuple(slots.shape)}")
    size = width - 1 if num_accepted_tokens is None else width - 2 + length
    BD = min(256 if N * dim >= 1 << 18 else 128, triton.next_power_of_2(dim))
    _conv_update_kernel[(N, triton.cdiv(dim, BD))](
        x,
        weight,
        bias,
        conv_state,
        slots,
        num_accepted_tokens,
        query_start_loc,
        y,
        dim,
        length,
        *x_strides,
        *y_strides,
        *conv_state.stride(),
        *weight.stride(),
        0 if slots is None else slots.stride(0),
        pad_slot_id,
        W=width,
        HAS_BIAS=bias is not None,
        HAS_SLOTS=slots is not None,
        HAS_ACCEPTED=num_accepted_tokens is not None,
        VARLEN=varlen,
        SILU=use_silu(activation),
        BD=BD,
        BS=triton.next_power_of_2(max(size, 1)),
        num_warps=4,
    )
    return y


def _as_rows(
    x: torch.Tensor, query_start_loc: torch.Tensor | None, max_query_len: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """x as ``[N, dim, L]``, and the number of tokens of each row ``[N]``."""
    if query_start_loc is None:
        rows = x[..., None] if x.dim() == 2 else x
        return rows, torch.full((rows.shape[0],), rows.shape[2], dtype=torch.long, device=x.device)
    if max_query_len <= 0:
        raise ValueError(f"query_start_loc needs max_query_len > 0, got {max_query_len}")
    starts = query_start_loc.long()
    lengths = starts[1:] - starts[:-1]
    lane = torch.arange(max_query_len, device=x.device)
    tokens = (starts[:-1, None] + lane).clamp(max=x.shape[0] - 1)
    return x[tokens].transpose(1, 2), lengths


def causal_conv1d_update_torch(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | bool | None = None,
    conv_state_indices: torch.Tensor | None = None,
    num_accepted_tokens: torch.Tensor | None = None,
    query_start_loc: torch.Tensor | None = None,
    max_query_len: int = -1,
    pad_slot_id: int = PAD_SLOT_ID,
) -> torch.Tensor:
    """PyTorch form of :func:`causal_conv1d_update`: rows are padded to one length and handled together."""
    rows, lengths = _as_rows(x, query_start_loc, max_query_len)
    N, dim, L = rows.shape
    width = check_window(dim, weight, bias, conv_state)
    _check_drafts(num_accepted_tokens, width, L, conv_state.shape[2])
    keep = width - 1
    slots = slot_ids(conv_state_indices, N, pad_slot_id, x.device)
    if slots.dim() == 2:
        slots = slots[:, 0]
    old = gather_slots(conv_state, slots)  # [N, dim, state_len]
    first = torch.zeros(N, dtype=torch.long, device=x.device)
    if num_accepted_tokens is not None:
        first = (num_accepted_tokens.long() - 1).clamp(min=0)
    lane = torch.arange(keep, device=x.device)
    window = old.gather(2, (first[:, None] + lane)[:, None, :].expand(N, dim, keep)).to(x.dtype)
    history = torch.cat([window, rows], dim=-1)  # [N, dim, W-1 + L]
    out = convolve(history, weight, bias, use_silu(activation)).to(x.dtype)
    out = torch.where((slots >= 0)[:, None, None], out, 0)
    # plain decode keeps the last W-1 inputs; with drafts everything but the oldest stays, for the next call to start inside
    if num_accepted_tokens is None:
        new_first, new_len = lengths, keep
    else:
        new_first, new_len = lengths.clamp(max=1), keep + L - 1
    lane = torch.arange(new_len, device=x.device)
    take = (new_first[:, None] + lane).clamp(max=keep + L - 1)
    stored = lane < (keep if num_accepted_tokens is None else keep - 1 + lengths[:, None])
    new = old.clone()
    moved = history.gather(2, take[:, None, :].expand(N, dim, new_len)).to(new.dtype)
    new[..., :new_len] = torch.where(stored.expand(N, new_len)[:, None, :], moved, old[..., :new_len])
    scatter_slots(conv_state, slots, torch.where((lengths > 0)[:, None, None], new, old))
    if query_start_loc is None:
        return out.reshape(x.shape)
    # rows back to tokens: padding lanes all land on one spare token, which is dropped
    lane = torch.arange(L, device=x.device)
    token = torch.where(lane < lengths[:, None], query_start_loc[:-1, None].long() + lane, x.shape[0])
    flat = x.new_zeros(x.shape[0] + 1, dim)
    flat[token.reshape(-1)] = out.transpose(1, 2).reshape(-1, dim)
    return flat[:-1]


def causal_conv1d_update(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | bool | None = None,
    conv_state_indices: torch.Tensor | None = None,
    num_accepted_tokens: torch.Tensor | None = None,
    query_start_loc: torch.Tensor | None = None,
    max_query_len: int = -1,
    pad_slot_id: int = PAD_SLOT_ID,
) -> torch.Tensor:
    """Convolve the next token (or few tokens) of each row and roll its window, in place.

    Args:
        x: ``[N, dim]``, ``[N, dim, L]``, or, with ``query_start_loc`` ``[N + 1]``, ``[T, dim]`` holding up to ``max_query_len`` tokens
            a row. Not modified.
        conv_state: window pool ``[slots, dim, state_len]``, state_len >= W-1, any strides; fastest as a transposed view of
            ``[slots, state_len, dim]``.
        weight: ``[dim, W]``, any strides. bias: ``[dim]`` or None. activation: None, "silu", "swish" or a bool (True is silu).
        conv_state_indices: ``[N]`` slots (of ``[N, *]`` the first column counts). Negative or ``pad_slot_id``: a padding row, which
            reads and writes nothing and comes out as zeros.
        num_accepted_tokens: ``[N]``, for speculative decoding: of the previous call's tokens this many were kept, so the window begins
            at entry ``num_accepted_tokens - 1``, and all inputs but the oldest are stored for the next call to choose from
            (state_len >= W-2 + tokens a row).

    Returns:
        A new tensor of x's shape and dtype.
    """
    form = causal_conv1d_update_triton if x.is_cuda else causal_conv1d_update_torch
    return form(
        x,
        conv_state,
        weight,
        bias,
        activation,
        conv_state_indices,
        num_accepted_tokens,
        query_start_loc,
        max_query_len,
        pad_slot_id,
    )
