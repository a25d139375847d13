"""Many rows of x against quantised weights: every way there is, beside cuBLAS with the same weight in bfloat16.

    python -m benchmarks.kernels.quantised_gemm [--json result.json] [--kind "int4 32"] [--rows 128,1024] [--git HASH]

Ways: "registers BMxBN" dequantises W on its way to the tensor cores, "fp8 BMxBN" quantises x and multiplies 8-bit floats, "copy" makes
a dense copy by one kernel for cuBLAS, "pytorch" by PyTorch; "sliced" is csrc's kernel for few rows, 32 at a time; "library" is
torch's product of 8-bit floats behind our quantisation of x. Weights are cold: calls rotate over more of them than the cache holds.
The share is that of what cuBLAS reaches in bfloat16 on [8192 x 8192] by itself, for products of 8-bit floats of twice that.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.kernels.timing import bandwidths, interleaved_us, write_result
from vllm.model_executor.layers.ops.fp8_gemm import (
    fp8_gemm_library,
    fp8_gemm_triton,
    input_group,
    quantise_triton,
    takes_fp8,
)
from vllm.model_executor.layers.ops.quantised_gemm import dequantise_triton, gpu_of, quantised_gemm_triton
from vllm.model_executor.layers.ops.quantised_gemm_plan import TILES, Tile, plan_quantised_gemm
from vllm.model_executor.layers.ops.skinny_gemm import MOST_SLICED_ROWS, quantised_gemm
from vllm.model_executor.layers.quantization import CompressedTensorsWNA16, Fp8, NvFp4, WeightScheme
from vllm.model_executor.layers.quantization.base import KernelWeight
from vllm.v1.worker.compile_ahead import compiling_only

SHAPES = {
    "35B in_proj": (12352, 2048),
    "35B out_proj, o_proj": (2048, 4096),
    "27B gate_up": (34816, 5120),
    "27B down": (5120, 17408),
}
KINDS: dict[str, WeightScheme] = {
    "int4 32": CompressedTensorsWNA16(4, 32, True, torch.bfloat16),
    "int4 128 zero": CompressedTensorsWNA16(4, 128, False, torch.bfloat16),
    "int8 row": CompressedTensorsWNA16(8, -1, True, torch.bfloat16),
    "fp8 block": Fp8("weight_scale_inv", 128, 128, True, torch.bfloat16),
    "fp8 row": Fp8("weight_scale", 1, -1, True, torch.bfloat16),
    "fp4": NvFp4(),
}
ROWS = (64, 128, 256, 512, 1024, 4096)
COLD = 160_000_000  # bytes that leave nothing of themselves in the cache

Way = Callable[[torch.Tensor, nn.Module, KernelWeight], torch.Tensor]


def make(scheme: WeightScheme, N: int, K: int, seed: int) -> nn.Module:
    layer = nn.Module()
    with torch.device("cuda"):
        scheme.create(layer, "", (), N, K, torch.bfloat16)
    scheme.fill_dummy(layer, "", K**-0.5, torch.Generator("cuda").manual_seed(seed))
    scheme.process(layer)
    return layer.requires_grad_(False)


def native(tile: Tile, x: torch.Tensor, layer: nn.Module, weight: KernelWeight) -> torch.Tensor:
    return fp8_gemm_triton(*quantise_triton(x, input_group(weight, x.shape[1])), weight, x.dtype, tile)


def library(x: torch.Tensor, layer: nn.Module, weight: KernelWeight) -> torch.Tensor:
    return fp8_gemm_library(*quantise_triton(x, x.shape[1]), weight, x.dtype)


def ways(scheme: WeightScheme, weight: KernelWeight, M: int, K: int) -> dict[str, Way]:
    large = gpu_of(torch.device("cuda")).capability[0] in (9, 10)
    found: dict[str, Way] = {
        f"registers {tile.BM}x{tile.BN}": lambda x, layer, w, tile=tile: quantised_gemm_triton(x, w, tile)
        for tile in TILES["registers"][large]
    }
    if takes_fp8(weight, K):
        found |= {f"fp8 {tile.BM}x{tile.BN}": partial(native, tile) for tile in TILES["fp8"][large]}
        if weight.group >= K:
            found["library"] = library
    if M <= MOST_SLICED_ROWS:
        found["sliced"] = lambda x, layer, w: quantised_gemm(x, w)
    found["copy"] = lambda x, layer, w: F.linear(x, dequantise_triton(w, x.dtype))
    if M in (256, 4096):  # the same work for any number of rows
        found["pytorch"] = lambda x, layer, w: F.linear(x, scheme.all(layer))
    return found


def working(found: dict[str, Way], x: torch.Tensor, layer: nn.Module, weight: KernelWeight, want: torch.Tensor):
    """Those that run here, and whose result is right."""
    for name, way in found.items():
        try:
            y = way(x, layer, weight)
        except Exception as error:
            print(f"{name}: left out, {str(error).splitlines()[0][:150]}", flush=True)
            continue
        if y is None:
            continue
        off = ((y.float() - want).norm() / want.norm()).item()
        if off < (5e-2 if name.startswith(("fp8", "library")) else 1e-2):
            yield name, way
        else:
            print(f"{name}: left out, off by {off:.2g}", flush=True)


def measure(label: str, kind: str, rows: list[int], rate: float, report: Callable[[dict], None]) -> None:
    (N, K), scheme = SHAPES[label], KINDS[kind]
    first = make(scheme, N, K, 0)
    size = sum(p.numel() * p.element_size() for p in first.parameters())
    layers = [first, *(make(scheme, N, K, i) for i in range(1, max(2, min(16, COLD // size))))]
    weights = [scheme.kernel_weight(layer) for layer in layers]
    group = input_group(weights[0], K) if takes_fp8(weights[0], K) else 0
    plain = [scheme.all(layer) for layer in layers]
    for M in rows:
        x = torch.randn(M, K, device="cuda").bfloat16()
        found = ways(scheme, weights[0], M, K)
        with compiling_only():
            for name, way in found.items():
                if name != "pytorch" and name != "library":
                    way(x, first, weights[0])
        found = dict(working(found, x, first, weights[0], x.float() @ plain[0].float().T))
        chains = {name: [partial(way, x, *pair) for pair in zip(layers, weights)] for name, way in found.items()}
        chains["bf16"] = [partial(F.linear, x, w) for w in plain]
        times = interleaved_us(chains, rounds=9)
        plan = plan_quantised_gemm(gpu_of(x.device), M, N, K, group, library=group == K)
        planned = plan.form if plan.tile is None else f"{plan.form} {plan.tile.BM}x{plan.tile.BN}"
        ours = {name: us for name, us in times.items() if name not in ("bf16", "pytorch")}
        best = min(ours, key=ours.get)
        shares = {
            name: 2 * M * N * K / us * 1e-6 / (rate * (2 if name.startswith(("fp8", "library")) else 1))
            for name, us in times.items()
        }
        row = {"layer": label, "kind": kind, "shape": [N, K], "rows": M, "planned": planned, "best": best}
        report(row | {"us": ours[best], "share_of_tensor_cores": shares[best], "all_us": times, "all_shares": shares})


def tensor_rate() -> float:
    """TFLOP/s of cuBLAS in bfloat16."""
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    return 2 * 8192**3 / interleaved_us({"bf16": [partial(F.linear, a, b)] * 4}, rounds=10)["bf16"] * 1e-6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--kind", choices=KINDS, action="append")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--git", help="commit of the working tree, for the result")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("needs a CUDA device")
    torch.manual_seed(0)
    bandwidth, rate, results = bandwidths(), tensor_rate(), []
    print(f"{torch.cuda.get_device_name()}: cuBLAS {rate:.0f} TFLOP/s in bfloat16")

    def report(row: dict) -> None:
        results.append(row)
        rest = ", ".join(f"{name} {us:.1f}" for name, us in row["all_us"].items() if name != row["best"])
        print(
            f"{row['layer']:>20} {row['kind']:>13} {row['rows']:4} rows: {row['best']:17} {row['us']:8.1f} us, "
            f"{row['share_of_tensor_cores']:4.0%} of the tensor cores; planned {row['planned']}; {rest}",
            flush=True,
        )
        # what was measured stays, whatever happens next
        write_result(args.json, "quantised_gemm", bandwidth, git=args.git, tensor_tflop_s=rate, rows=results)

    for kind in args.kind or KINDS:
        for label in SHAPES:
            measure(label, kind, [int(M) for M in args.rows.split(",")], rate, report)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
