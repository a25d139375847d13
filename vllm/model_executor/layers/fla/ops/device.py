"""What the kernels' launchers need to know about the device, and the pieces of Triton code they share."""

from functools import lru_cache

import torch
import triton
import triton.language as tl

# Triton's interpreter keeps bfloat16 as raw 16-bit integers and would multiply those in tl.dot.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 1 for other devices, where the interpreter runs programs one by one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@lru_cache
def overlaps_launches(device: torch.device) -> bool:
    """Whether a kernel may be launched while the one before it still runs (programmatic dependent launch: sm_90 and newer)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def dot(a, b):
    """``a @ b`` accumulated in float32; float32 operands in three tf32 products, which keeps about 21 bits on the tensor cores.

    Exact float32 products would run outside the tensor cores: measured, ten times the compile time and kilobytes of spilled registers.
    """
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def settled(acc):
    """Float32 sums, once the tensor cores are done with them: to be passed through after products in a loop whose left operand is
    computed in registers. Triton (3.6) lets such products overlap with the next step, which fills the same registers again."""
    if INTERPRETED:
        return acc
    return tl.inline_asm_elementwise("", "=f,0", [acc], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def softplus(x, beta, threshold):
    """``log(1 + exp(beta * x)) / beta``, and x itself where ``beta * x`` exceeds the threshold."""
    y = beta * x
    return tl.where(y > threshold, x, tl.log(1.0 + tl.exp(tl.minimum(y, threshold))) / beta)


@triton.jit
def tile_of(pid, M, N, BM: tl.constexpr, BN: tl.constexpr, GM: tl.constexpr):
    """Which tile of y a program has, GM tiles along M before the next along N."""
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    first = pid // (GM * tiles_n) * GM
    height = tl.minimum(tiles_m - first, GM)
    return first + pid % (GM * tiles_n) % height, pid % (GM * tiles_n) // height


@triton.jit
def before_e4m3(x):
    """float32 x, as it may be converted to e4m3: the interpreter's conversion loses the carry into the exponent, so that x is rounded to
    3 bits of mantissa, half to even, before it."""
    if INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    return x
