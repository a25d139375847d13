"""Stored weights as the Triton kernels read them: words in, 16-bit floats out, and the order that this asks of activations.

A word of an integer format holds several neighbours of a row. A thread takes words, so element i of all its words meets the inputs
P*c + i, P elements a word: kernels therefore keep activations by *planes*, [i = 0 of all words | i = 1 of all words | ...]. For formats
of one element a word that is the natural order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from vllm.model_executor.layers.fla.ops.device import INTERPRETED

if TYPE_CHECKING:
    from vllm.model_executor.layers.quantization.base import KernelWeight

PLANES = {"plain": 1, "int4": 8, "int8": 4, "fp8": 1, "fp4": 2}
"""Elements of a row in one stored word."""

SIXTEEN_BIT = (torch.bfloat16, torch.float16)


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


@triton.constexpr_function
def groups_of(GROUP, BW):
    """Columns BG of the scales of BW words: products of a tile are summed that far. Without scales the words themselves."""
    return BW if GROUP == 0 else max(1, BW // GROUP)


@triton.jit
def as_scale(s):
    """Loaded scales in float32; bytes are floats of 8 bits."""
    if s.dtype == tl.uint8:
        return s.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        return s.to(tl.float32)


@triton.constexpr_function
def _nibble_pair(shift, bf16):
    """Two nibbles of two words as 16-bit floats: each under the exponent whose unit it counts, less $3, times $2."""
    kind, bits = ("bf16x2", "0x43004300") if bf16 else ("f16x2", "0x64006400")
    take = f"shr.u32 t, $1, {shift}; lop3.b32 t, t, 0x000F000F, {bits}, 0xEA;"
    return f"{{ .reg .b32 t; {take} sub.rn.{kind} t, t, $3; mul.rn.{kind} $0, t, $2; }}"


@triton.jit
def plane(w, low, high, s, z, i: tl.constexpr, KIND: tl.constexpr, ZERO: tl.constexpr, DTYPE: tl.constexpr):
    """Plane i of a tile of words [BN, BW] in DTYPE. s, z: scales and zeros of each word; low, high: the words' halves."""
    if KIND == "plain":
        return w
    elif KIND == "int4" and not INTERPRETED:
        return tl.inline_asm_elementwise(
            _nibble_pair(4 * (i % 4), tl.bfloat16 == DTYPE),
            "=r,r,r,r",
            [low if i < 4 else high, s, z],
            dtype=s.dtype,
            is_pure=True,
            pack=2,
        )
    else:
        q = element(w, i, KIND)
        if KIND == "int4" or KIND == "int8":
            q -= offset(i, KIND, not ZERO)
        if ZERO:
            q -= z.to(tl.float32)
        return (q * s.to(tl.float32)).to(DTYPE)


@triton.jit
def _spread(x, GROUP: tl.constexpr, BW: tl.constexpr):
    """[BN, BG] -> [BN, BW], each group's value to its words."""
    BG: tl.constexpr = groups_of(GROUP, BW)
    x = tl.broadcast_to(x[:, :, None], [x.shape[0], BG, BW // BG])
    return tl.reshape(x, [x.shape[0], BW])


@triton.jit
def load_words(
    values,
    scale,
    zero,
    row,
    w0,
    KIND: tl.constexpr,
    WORDS: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    BW: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Words [BN, BW] of whole rows from w0 on, their halves, and each word's scale and zero (with int4's unit) in DTYPE."""
    c = w0 + tl.arange(0, BW)
    w = tl.load(values + row[:, None] * WORDS + c[None, :])
    s, z, low, high = w, w, w, w
    if GROUP > 0:
        g = w0 // GROUP + tl.arange(0, groups_of(GROUP, BW))
        at = (row // SCALE_ROWS)[:, None] * (WORDS // GROUP) + g[None, :]
        s = as_scale(tl.load(scale + at))
        # the kernels' 16 bits hold a scale of theirs exactly; float32 scales are applied in float32
        s = _spread(s.to(DTYPE) if KIND == "int4" else s, GROUP, BW)
        if zero is not None:
            z = _spread(tl.load(zero + at).to(DTYPE), GROUP, BW)
    if KIND == "int4" and not INTERPRETED:
        low, high = w.to(tl.int16), (w >> 16).to(tl.int16)
        unit = 128.0 if tl.bfloat16 == DTYPE else 1024.0
        if zero is not None:
            z = (z + unit).to(DTYPE)
        else:
            z = tl.full(w.shape, unit + 8.0, DTYPE)
    return w, low, high, s, z
