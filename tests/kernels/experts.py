"""Random weights of every stored form, and layers of them, for the tests of the expert kernels."""

import torch

from vllm.model_executor.layers.fused_moe.ops.weights import MoEWeights
from vllm.model_executor.layers.quantization.base import KernelWeight

FORMS = ("plain", "int4", "int4 zero", "int4 128", "int8 row", "fp8", "fp8 block", "fp4", "fp4 nv")


def stored(shape: tuple[int, ...], form: str, dtype: torch.dtype, device: str) -> KernelWeight:
    """W of about unit gain. Forms: kind, then "zero" (stored zero points), a group size, "row" (one scale a row), "block" (64 x 64),
    "nv" (scales in e4m3 and a factor a row)."""
    *stack, N, K = shape
    kind, _, extra = form.partition(" ")
    if kind == "plain":
        return KernelWeight("plain", (torch.randn(*stack, N, K) * K**-0.5).to(device, dtype))
    group = {"row": K, "block": 64, "zero": 32, "nv": 16, "": 32 if kind != "fp4" else 16}.get(extra) or int(extra)
    group, scale_rows = min(group, K), 64 if extra == "block" else 1
    bits = {"int4": 4, "int8": 8}.get(kind)
    if bits:
        values = torch.randint(-(2**31), 2**31, (*stack, N, K * bits // 32), dtype=torch.int64).to(torch.int32)
        deviation = 2**bits / 12**0.5
    elif kind == "fp8":
        values, deviation = torch.randn(*stack, N, K).to(torch.float8_e4m3fn), 1.0
    else:
        values, deviation = torch.randint(0, 256, (*stack, N, K // 2), dtype=torch.uint8), 2.9
    scales = (*stack, -(-N // scale_rows), -(-K // group))
    scale = (torch.rand(scales) + 0.5) * K**-0.5 / deviation
    zero = torch.randint(0, 2**bits, scales, dtype=torch.uint8) if extra == "zero" else None
    scale = scale.to(device, torch.float32 if kind == "fp4" else dtype)
    if extra == "nv":
        factor = (torch.rand(*stack, N) + 0.5).to(device)
        scale = (scale * K**0.5).to(torch.float8_e4m3fn)
        return KernelWeight(kind, values.to(device), scale, None, group, 1, factor * K**-0.5)
    return KernelWeight(
        kind, values.to(device), scale, zero.to(device) if zero is not None else None, group, scale_rows
    )


def layer(
    E: int, D: int, I: int, S: int, form: str, dtype: torch.dtype, device: str, shared: str = "plain"
) -> MoEWeights:
    """A layer's weights; S = 0: without a shared expert."""
    router = (torch.randn(E, D) * 2 * D**-0.5).to(device, dtype)
    w13, w2 = stored((E, 2 * I, D), form, dtype, device), stored((E, D, I), form, dtype, device)
    if not S:
        return MoEWeights(router, w13, w2)
    gate = (torch.randn(1, D) * D**-0.5).to(device, dtype)
    return MoEWeights(
        router, w13, w2, gate, stored((2 * S, D), shared, dtype, device), stored((D, S), shared, dtype, device)
    )
