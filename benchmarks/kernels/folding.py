"""Residual add and RMS norm as a kernel of their own, or as parts of the projections around them (layers/folding.py).

    python -m benchmarks.kernels.folding [--json result.json] [--git HASH]

Each row is a piece of a layer of the 35B model, back to back in a CUDA graph as a chain of layers would have it, with cold weights:

    out_proj, in_proj   GDN output projection, add and norm, the next input projection
    o_proj, qkv         the same of attention
    norm, in_proj       add and norm, input projection; and "norm, qkv"
    out_proj            the output projection, and what adding to a residual takes in it
    norm, front         add and norm, and what the experts' router and shared expert make of x; packed: with the copy for int4
    norm, experts       add and norm, and all of a mixture of int4 experts
"""

import argparse
import sys
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import torch

from benchmarks.kernels.skinny_gemm import COLD
from benchmarks.kernels.timing import Call, bandwidths, interleaved_us, write_result
from tests.kernels.experts import layer
from vllm import _custom_ops as ops
from vllm.model_executor.layers.fused_moe.ops.few_tokens import moe_few_tokens
from vllm.model_executor.layers.fused_moe.ops.front import front_triton
from vllm.model_executor.layers.fused_moe.ops.weights import MoEWeights
from vllm.model_executor.layers.ops.rms_norm import Unnormed
from vllm.model_executor.layers.ops.skinny_gemm import (
    csrc_gpu,
    skinny_gemm_add_cuda,
    skinny_gemm_cuda,
)
from vllm.model_executor.layers.ops.skinny_gemm_plan import plan_skinny_gemm, ring_fits
from vllm.model_executor.layers.quantization.base import KernelWeight

HIDDEN, EPS = 2048, 1e-6
INPUTS = {"in_proj": 12352, "qkv": 9216}  # rows; of HIDDEN columns
MIXED = 4096  # columns of the output projection
ROWS = (1, 2, 4, 8, 12, 16, 32)
EXPERTS = {"E": 256, "D": HIDDEN, "I": 512, "S": 512, "top_k": 8}


class Step:
    """The tensors of one step of M rows; weights of the norms and residual stay in the cache, as they do in a model."""

    def __init__(self, M: int) -> None:
        new = partial(torch.randn, device="cuda")
        self.M = M
        self.residual, self.summand, self.mixed = (new(M, columns).bfloat16() for columns in (HIDDEN, HIDDEN, MIXED))
        self.norm = (new(HIDDEN) * 0.1).bfloat16()
        self.rows = Unnormed(self.residual, self.norm, EPS, True)

    def add_norm(self) -> torch.Tensor:
        # the summand is overwritten with what is normalised, which only its next value would mind
        ops.fused_add_rms_norm(self.summand, self.residual, self.norm, EPS, True)
        return self.summand

    def plan(self, N: int, K: int):
        plan = plan_skinny_gemm(csrc_gpu(self.residual.device)[0], self.M, N, K)
        return plan if plan.form == "ring" else None

    def product(self, x: torch.Tensor | Unnormed, weight: torch.Tensor) -> torch.Tensor:
        return skinny_gemm_cuda(x, weight, plan=self.plan(*weight.shape))

    def add(self, weight: torch.Tensor) -> None:
        # a residual that grows for ever would be infinite in the end
        skinny_gemm_add_cuda(self.mixed, weight, self.residual, self.plan(*weight.shape))


def cold(size: int, make) -> list:
    return [make() for _ in range(max(8, COLD // size))]


@lru_cache
def weights(N: int, K: int) -> list[torch.Tensor]:
    return cold(N * K * 2, lambda: (torch.randn(N, K, device="cuda") * 1e-3).bfloat16())


@lru_cache
def layers() -> list[MoEWeights]:
    """Mixtures of experts, as many as leave nothing of their routers and shared experts in the cache.

    They have the same experts, of which different routers choose different ones.
    """
    E, D, I, S, _ = EXPERTS.values()
    first = layer(E, D, I, S, "int4", torch.bfloat16, "cuda")
    plain = lambda rows, columns: (torch.randn(rows, columns, device="cuda") * columns**-0.5).bfloat16()
    return cold(
        2 * D * (E + 2 * S),
        lambda: replace(
            first,
            router=plain(E, D),
            gate=plain(1, D),
            s13=KernelWeight("plain", plain(2 * S, D)),
            s2=KernelWeight("plain", plain(D, S)),
        ),
    )


def projections(step: Step) -> dict[str, dict[str, list[Call]]]:
    """Pieces of a layer made of ring kernels: apart and folded."""
    found = {}
    back = weights(HIDDEN, MIXED) if ring_fits(step.M, MIXED, "plain") else []
    if back:
        found["out_proj"] = {
            "apart": [partial(step.product, step.mixed, w) for w in back],
            "folded": [partial(step.add, w) for w in back],
        }
    for name, N in INPUTS.items():
        front = weights(N, HIDDEN)
        apart = [lambda w=w: step.product(step.add_norm(), w) for w in front]
        found[f"norm, {name}"] = {"apart": apart, "folded": [partial(step.product, step.rows, w) for w in front]}
        if back:
            pairs = list(zip(front, back * -(-len(front) // len(back))))
            found[f"out_proj, {name}"] = {
                "apart": [
                    lambda w=w, b=b: (step.product(step.mixed, b), step.product(step.add_norm(), w)) for w, b in pairs
                ],
                "folded": [lambda w=w, b=b: (step.add(b), step.product(step.rows, w)) for w, b in pairs],
            }
    return found


def experts(step: Step) -> dict[str, dict[str, list[Call]]]:
    """The front of a mixture of experts, and for a few tokens all of it."""
    made, top_k, found = layers(), EXPERTS["top_k"], {}
    for name, planes in (("norm, front", 1), ("norm, front packed", 8)):
        run = partial(front_triton, hs_planes=1, xp_planes=planes)
        found[name] = {
            "apart": [lambda w=w, run=run: run(step.add_norm(), w) for w in made],
            "folded": [partial(run, step.rows, w) for w in made],
        }
    if step.M <= 12:
        found["norm, experts"] = {
            "apart": [lambda w=w: moe_few_tokens(step.add_norm(), w, top_k) for w in made],
            "folded": [lambda w=w: moe_few_tokens(step.rows, w, top_k, step.residual) for w in made],
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--git", help="commit of the working tree, for the result")
    parser.add_argument("--rows", type=lambda s: tuple(map(int, s.split(","))), default=ROWS)
    args = parser.parse_args()
    if not torch.cuda.is_available() or not csrc_gpu(torch.device("cuda"))[1]:
        sys.exit("needs csrc/ and a CUDA device of sm_90 or newer")
    torch.manual_seed(0)
    results = []
    for M in args.rows:
        step = Step(M)
        for pieces in (projections, experts):
            for piece, chains in pieces(step).items():
                times = interleaved_us(chains, rounds=15)
                step.residual.normal_()
                results.append({"piece": piece, "rows": M} | {f"{name}_us": us for name, us in times.items()})
                saved = times["apart"] - times["folded"]
                print(
                    f"{piece:>20} {M:3} rows: apart {times['apart']:7.2f} us, folded {times['folded']:7.2f}, saves {saved:5.2f}",
                    flush=True,
                )
            torch.cuda.empty_cache()
    write_result(args.json, "folding", bandwidths(), git=args.git, rows=results)


if __name__ == "__main__":
    main()
