"""Whole Gated DeltaNet layers (35B shape) in each of their variants: what `auto` and the dual-stream window are chosen by.

    python -m benchmarks.kernels.gdn_variants [--json result.json]

A call is one layer's forward, from x to the output projection. Eight layers take turns, so that weights come from memory. `graph` is the
median time of a call inside a CUDA graph; `eager` the wall time of a call without one, where launching is part of it. Variants of
one row are measured by turns.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import triton

from benchmarks.kernels.layernorm import graph_time_us
from vllm.config.hf_config import TextConfig
from vllm.config.model import ModelConfig
from vllm.config.vllm import VllmConfig
from vllm.forward_context import ForwardContext, GDNAttentionMetadata, set_forward_context
from vllm.model_executor.layers.mamba.gdn_linear_attn import DECODE, IN_PROJ, GatedDeltaNet
from vllm.model_executor.layers.quantization.plan import ConfigPlan
from vllm.v1.attention.backends.gdn_attn import prefill_chunks
from vllm.version import __version__

LAYERS = 8
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
PROMPTS = (16, 64, 256, 1024, 4096)
MODEL = "preset:qwen3.5-35b-a3b"


def build(text: TextConfig, slots: int) -> list[GatedDeltaNet]:
    layers, generator = [], torch.Generator("cuda").manual_seed(0)
    with torch.device("cuda"):
        for i in range(LAYERS):
            layer = GatedDeltaNet(text, prefix=f"{i}", plan=ConfigPlan(None, torch.bfloat16)).requires_grad_(False)
            for module in layer.modules():
                if hasattr(module, "fill_dummy"):
                    module.fill_dummy(generator)
            layer.conv_state = layer.make_state("conv_state", slots, torch.bfloat16, "cuda")
            layers.append(layer)
    return layers


def metadata(decodes: int, prompt: int) -> GDNAttentionMetadata:
    lens = (prompt,) if prompt else ()
    order = torch.randperm(decodes + 1, generator=torch.Generator().manual_seed(0)) + 1
    return GDNAttentionMetadata(
        num_decodes=decodes,
        num_prefills=len(lens),
        num_prefill_tokens=prompt,
        state_indices=order[: decodes + len(lens)].int().cuda(),
        prefill_query_start_loc=torch.tensor([0, *lens], dtype=torch.int32, device="cuda"),
        prefill_query_lens_cpu=lens,
        prefill_has_initial_state=torch.zeros(len(lens), dtype=torch.bool, device="cuda"),
        **prefill_chunks(lens, torch.device("cuda")),
    )


def calls(layers: list[GatedDeltaNet], decodes: int, prompt: int = 0) -> list[Callable[[], None]]:
    meta = metadata(decodes, prompt)
    x = torch.randn(decodes + prompt, layers[0].in_proj.in_features, device="cuda", dtype=torch.bfloat16)
    context = ForwardContext(attn=None, gdn=meta)

    def call(layer: GatedDeltaNet) -> None:
        with set_forward_context(context):
            layer(x)

    return [lambda layer=layer: call(layer) for layer in layers]


def eager_us(todo: list[Callable[[], None]]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for call in todo:
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e6 / len(todo)


def set_all(layers: list[GatedDeltaNet], **variants: str) -> None:
    for layer in layers:
        layer.set_variants(**variants)


def by_turns(
    layers: list[GatedDeltaNet], stage: str, names: list[str], measure: Callable[[], float], rounds: int
) -> dict:
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds + 1):
        for name in names:
            set_all(layers, **{stage: name})
            taken = measure()
            if i:  # the first round compiles kernels
                times[name].append(taken)
    return {f"{name}_us": round(statistics.median(values), 2) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    text = VllmConfig.create(ModelConfig(model=MODEL), device="cuda").hf_config.text
    layers = build(text, max(BATCHES) + 2)
    result = {
        "benchmark": "kernels/gdn_variants",
        "command": "python -m benchmarks.kernels.gdn_variants",
        "date": date.today().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "vllm": __version__,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "model": MODEL,
        "decode_graph": [],
        "in_proj_graph": [],
        "in_proj_eager_prompt": [],
    }

    def add(table: str, **row: object) -> None:
        result[table].append(row)
        print(table, row, flush=True)

    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            for layer in layers:
                layer.dual_stream_min, layer.dual_stream_max, layer.two_streams_outside_graphs = 0, 1 << 30, True
                layer.ssm_state = layer.make_state("ssm_state", max(BATCHES) + 2, dtype, "cuda")
            for batch in BATCHES:
                set_all(layers, in_proj="fused")
                todo = calls(layers, batch)
                graph = lambda todo=todo: graph_time_us(todo, replays=20)
                add("decode_graph", state=str(dtype), batch=batch, **by_turns(layers, "decode", list(DECODE), graph, 2))
        set_all(layers, decode="fused")
        for batch in BATCHES:
            todo = calls(layers, batch)
            graph = lambda todo=todo: graph_time_us(todo, replays=20)
            add("in_proj_graph", tokens=batch, **by_turns(layers, "in_proj", list(IN_PROJ), graph, 2))
        for prompt in PROMPTS:
            todo = calls(layers, 0, prompt) * 3
            measure = lambda todo=todo: eager_us(todo)
            add("in_proj_eager_prompt", tokens=prompt, **by_turns(layers, "in_proj", list(IN_PROJ), measure, 5))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
