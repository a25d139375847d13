"""Gated attention over pages, 35B shape (16 query heads, 2 key/value heads of 256): decoding rows and prompt chunks.

    python -m benchmarks.kernels.attention [--json result.json]

Pages are shuffled and cold, as they are in a model of many layers: calls rotate over enough of them to leave the cache. "share" of a decode
is its pages' bytes over its time and the bandwidth of reading; a chunk's rate counts the products of causal attention alone.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.kernels.timing import bandwidths, interleaved_us, write_result
from vllm.forward_context import PagedAttentionMetadata
from vllm.model_executor.layers.ops.attention_decode import attention_decode_torch, attention_decode_triton
from vllm.model_executor.layers.ops.attention_prefill import attention_prefill_triton
from vllm.model_executor.layers.ops.attention_torch import Pages, ProjectedRows, prepare_torch

H, HKV, D, ROTARY, PAGE = 16, 2, 256, 64, 16
SEQUENCES, CONTEXTS = (1, 4, 16, 64), (128, 1024, 8192, 32768)
CHUNKS = ((1, 0, 128), (1, 0, 1024), (1, 0, 4096), (1, 0, 16384), (32, 0, 2048), (1, 30720, 2048), (8, 8000, 4))
"""(sequences, tokens before, tokens of the chunk)."""
COLD_BYTES = 256 * 2**20
MAX_CALLS = 200


def make_pages(count: int, dtype: torch.dtype) -> Pages:
    pools = (torch.empty(count + 1, PAGE, HKV, D, device="cuda", dtype=dtype) for _ in "kv")
    # normal_ knows no float8
    return Pages(*(fill(pool) for pool in pools))


def fill(pool: torch.Tensor) -> torch.Tensor:
    for part in pool.split(1 << 14):
        part.copy_(torch.randn(part.shape, device="cuda", dtype=torch.bfloat16))
    return pool


def make_rows(tokens: int) -> ProjectedRows:
    angle = torch.rand(tokens, ROTARY // 2, device="cuda") * 6
    weights = (torch.randn(D, device="cuda").mul(0.1).bfloat16() for _ in "qk")
    qkv = torch.randn(tokens, 2 * H * D + 2 * HKV * D, device="cuda").bfloat16()
    return ProjectedRows(qkv, torch.cat([angle.cos(), angle.sin()], dim=1), *weights, 1e-6)


def decode_calls(S: int, context: int, dtype: torch.dtype) -> tuple[list, Pages]:
    """(block table) of each call, all over one pool."""
    width = -(-context // PAGE)
    moved = 2 * S * context * HKV * D * dtype.itemsize
    count = max(2, min(MAX_CALLS, COLD_BYTES // moved))
    pages = make_pages(count * S * width, dtype)
    tables = torch.randperm(count * S * width, device="cuda").int().view(count, S, width) + 1
    return list(tables), pages


def measure_decode(S: int, context: int, dtype: torch.dtype, read: float) -> dict:
    tables, pages = decode_calls(S, context, dtype)
    rows, scale = make_rows(S), D**-0.5
    lengths = torch.full((S,), context, dtype=torch.int32, device="cuda")
    out = torch.empty(S, H * D, device="cuda", dtype=torch.bfloat16)
    call = lambda form, table: form(rows, pages, table, lengths, scale, out)
    want = call(attention_decode_torch, tables[0]).clone()
    got = call(attention_decode_triton, tables[0])
    error = ((got.float() - want.float()).norm() / want.float().norm()).item()
    if not error < 2e-2:
        raise RuntimeError(f"{S} sequences of {context} tokens in {dtype}: off by {error}")
    chains = {"triton": [lambda t=t: call(attention_decode_triton, t) for t in tables]}
    if context <= 1024:
        chains["torch"] = [lambda t=t: call(attention_decode_torch, t) for t in tables[:8]]
    us = interleaved_us(chains, rounds=10)
    moved = 2 * S * context * HKV * D * dtype.itemsize
    return {
        "sequences": S,
        "context": context,
        "pages": str(dtype).removeprefix("torch."),
        "bytes": moved,
        **{f"{name}_us": time for name, time in us.items()},
        "share_of_read": moved / us["triton"] * 1e6 / read,
    }


def chunk_meta(S: int, before: int, chunk: int) -> PagedAttentionMetadata:
    total = before + chunk
    width = -(-total // PAGE)
    table = torch.randperm(S * width, device="cuda").int().view(S, width) + 1
    positions = torch.arange(before, total, device="cuda")
    slots = table[:, positions // PAGE].long() * PAGE + positions % PAGE
    return PagedAttentionMetadata(
        num_decodes=0,
        num_prefills=S,
        query_start_loc=torch.arange(S + 1, device="cuda", dtype=torch.int32) * chunk,
        seq_lens=torch.full((S,), total, dtype=torch.int32, device="cuda"),
        block_table=table,
        slot_mapping=slots.flatten(),
        query_lens_cpu=(chunk,) * S,
        seq_lens_cpu=(total,) * S,
        max_query_len=chunk,
        max_seq_len=total,
    )


def measure_chunk(S: int, before: int, chunk: int, dtype: torch.dtype) -> dict:
    meta, rows = chunk_meta(S, before, chunk), make_rows(S * chunk)
    pages = make_pages(meta.block_table.numel(), dtype)
    out = torch.empty(S * chunk, H * D, device="cuda", dtype=torch.bfloat16)
    calls = {"triton": lambda: attention_prefill_triton(rows, pages, meta, D**-0.5, out)}
    if before == 0 and dtype == torch.bfloat16:
        # [S, heads, chunk, D]: attention alone, without norm, rotation, pages and gate
        q, _, k, v = (x.unflatten(0, (S, chunk)).transpose(1, 2).contiguous() for x in prepare_torch(rows, HKV))
        backends = {
            "flash": torch.nn.attention.SDPBackend.FLASH_ATTENTION,
            "cudnn": torch.nn.attention.SDPBackend.CUDNN_ATTENTION,
        }
        for name, backend in backends.items():

            def sdpa(backend: object = backend) -> torch.Tensor:
                with torch.nn.attention.sdpa_kernel(backend):
                    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

            try:
                sdpa()
            except RuntimeError:
                continue
            calls[name] = sdpa
    us = interleaved_us({name: [call] * 4 for name, call in calls.items()}, rounds=10)
    flop = 4 * S * H * D * chunk * (before + (chunk + 1) / 2)
    return {
        "sequences": S,
        "before": before,
        "chunk": chunk,
        "pages": str(dtype).removeprefix("torch."),
        "tflops": flop / us["triton"] * 1e-6,
        **{f"{name}_us": time for name, time in us.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("needs a CUDA device")
    torch.manual_seed(0)
    bandwidth = bandwidths()
    print(f"{torch.cuda.get_device_name()}: reads {bandwidth['read'] * 1e-12:.2f} TB/s")
    decode, chunks = [], []
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        for S in SEQUENCES:
            for context in CONTEXTS:
                row = measure_decode(S, context, dtype, bandwidth["read"])
                decode.append(row)
                print(
                    f"{row['pages']:>14} {S:3} x {context:5}: {row['triton_us']:8.2f} us {row['share_of_read']:5.0%}",
                    flush=True,
                )
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        for S, before, chunk in CHUNKS:
            row = measure_chunk(S, before, chunk, dtype)
            chunks.append(row)
            rest = " ".join(f"{name} {value:.1f}" for name, value in row.items() if name.endswith("_us"))
            print(f"{row['pages']:>14} {S:3} x {before}+{chunk}: {row['tflops']:5.0f} TFLOP/s {rest}", flush=True)
    write_result(args.json, "attention", bandwidth, heads=[H, HKV, D, ROTARY], page=PAGE, decode=decode, chunks=chunks)


if __name__ == "__main__":
    main()
