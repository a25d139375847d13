"""Ahead-of-time compiles of the expert kernels, as `tests.kernels.aot` does for the GDN kernels: ``python -m tests.kernels.aot_moe``."""

import argparse
import dataclasses
import json
import os
import sys
import time

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from tests.kernels.aot import describe, usage
from tests.kernels.experts import layer
from vllm.model_executor.layers.fused_moe.ops import few_tokens, front, grouped, weights
from vllm.model_executor.layers.fused_moe.ops.route import route_triton
from vllm.model_executor.layers.ops.rms_norm import Unnormed

# E, D, I, S, top_k of published models
SHAPES = {
    "35b": (256, 2048, 512, 512, 8),
    "122b": (256, 3072, 1024, 1024, 8),
    "next": (512, 2048, 512, 512, 10),
}
CASES = {
    "35b-int4": ("35b", "int4"),
    "35b-plain": ("35b", "plain"),
    "35b-fp8": ("35b", "fp8 block"),
    "122b-int4": ("122b", "int4 zero"),
    "next-fp4": ("next", "fp4 nv"),
    "next-int8": ("next", "int8 row"),
}


def behind_norm(x: torch.Tensor) -> Unnormed:
    return Unnormed(x, torch.zeros(x.shape[1], dtype=x.dtype), 1e-6, True)


def launch_all(shape: str, form: str) -> None:
    E, D, I, S, top_k = SHAPES[shape]
    # two experts' weights stand for all: nothing is launched
    made = layer(2, D, I, S, form, torch.bfloat16, "cpu")
    made = dataclasses.replace(made, router=torch.zeros(E, D, dtype=torch.bfloat16))
    for T in (1, 8):
        x = torch.zeros(T, D, dtype=torch.bfloat16)
        few_tokens.moe_few_tokens_triton(x, made, top_k)
        few_tokens.moe_few_tokens_triton(behind_norm(x), made, top_k, x)
    for T in (32, 64):
        x = torch.zeros(T, D, dtype=torch.bfloat16)
        for rows in (x, behind_norm(x)) if T == 32 else (x,):
            front.front_triton(rows, made, hs_planes=1, xp_planes=1)
    for T in (16, 2048):
        x = torch.zeros(T, D, dtype=torch.bfloat16)
        routed = route_triton(torch.zeros(T, E + 1), E, top_k, 16 if T == 16 else 64 if form == "plain" else 32)
        xp = grouped.by_planes_triton(x, made.w13.kind)
        grouped.combine_triton(grouped.experts_triton(xp, routed, made.w13, made.w2), routed.shares, x, x[:, :1])
    grouped.combine_triton(torch.zeros(8 * top_k, D, dtype=x.dtype), torch.zeros(8, top_k), x, x[:, :1], x[:8])


def record(case: str) -> list[tuple]:
    """What the launchers would launch, each distinct kernel once."""
    seen: dict[str, tuple] = {}

    def run(self, *args, grid, warmup, **kwargs):
        names = {name: kwargs[name] for name in self.arg_names if name in kwargs}
        positional = dict(zip(self.arg_names, args)) | names
        entry = describe(self, tuple(positional[name] for name in self.arg_names), kwargs)
        seen[repr((self.fn.__name__, *entry[1:]))] = entry

    original, JITFunction.run = JITFunction.run, run
    try:
        launch_all(*CASES[case])
    finally:
        JITFunction.run = original
    return list(seen.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, action="append", help="compute capability, 90 or 120; may be repeated")
    parser.add_argument("--case", choices=CASES, action="append")
    options = parser.parse_args()
    weights.overlaps_launches = lambda device: True
    for case in options.case or CASES:
        for fn, signature, constants, attributes, launch in record(case):
            for arch in options.arch or (90, 120):
                begin = time.time()
                kernel = triton.compile(
                    ASTSource(fn, signature, constants, attributes), target=GPUTarget("cuda", arch, 32), options=launch
                )
                line = {
                    "case": case,
                    "kernel": fn.fn.__name__,
                    "arch": arch,
                    **launch,
                    "shared": kernel.metadata.shared,
                }
                line |= {**usage(kernel.asm), "seconds": round(time.time() - begin, 2)}
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.exit(main())
