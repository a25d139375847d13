"""Compile the products of many rows with quantised weights ahead of time, one JSON line each: ``python -m tests.kernels.aot_quantised``.
See `tests.kernels.aot`."""

import argparse
import dataclasses
import itertools
import json
import sys

import torch

from tests.kernels.aot import compile_for, record  # before any kernel: it turns the interpreter off
from tests.kernels.experts import stored
from tests.kernels.test_grouped_fp8 import FORMS as EXPERTS
from tests.kernels.test_grouped_fp8 import make as experts
from vllm.model_executor.layers.fused_moe.ops import grouped_fp8
from vllm.model_executor.layers.ops import fp8_gemm, quantised_gemm
from vllm.model_executor.layers.ops.quantised_gemm_plan import TILES

N, K = 384, 5120
FORMS = (
    "int4",
    "int4 zero",
    "int4 128",
    "int8 row",
    "int8",
    "fp8 block",
    "fp4 nv",
    "fp8 inputs",
    "fp8 inputs block",
    "experts",
)


def launch_experts() -> None:
    """Of the 35B shape, with inputs in FP8; two stand for all."""
    for form, block in itertools.product(EXPERTS, (32, 64)):
        case = experts(100, 2, 2048, 512, 2, form, torch.bfloat16, "cpu", block)
        grouped_fp8.experts_fp8_triton(*case)


def launch_all(form: str, arch: int) -> None:
    """Every tile for this GPU, and what comes before the product."""
    if form == "experts":
        return launch_experts()
    large, x = arch // 10 in (9, 10), torch.zeros(300, K, dtype=torch.bfloat16)
    if not form.startswith("fp8"):
        weight = stored((N, K), form, x.dtype, "cpu")
    else:
        weight = stored((N, K), "fp8 row", x.dtype, "cpu")
    if form.endswith("block"):
        weight = dataclasses.replace(weight, scale=torch.zeros(N // 128, K // 128), group=128, scale_rows=128)
    if "inputs" in form:
        for tile in TILES["fp8"][large]:
            fp8_gemm.fp8_gemm_triton(*fp8_gemm.quantise_triton(x, weight.group), weight, x.dtype, tile)
        return
    for tile in TILES["registers"][large]:
        quantised_gemm.quantised_gemm_triton(x, weight, tile)
    quantised_gemm.dequantise_triton(weight, x.dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, action="append", help="compute capability, 90 or 120; may be repeated")
    parser.add_argument("--form", choices=FORMS, action="append")
    options = parser.parse_args()
    grouped_fp8.overlapping = lambda device: {"PDL": True, "launch_pdl": True}
    for form in options.form or FORMS:
        for arch in options.arch or (90, 120):
            for recorded in record([(form, arch)], launch_all):
                print(json.dumps({"form": form, **compile_for(arch, recorded)}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
