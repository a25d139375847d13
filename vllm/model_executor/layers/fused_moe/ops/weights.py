"""Stored weights as the expert kernels read them, and the order that this asks of activations.

A word of an integer format holds several neighbours of a row. A thread takes words, so element i of all its words meets the inputs
P*c + i, P elements a word: kernels therefore keep activations by *planes*, [i = 0 of all words | i = 1 of all words | ...]. For formats
of one element a word that is the natural order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from vllm.model_executor.layers.fla.ops.device import INTERPRETED, overlaps_launches

if TYPE_CHECKING:
    from vllm.model_executor.layers.quantization.base import KernelWeight

PLANES = {"plain": 1, "int4": 8, "int8": 4, "fp8": 1, "fp4": 2}
"""Elements of a row in one stored word."""

SIXTEEN_BIT = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class MoEWeights:
    """What one layer multiplies with: router [E, D]; experts w13 [E, 2I, D] (gate rows, then up) and w2 [E, D, I].

    With a shared expert also its gate [1, D], s13 [2S, D] and s2 [D, S]; without, all three are None.
    """

    router: torch.Tensor
    w13: KernelWeight
    w2: KernelWeight
    gate: torch.Tensor | None = None
    s13: KernelWeight | None = None
    s2: KernelWeight | None = None

    @property
    def parts(self) -> list[KernelWeight]:
        return [part for part in (self.w13, self.w2, self.s13, self.s2) if part is not None]


def fits(x: torch.Tensor, weights: MoEWeights) -> bool:
    """Whether the kernels take these activations and weights."""
    plain = [weights.router, *([] if weights.gate is None else [weights.gate])]
    plain += [part.values for part in weights.parts if part.kind == "plain"]
    alike = x.dtype in SIXTEEN_BIT and all(w.dtype == x.dtype for w in plain)
    return alike and all(regular(part) and part.values.is_contiguous() for part in weights.parts)


def regular(weight: KernelWeight) -> bool:
    """Whether rows are whole groups of whole words, and a group is a power of two of words unless it is the row."""
    rows, words = weight.values.shape[-2:]
    planes = PLANES[weight.kind]
    if weight.scale is None:
        return True
    short = weight.kind == "fp4" and weight.scale.dtype == torch.float8_e4m3fn
    if not short and weight.scale.dtype not in (*SIXTEEN_BIT, torch.float32):
        return False
    group = min(weight.group, words * planes)
    if group % planes or words * planes % group or (weight.values.dim() > 2 and rows % weight.scale_rows):
        return False
    group_words = group // planes
    return group_words == words or group_words & (group_words - 1) == 0


def operands(weight: KernelWeight, name: str) -> dict[str, object]:
    """Arguments of a kernel that reads `weight` under this name."""
    words, planes = weight.values.shape[-1], PLANES[weight.kind]
    group = 0 if weight.scale is None else min(weight.group, words * planes) // planes
    scale, zero, row_scale = (
        None if part is None else _bytes_of_fp8(part.contiguous())
        for part in (weight.scale, weight.zero, weight.row_scale)
    )
    return {
        name: _bytes_of_fp8(weight.values),
        f"{name}_scale": scale,
        f"{name}_zero": zero,
        f"{name}_factor": row_scale,
        f"{name.upper()}_KIND": weight.kind,
        f"{name.upper()}_WORDS": words,
        f"{name.upper()}_GROUP": group,  # in words; 0: no scales
        f"{name.upper()}_SCALE_ROWS": weight.scale_rows,
    }


def _bytes_of_fp8(tensor: torch.Tensor) -> torch.Tensor:
    """Floats of 8 bits as bytes, which kernels load and then take for floats."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


def absent(name: str, words: int) -> dict[str, object]:
    """`operands` of a matrix that is not there."""
    pointers = dict.fromkeys((name, f"{name}_scale", f"{name}_zero", f"{name}_factor"))
    upper = name.upper()
    return pointers | {f"{upper}_KIND": "", f"{upper}_WORDS": words, f"{upper}_GROUP": 0, f"{upper}_SCALE_ROWS": 1}


def overlapping(device: torch.device) -> dict[str, bool]:
    """Launch options of kernels that wait for the one before by themselves."""
    overlap = overlaps_launches(device)
    return {"PDL": overlap} | ({"launch_pdl": True} if overlap else {})


def dense(weight: KernelWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """W [..., N, K], from the definition."""
    q, kind = weight.values, weight.kind
    if kind in ("int4", "int8"):
        bits = 4 if kind == "int4" else 8
        shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=q.device)
        q = ((q[..., None] >> shifts) & (2**bits - 1)).flatten(-2).float()
        zero = 2.0 ** (bits - 1)
    elif kind == "fp4":
        codes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], device=q.device)
        q = torch.stack([q & 15, q >> 4], dim=-1).flatten(-2).long()
        q, zero = codes[q & 7] * (1 - 2 * (q >> 3)), 0.0
    else:
        q, zero = q.float(), 0.0
    if weight.scale is None:
        return q.to(dtype)
    rows = torch.arange(q.shape[-2], device=q.device) // weight.scale_rows
    columns = torch.arange(q.shape[-1], device=q.device) // weight.group
    if weight.zero is not None:
        zero = weight.zero.float()[..., rows, :][..., columns]
    w = (q - zero) * weight.scale.float()[..., rows, :][..., columns]
    return (w if weight.row_scale is None else w * weight.row_scale[..., None]).to(dtype)


@triton.jit
def _mask_or(x, MASK: tl.constexpr, BITS: tl.constexpr):
    """``x & MASK | BITS`` in one instruction: with two constants, ptxas makes it two."""
    if INTERPRETED:
        return (x & MASK) | BITS
    else:
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xEA;", "=r,r,r,r", [x, MASK, BITS], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def element(w, i: tl.constexpr, KIND: tl.constexpr):
    """Element i of each word in float32, `offset(i)` too large."""
    if KIND == "int4":
        # A nibble becomes a float where it lies in the mantissa: at bit 16 under the exponent of 128, at bit 12 under that of 2048.
        LEFT: tl.constexpr = 16 - 8 * ((i + 1) // 2)
        bits = w << LEFT if LEFT >= 0 else w >> -LEFT
        bits = _mask_or(bits, 0x000F0000, 0x43000000) if i % 2 == 0 else _mask_or(bits, 0x0000F000, 0x45000000)
        q = bits.to(tl.float32, bitcast=True)
    elif KIND == "int8":
        # at bit 15 under the exponent of 256
        bits = w << (15 - 8 * i) if i < 2 else w >> (8 * i - 15)
        q = _mask_or(bits, 0x007F8000, 0x43800000).to(tl.float32, bitcast=True)
    elif KIND == "fp4":
        # e2m1's exponent and mantissa are the lowest of a float32's, but for the bias
        nibble = w.to(tl.int32) >> (4 * i)
        q = (((nibble & 7) << 22) | ((nibble & 8) << 28)).to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126
    elif KIND == "fp8":
        q = w.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        q = w.to(tl.float32)
    return q


@triton.jit
def offset(i: tl.constexpr, KIND: tl.constexpr, SYMMETRIC: tl.constexpr):
    """What :func:`element` adds to element i of an integer format; and the middle of the range, for symmetric ones."""
    if KIND == "int4":
        return (128.0 if i % 2 == 0 else 2048.0) + (8.0 if SYMMETRIC else 0.0)
    else:
        return 256.0 + (128.0 if SYMMETRIC else 0.0)


@triton.jit
def load_planes(at, stride, keep, P: tl.constexpr):
    """A tuple of the P planes of a tile of activations; 0.0 where ``keep`` is false."""
    planes = ()
    for i in tl.static_range(P):
        planes += (tl.load(at + i * stride, mask=keep, other=0.0),)
    return planes


@triton.jit
def normed_planes(xs, ws, D: tl.constexpr, P: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr):
    """P planes of one row xs [BW] behind an RMS norm of weight ws + OFFSET, in their dtype; 0.0 past the row's D elements."""
    squares = tl.zeros(xs[0].shape, tl.float32)
    for i in tl.static_range(P):
        x_i = xs[i].to(tl.float32)
        squares += x_i * x_i
    inverse = tl.rsqrt(tl.sum(squares, axis=0) / D + EPS)
    out = ()
    for i in tl.static_range(P):
        out += ((xs[i].to(tl.float32) * inverse * (ws[i].to(tl.float32) + OFFSET)).to(xs[i].dtype),)
    return out


@triton.constexpr_function
def groups_of(GROUP, BW):
    """Columns BG of the scales of BW words: products of a tile are summed that far. Without scales the words themselves."""
    return BW if GROUP == 0 else max(1, BW // GROUP)


@triton.jit
def row_tile(row, w0, WORDS: tl.constexpr, GROUP: tl.constexpr, SCALE_ROWS: tl.constexpr, BW: tl.constexpr):
    """Where BW words of rows [BN] lie from w0 on, and where their scales do, as :func:`load_tile` takes it."""
    c = w0 + tl.arange(0, BW)
    at = row[:, None] * WORDS + c[None, :]
    keep = (c < WORDS)[None, :]
    at_scale, keep_scale = at, keep
    if GROUP > 0:
        g = w0 // GROUP + tl.arange(0, groups_of(GROUP, BW))
        at_scale = (row // SCALE_ROWS)[:, None] * (WORDS // GROUP) + g[None, :]
        keep_scale = (g < WORDS // GROUP)[None, :]
    return at, keep, at_scale, keep_scale


@triton.jit
def as_scale(s):
    """Loaded scales in float32; bytes are floats of 8 bits."""
    if s.dtype == tl.uint8:
        return s.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        return s.to(tl.float32)


@triton.jit
def load_tile(values, scale, zero, at, keep, at_scale, keep_scale, GROUP: tl.constexpr):
    """Words [BN, BW], their scales and zeros in float32 [BN, BG]; anything in place of those where there are none."""
    w = tl.load(values + at, mask=keep, other=0)
    s, z = w, w
    if GROUP > 0:
        s = as_scale(tl.load(scale + at_scale, mask=keep_scale, other=0))
    if zero is not None:
        z = tl.load(zero + at_scale, mask=keep_scale, other=0).to(tl.float32)
    return w, s, z


@triton.jit
def _sum_groups(x, BG: tl.constexpr, BW: tl.constexpr):
    """[BN, BW] -> [BN, BG], the sum of each group's words."""
    if BG == BW:
        return x
    else:
        return tl.sum(tl.reshape(x, [x.shape[0], BG, BW // BG]), axis=2)


@triton.jit
def plane_sums(xs, P: tl.constexpr, KIND: tl.constexpr, ZERO: tl.constexpr):
    """What :func:`tile_products` takes off for `offset`, and the sum of each word's inputs."""
    shift, total = tl.zeros(xs[0].shape, tl.float32), tl.zeros(xs[0].shape, tl.float32)
    if KIND == "int4" or KIND == "int8":
        for i in tl.static_range(P):
            x_i = xs[i].to(tl.float32)
            shift += x_i * offset(i, KIND, not ZERO)
            total += x_i
    return shift, total


@triton.jit
def tile_products(w, s, z, xs, shift, total, P: tl.constexpr, KIND: tl.constexpr, BG: tl.constexpr, ZERO: tl.constexpr):
    """Products of a tile [BN, BW] with planes xs of [BW]: [BN, BG], still to be summed along BG."""
    BW: tl.constexpr = w.shape[1]
    acc = tl.zeros(w.shape, tl.float32)
    for i in tl.static_range(P):
        acc += element(w, i, KIND) * xs[i].to(tl.float32)[None, :]
    if KIND == "int4" or KIND == "int8":
        acc -= shift[None, :]
    if KIND != "plain":
        acc = _sum_groups(acc, BG, BW)
        if ZERO:
            acc -= z * _sum_groups(total[None, :], BG, BW)
        acc *= s
    return acc


@triton.jit
def store_sum(at, value, old, keep, ADD: tl.constexpr):
    """Stores a float32 value in the dtype of `at`; with ADD its sum with `old`, the value rounded first as if it were stored."""
    value = value.to(at.dtype.element_ty)
    if ADD:
        value = (value.to(tl.float32) + old.to(tl.float32)).to(value.dtype)
    tl.store(at, value, mask=keep)


@triton.jit
def swiglu(gate, up):
    return gate / (1.0 + tl.exp(-gate)) * up
