"""Few rows of x against the weights of the 35B and 9B shapes: every kernel there is, and the table that `plan_skinny_gemm` reads.

    python -m benchmarks.kernels.skinny_gemm [--json result.json] [--table vllm/assets/skinny_gemm.json] [--git HASH]

Weights are cold: calls rotate over more of them than the cache holds. Graphs hold calls only, back to back, as a chain of layers would.
The table holds the fastest plan of every shape and number of rows, the ring where it is among the fastest; --table rewrites this GPU's part of it.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.kernels.timing import bandwidths, interleaved_us, rounded, write_result
from vllm import _custom_ops as ops
from vllm.model_executor.layers.ops.skinny_gemm import quantised_gemm_cuda, skinny_gemm_cuda, skinny_gemm_triton
from vllm.model_executor.layers.ops.skinny_gemm_plan import DENSE, MAX_ROWS, Plan, quantised_fits, ring_fits
from vllm.model_executor.layers.quantization.base import KernelWeight

SHAPES = {
    "35B in_proj": (12352, 2048),
    "35B out_proj, o_proj": (2048, 4096),
    "35B qkv": (9216, 2048),
    "35B router": (256, 2048),
    "35B shared gate_up": (1024, 2048),
    "35B shared down": (2048, 512),
    "35B lm_head": (248320, 2048),
    "9B in_proj": (12352, 4096),
    "9B qkv": (10240, 4096),
    "9B out_proj, o_proj": (4096, 4096),
    "9B gate_up": (24576, 4096),
    "9B down": (4096, 12288),
    "9B lm_head": (248320, 4096),
    "27B gate_up": (34816, 5120),
    "27B down": (5120, 17408),
}
QUANTISED = {"int4": (32, 1), "int8": (1 << 30, 1), "fp8": (128, 128), "fp4": (16, 1)}  # kind -> group, scale_rows
QUANTISED_SHAPES = (
    "35B in_proj",
    "35B out_proj, o_proj",
    "35B shared gate_up",
    "9B in_proj",
    "27B gate_up",
    "27B down",
)
ROWS = (1, 2, 4, 8, 16, 32, 64)
CSRC = ("ring", "quantised")
ALIKE = 1.02
NORM_US = 2.5
"""What a norm costs as a kernel of its own, beyond what it costs the ring (folding_h200.json: 2.6 to 3.9)."""
COLD = 160_000_000  # bytes that leave nothing of themselves in the cache
RINGS = {
    "ring": [(110, 0), (110, 99), (160, 99), (220, 99)],
    "quantised": [(50, 0), (50, 99), (114, 99), (220, 99)],  # the least, more stages, and one block on a multiprocessor
}
"""What is tried of :class:`Plan`'s ring and late."""


def random_weight(kind: str, N: int, K: int) -> tuple[KernelWeight, torch.Tensor]:
    """A weight of about unit gain, and the same in float32 [N, K]."""
    if kind == "plain":
        weight = (torch.randn(N, K, device="cuda") * K**-0.5).bfloat16()
        return KernelWeight("plain", weight), weight.float()
    group, scale_rows = min(QUANTISED[kind][0], K), QUANTISED[kind][1]
    blocks = (-(-N // scale_rows), K // group)
    scale, row_scale = (torch.rand(blocks, device="cuda") + 0.5) * K**-0.5, None
    if kind in ("int4", "int8"):
        bits = int(kind[3:])
        q = torch.randint(0, 2**bits, (N, K), device="cuda")
        words = (q.unflatten(1, (-1, 32 // bits)) << torch.arange(0, 32, bits, device="cuda")).sum(-1)
        values, wide = (words - (words >= 2**31) * 2**32).int(), q.float() - 2 ** (bits - 1)
        scale = (scale * 3 / 2**bits).bfloat16()
    elif kind == "fp8":
        values = torch.randn(N, K, device="cuda").to(torch.float8_e4m3fn)
        wide = values.float()
    else:
        q = torch.randint(0, 16, (N, K), device="cuda")
        values = (q[:, ::2] | q[:, 1::2] << 4).to(torch.uint8)
        wide = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], device="cuda")[q % 8] * (1 - q // 8 * 2)
        scale, row_scale = (
            (torch.rand(blocks, device="cuda") + 0.5).to(torch.float8_e4m3fn),
            torch.full((N,), K**-0.5 / 3),
        )
        row_scale = row_scale.cuda()
    wide = wide * scale.float().repeat_interleave(scale_rows, 0)[:N].repeat_interleave(group, 1)
    wide = wide if row_scale is None else wide * row_scale[:, None]
    return KernelWeight(kind, values, scale, None, group, scale_rows, row_scale), wide


def tensors(weight: KernelWeight) -> list[torch.Tensor]:
    return [t for t in (weight.values, weight.scale, weight.row_scale) if t is not None]


def copy(weight: KernelWeight) -> KernelWeight:
    scales = {n: getattr(weight, n).clone() for n in ("scale", "row_scale") if getattr(weight, n) is not None}
    return replace(weight, values=weight.values.clone(), **scales)


def run(plan: Plan, x: torch.Tensor, weight: KernelWeight) -> torch.Tensor:
    if plan.form == "ring":
        return skinny_gemm_cuda(x, weight, plan=plan)
    if plan.form == "quantised":
        return quantised_gemm_cuda(x, weight, plan=plan)
    return (F.linear if plan.form == "dense" else skinny_gemm_triton)(x, weight.values)


def plans(kind: str, M: int, K: int, group: int) -> list[Plan]:
    fits = {"ring": ring_fits(M, K, kind, group), "quantised": quantised_fits(M, K, kind, group)}
    found = [Plan(form, *ring) for form, can in fits.items() if can for ring in RINGS[form]]
    if kind != "plain":
        return found
    triton = [Plan("vector" if M == 1 else "rows")] if M <= MAX_ROWS and K % 64 == 0 else []
    return [DENSE, *triton, *found]


def name(plan: Plan) -> str:
    return f"{plan.form}/{plan.ring}/{plan.late}" if plan.form in CSRC else plan.form


def chosen(times: dict[Plan, float]) -> Plan:
    """The fastest, or the ring where it is as fast but for what two runs differ by: it can take a norm and an add in."""
    fastest = min(times, key=times.get)
    ring = min((plan for plan in times if plan.form == "ring"), key=times.get, default=fastest)
    return ring if times[ring] < ALIKE * times[fastest] else fastest


def behind_norm(times: dict[Plan, float], plan: Plan) -> dict[str, dict]:
    """The fastest ring, if it is slower by less than the norm that it would do on the way."""
    rings = [p for p in times if p.form == "ring"]
    ring = min(rings, key=times.get, default=None)
    return {"behind_norm": asdict(ring)} if ring and times[ring] < times[plan] + NORM_US else {}


def measure(label: str, kind: str, bandwidth: float, report: Callable[[dict], None]) -> dict[str, dict]:
    """All rows' rows of one shape; returns its part of the table."""
    N, K = SHAPES[label]
    weight, wide = random_weight(kind, N, K)
    size = sum(t.numel() * t.element_size() for t in tensors(weight))
    copies = [weight, *(copy(weight) for _ in range(min(256, max(8 if size < COLD else 1, COLD // size))))]
    calls = copies * -(-16 // len(copies)) if size < COLD else copies
    table = {}
    for M in ROWS:
        candidates = plans(kind, M, K, weight.group)
        if not candidates:
            continue
        x = torch.randn(M, K, device="cuda").bfloat16()
        want = F.linear(x.float(), wide)
        errors = {p: ((run(p, x, weight).float() - want).norm() / want.norm()).item() for p in candidates}
        for plan in [plan for plan, error in errors.items() if not error < 1e-2]:
            print(f"{label} {kind}, {M} rows, {plan}: off by {errors[plan]:.2g}, left out", flush=True)
            candidates.remove(plan)
        if not candidates:
            continue
        chains = {name(p): [partial(run, p, x, w) for w in calls] for p in candidates}
        times = interleaved_us(chains, rounds=9)
        best = min(candidates, key=lambda p: times[name(p)])
        if M <= MAX_ROWS:
            plan = chosen({p: times[name(p)] for p in candidates}) if kind == "plain" else best
            rest = [p for p in candidates if p.form not in CSRC] or [DENSE]
            otherwise = {"otherwise": min(rest, key=lambda p: times.get(name(p), 0.0)).form} if plan not in rest else {}
            near = (
                {}
                if kind != "plain" or plan.form == "ring"
                else behind_norm({p: times[name(p)] for p in candidates}, plan)
            )
            table[str(M)] = (asdict(plan) if plan.form in CSRC else {"form": plan.form}) | otherwise | near
        moved = size + (N + K) * M * 2
        us = times[name(best)]
        row = {"layer": label, "kind": kind, "shape": [N, K], "rows": M, "best": name(best), "us": us}
        report(row | {"share_of_read": moved / us * 1e6 / bandwidth, "all_us": times})
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--git", help="commit of the working tree, for the result")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("needs a CUDA device")
    if not ops.available():
        print("csrc/ is not built: its kernels are left out")
    torch.manual_seed(0)
    bandwidth, gpu, results = bandwidths(), torch.cuda.get_device_name(), []
    print(f"{gpu}: read {bandwidth['read'] * 1e-12:.2f} TB/s")

    def report(row: dict) -> None:
        results.append(row)
        others = {plan: us for plan, us in row["all_us"].items() if plan != row["best"]}
        csrc = min(((us, plan) for plan, us in others.items() if plan.startswith(CSRC)), default=None)
        rest = ", ".join(f"{plan} {us:.2f}" for plan, us in others.items() if not plan.startswith(CSRC))
        print(
            f"{row['layer']:>21} {row['kind']:>5} {row['rows']:3} rows: {row['best']:12} {row['us']:7.2f} us, "
            f"{row['share_of_read']:4.0%} of read; {rest}{f' ({csrc[1]} {csrc[0]:.2f})' if csrc else ''}",
            flush=True,
        )

    table: dict[str, dict] = {"plain": {}}
    jobs = [(label, "plain") for label in SHAPES] + [(label, kind) for kind in QUANTISED for label in QUANTISED_SHAPES]
    for label, kind in jobs:
        N, K = SHAPES[label]
        table.setdefault(kind, {})[f"{N}x{K}"] = measure(label, kind, bandwidth["read"], report)
        torch.cuda.empty_cache()
        if args.table:
            known = json.loads(args.table.read_text()) if args.table.exists() else {}
            args.table.write_text(json.dumps(rounded(known | {gpu: table}), indent=1) + "\n")
    write_result(args.json, "skinny_gemm", bandwidth, git=args.git, rows=results)


if __name__ == "__main__":
    main()
