"""Pieces of Triton code that the attention kernels share."""

import torch
import triton
import triton.language as tl

from vllm.model_executor.layers.fla.ops.device import INTERPRETED, before_e4m3, dot

from .attention_torch import Pages, ProjectedRows

LOG2E = 1.4426950408889634


@triton.jit
def normed_and_turned(
    at, valid, weight, cos_sin, eps, D: tl.constexpr, BD: tl.constexpr, ROTARY: tl.constexpr, DTYPE: tl.constexpr
):
    """Rows of D features through the RMS norm (factor 1 + weight) and turned: [R, BD] in DTYPE, rounded where PyTorch stores.

    at: [R] pointers to the rows. cos_sin: of the one position that all of them have.
    """
    HALF: tl.constexpr = ROTARY // 2
    d = tl.arange(0, BD)
    turned = d < ROTARY
    other = tl.where(d < HALF, d + HALF, d - HALF)  # the feature that each one turns with
    inside = valid[:, None] & (d < D)[None, :]
    # [R, BD]
    x = tl.load(at[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float32)
    y = tl.load(at[:, None] + other[None, :], mask=inside & turned[None, :], other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None]
    weight_x = 1.0 + tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
    weight_y = 1.0 + tl.load(weight + other, mask=turned, other=0.0).to(tl.float32)
    cos = tl.load(cos_sin + d % HALF, mask=turned, other=1.0)
    sin = tl.load(cos_sin + HALF + d % HALF, mask=turned, other=0.0)
    sin = tl.where(d < HALF, -sin, sin)
    x = (x * rstd * weight_x[None, :]).to(DTYPE).to(tl.float32)
    y = (y * rstd * weight_y[None, :]).to(DTYPE).to(tl.float32)
    return (x * cos[None, :] + y * sin[None, :]).to(DTYPE)


@triton.jit
def as_stored(x, inverse_scale, FLOAT8: tl.constexpr, STORED: tl.constexpr):
    """x as pages hold it."""
    if FLOAT8:
        x = before_e4m3(tl.minimum(tl.maximum(x.to(tl.float32) * inverse_scale, -448.0), 448.0))
    return x.to(STORED)


@triton.jit
def tile_offsets(page, n, d, stride_page, HKV: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, WIDE: tl.constexpr):
    """Where the features d of the positions n [BN] lie, keys and values alike: [BN, BD]. page: of each position.

    WIDE: whether offsets need 64 bits; the arithmetic of addresses is a good part of a tile's instructions.
    """
    if WIDE:
        page = page.to(tl.int64)
    return (page * stride_page + (n % PAGE) * (HKV * D))[:, None] + d[None, :]


@triton.jit
def attend_tile(
    q, k, v, visible, scale_log2, m, l, acc, MASKED: tl.constexpr, LATER: tl.constexpr, COMPUTE: tl.constexpr
):
    """One tile of keys and values into the running softmax: q [R, BD] in COMPUTE; k, v [BN, BD]; visible [R or 1, BN] if MASKED.

    m: largest score so far in powers of two [R]; l: sum of weights [R], or [R, BN] where the sum is left for LATER;
    acc: weighted sum of values [R, BD].
    """
    k, v = k.to(COMPUTE), v.to(COMPUTE)
    s = dot(q, tl.trans(k)) * scale_log2
    if MASKED:
        s = tl.where(visible, s, float("-inf"))
    top = tl.maximum(m, tl.max(s, axis=1))
    decay, p = tl.exp2(m - top), tl.exp2(s - top[:, None])
    if LATER:
        l = l * decay[:, None] + p
    else:
        l = l * decay + tl.sum(p, axis=1)
    if INTERPRETED:
        acc = acc * decay[:, None] + tl.dot(p, v.to(tl.float32))
    else:
        acc = tl.dot(p.to(COMPUTE), v, acc * decay[:, None], input_precision="tf32x3")
    return top, l, acc


def page_arguments(pages: Pages) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Keys, values and the elements between two pages of either. Raises ValueError where tokens of a page are not side by side."""
    keys, values = pages.keys, pages.values
    _, block, heads, D = keys.shape
    inner = (heads * D, D, 1)
    if keys.shape != values.shape or keys.stride() != values.stride() or keys.stride()[1:] != inner:
        raise ValueError(
            f"keys and values must be alike, pages contiguous inside; got {tuple(keys.shape)} and {tuple(values.shape)} with strides "
            f"{keys.stride()} and {values.stride()}"
        )
    if block & (block - 1):
        raise ValueError(f"pages must hold a power of two of tokens, got {block}")
    return keys, values, keys.stride(0)


def row_constants(rows: ProjectedRows, pages: Pages) -> dict[str, object]:
    """What the kernels must know of a row when they are compiled."""
    num_kv_heads, D = pages.keys.shape[2:]
    if rows.qkv.stride(1) != 1 or rows.cos_sin.stride() != (rows.cos_sin.shape[1], 1):
        raise ValueError(
            f"rows must be contiguous inside, got strides {rows.qkv.stride()} and {rows.cos_sin.stride()} for cos_sin"
        )
    if rows.head_size != D or rows.cos_sin.dtype != torch.float32:
        raise ValueError(
            f"needs norm weights of {D} and float32 cos_sin, got {rows.head_size} and {rows.cos_sin.dtype}"
        )
    return {
        "G": rows.num_heads(num_kv_heads) // num_kv_heads,
        "HKV": num_kv_heads,
        "D": D,
        "BD": triton.next_power_of_2(D),
        "ROTARY": rows.cos_sin.shape[1],
        "PAGE": pages.block_size,
        "FLOAT8": pages.float8,
        "WIDE": pages.keys.shape[0] * pages.keys.stride(0) >= 1 << 31,
    }
