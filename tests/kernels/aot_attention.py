"""Compile the attention kernels ahead of time, one JSON line each: ``python -m tests.kernels.aot_attention``. See `tests.kernels.aot`."""

import argparse
import json
import sys

import torch

from tests.kernels.aot import compile_for, record  # before any kernel: it turns the interpreter off
from tests.kernels.attention_case import AttentionCase
from vllm.model_executor.layers.ops import attention_decode, attention_prefill

HEADS = {"16x2x256": (16, 2, 256, 64), "6x2x128": (6, 2, 128, 128), "8x8x64": (8, 8, 64, 16)}


def launch_all(H: int, Hkv: int, D: int, rotary_dim: int, kv_dtype: torch.dtype) -> None:
    """Decode of one and of many sequences, and a chunk."""
    for work in ([(300, 1)], [(300, 1)] * 64, [(40, 20)]):
        case = AttentionCase(work, H, Hkv, D, rotary_dim, torch.bfloat16, kv_dtype)
        rows, pages, meta, out = case.rows, case.clean, case.meta, case.out()
        if meta.num_decodes:
            attention_decode.attention_decode_triton(rows, pages, meta.block_table, meta.seq_lens, case.scale, out)
        attention_prefill.attention_prefill_triton(rows, pages, meta, case.scale, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, action="append", help="compute capability, 90 or 120; may be repeated")
    parser.add_argument("--heads", choices=HEADS, action="append")
    options = parser.parse_args()
    attention_decode.multiprocessors = lambda device: 132
    for module in (attention_decode, attention_prefill):
        module.overlaps_launches = lambda device: True
    for name in options.heads or HEADS:
        for arch in options.arch or (90, 120):
            attention_prefill.capability_of = lambda device, arch=arch: divmod(arch, 10)
            for kv_dtype in (torch.bfloat16, torch.float8_e4m3fn):
                for recorded in record([(*HEADS[name], kv_dtype)], launch_all):
                    print(
                        json.dumps({"heads": name, "pages": str(kv_dtype), **compile_for(arch, recorded)}), flush=True
                    )


if __name__ == "__main__":
    sys.exit(main())
