"""Stored weights as the Triton kernels read them: words in, 16-bit floats out, and the order that this asks of activations.

A word of an integer format holds several neighbours of a row. A thread takes words, so element i of all its words meets the inputs
P*c + i, P elements a word: kernels therefore keep activations by *planes*, [i = 0 of all words | i = 1 of all words | ...]. For formats
of one element a word that is the natural order. fp4's words are of 8 bits, or of 32 as int4's.
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
"""Elements of a row in one stored word, as values are stored."""

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


def operands(weight: KernelWeight, name: str, planes: int | None = None) -> dict[str, object]:
    """Arguments of a kernel that reads `weight` under this name. planes: of its words, where those are not as stored."""
    words, planes = weight.values.shape[-1], planes or PLANES[weight.kind]
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
        bits = w.to(tl.int32)
        low = bits << (22 - 4 * i) if i < 6 else bits >> (4 * i - 22)
        q = ((bits << (28 - 4 * i)) & -0x80000000) | (low & 0x01C00000)
        q = q.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126
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
def _pair(i, kind, scaled, bf16):
    """PTX that takes element i of two words, whose halves (words of 8 bits: all of them) are in $1, for two 16-bit floats: $3, what is
    to be subtracted, and times $2 if `scaled`. Exact but for that last product."""
    dtype = "bf16x2" if bf16 else "f16x2"
    if kind == "int4":  # under the exponent whose unit it counts
        take = (
            f"shr.u32 t, $1, {4 * (i % 4)}; lop3.b32 t, t, 0x000F000F, {'0x43004300' if bf16 else '0x64006400'}, 0xEA;"
        )
        take += f"sub.rn.{dtype} t, t, $3;"
    elif kind == "int8" and bf16:  # its low seven bits likewise; 128 more is subtracted where the eighth is clear
        take = f"shr.u32 t, $1, {8 * (i % 2)}; lop3.b32 u, t, 0x00800080, 0x43804380, 0x6A;"
        take += "lop3.b32 t, t, 0x007F007F, 0x43004300, 0xEA; sub.rn.bf16x2 t, t, u;"
    elif kind == "int8":
        take = f"shr.u32 t, $1, {8 * (i % 2)}; lop3.b32 t, t, 0x00FF00FF, 0x64006400, 0xEA; sub.rn.f16x2 t, t, $3;"
    else:  # e2m1's exponent and mantissa at the lower end of a float's: too small by a power of two
        to, mask, power = (6, "0x01C001C0", "0x7E807E80") if bf16 else (9, "0x0E000E00", "0x74007400")
        left = to - 4 * (i % 4)
        take = f"shl.b32 t, $1, {left};" if left >= 0 else f"shr.u32 t, $1, {-left};"
        take += f"shl.b32 u, $1, {12 - 4 * (i % 4)}; and.b32 u, u, 0x80008000;"
        take += f"lop3.b32 t, t, {mask}, u, 0xEA; mov.b32 u, {power}; mul.rn.{dtype} t, t, u;"
    last = f"mul.rn.{dtype} $0, t, $2;" if scaled else "mov.b32 $0, t;"
    return f"{{ .reg .b32 t, u; {take} {last} }}"


@triton.constexpr_function
def _in_pairs(kind, zero, group, s, dtype):
    """Whether there is such code: scales have to be of the 16-bit type that is computed in."""
    return not INTERPRETED and (kind == "int4" or (kind in ("int8", "fp4") and not zero and (group == 0 or s == dtype)))


@triton.jit
def plane(
    w,
    low,
    high,
    s,
    z,
    i: tl.constexpr,
    KIND: tl.constexpr,
    ZERO: tl.constexpr,
    GROUP: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Plane i of a tile of words [BN, BW] in DTYPE. s, z: scales and zeros of each word; low, high: the words' halves.

    GROUP: of `load_words`; 0: q - zero is not scaled.
    """
    if KIND == "plain":
        return w
    elif _in_pairs(KIND, ZERO, GROUP, s.dtype, DTYPE):
        bits = tl.inline_asm_elementwise(
            _pair(i, KIND, GROUP > 0, tl.bfloat16 == DTYPE),
            "=r,r,r,r",
            [low if i < (2 if KIND == "int8" else 4) else high, s, z],
            dtype=tl.int16,
            is_pure=True,
            pack=2,
        )
        return bits.to(DTYPE, bitcast=True)
    else:
        q = element(w, i, KIND)
        if KIND == "int4" or KIND == "int8":
            q -= offset(i, KIND, not ZERO)
        if ZERO:
            q -= z.to(tl.float32)
        if GROUP > 0:
            q *= s.to(tl.float32)
        return q.to(DTYPE)


@triton.jit
def _spread(x, GROUP: tl.constexpr, BW: tl.constexpr):
    """[BN, BG] -> [BN, BW], each group's value to its words."""
    BG: tl.constexpr = groups_of(GROUP, BW)
    if BG == 1:
        return tl.broadcast_to(x, [x.shape[0], BW])
    else:
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
    """Words [BN, BW] of whole rows from w0 on, their halves, and each word's scale and zero, as :func:`plane` takes them.

    Scales are in DTYPE where they are stored so or as bytes, which it holds exactly, and int4's always; otherwise in float32.
    """
    c = w0 + tl.arange(0, BW)
    w = tl.load(values + row[:, None] * WORDS + c[None, :])
    low, high = w, w
    if not INTERPRETED and (KIND == "int4" or KIND == "int8" or KIND == "fp4"):
        low = w.to(tl.int16)
        if w.dtype == tl.int32:
            high = (w >> 16).to(tl.int16)
    s, z = low, low
    if GROUP > 0:
        g = w0 // GROUP + tl.arange(0, groups_of(GROUP, BW))
        at = (row // SCALE_ROWS)[:, None] * (WORDS // GROUP) + g[None, :]
        s = as_scale(tl.load(scale + at))
        STORED: tl.constexpr = scale.dtype.element_ty
        s = _spread(s.to(DTYPE) if KIND == "int4" or STORED == DTYPE or tl.uint8 == STORED else s, GROUP, BW)
        if zero is not None:
            # the interpreter takes integers for bfloat16's bits
            z = _spread(tl.load(zero + at).to(tl.float32).to(DTYPE), GROUP, BW)
    if not INTERPRETED and (KIND == "int4" or (KIND == "int8" and tl.bfloat16 != DTYPE)):
        unit = 128.0 if tl.bfloat16 == DTYPE else 1024.0
        if zero is None:
            z = tl.full(w.shape, unit + (8.0 if KIND == "int4" else 128.0), DTYPE)
        elif KIND == "int4":
            z = (z + unit).to(DTYPE)
    return w, low, high, s, z


@triton.jit
def dense_tile(
    w,
    low,
    high,
    s,
    z,
    P: tl.constexpr,
    KIND: tl.constexpr,
    ZERO: tl.constexpr,
    GROUP: tl.constexpr,
    DTYPE: tl.constexpr,
    NATURAL: tl.constexpr,
):
    """All planes of a tile of words of 1, 4 or 8 elements: [BN, P * BW], one beside the other or, NATURAL, in the order of W's columns.

    Nothing moves between threads for the former where a thread has the same words of every plane, as tensor cores ask for them.
    """
    p = ()
    for i in tl.static_range(P):
        p += (plane(w, low, high, s, z, i, KIND, ZERO, GROUP, DTYPE),)
    if P == 1:
        return p[0]
    else:
        if P == 4:
            t = tl.join(tl.join(p[0], p[2]), tl.join(p[1], p[3]))
        else:
            even = tl.join(tl.join(p[0], p[4]), tl.join(p[2], p[6]))
            odd = tl.join(tl.join(p[1], p[5]), tl.join(p[3], p[7]))
            t = tl.join(even, odd)
        # [BN, BW, P]
        t = tl.reshape(t, [w.shape[0], w.shape[1], P])
        if not NATURAL:
            t = tl.permute(t, (0, 2, 1))
        return tl.reshape(t, [w.shape[0], w.shape[1] * P])
