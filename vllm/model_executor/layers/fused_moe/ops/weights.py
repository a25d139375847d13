"""Stored weights as the expert kernels of few tokens read them, on top of what all kernels share (`layers/ops/stored_weight.py`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from vllm.model_executor.layers.fla.ops.device import overlaps_launches
from vllm.model_executor.layers.ops.stored_weight import (  # noqa: F401 (the experts' kernels take all from here)
    PLANES,
    SIXTEEN_BIT,
    as_scale,
    dense,
    element,
    groups_of,
    offset,
    operands,
    regular,
)

if TYPE_CHECKING:
    from vllm.model_executor.layers.quantization.base import KernelWeight


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


def absent(name: str, words: int) -> dict[str, object]:
    """`operands` of a matrix that is not there."""
    pointers = dict.fromkeys((name, f"{name}_scale", f"{name}_zero", f"{name}_factor"))
    upper = name.upper()
    return pointers | {f"{upper}_KIND": "", f"{upper}_WORDS": words, f"{upper}_GROUP": 0, f"{upper}_SCALE_ROWS": 1}


def overlapping(device: torch.device) -> dict[str, bool]:
    """Launch options of kernels that wait for the one before by themselves."""
    overlap = overlaps_launches(device)
    return {"PDL": overlap} | ({"launch_pdl": True} if overlap else {})


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
