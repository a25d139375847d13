"""torch.compile over decoder layers with Gated DeltaNet: what naming layers by an opaque value saves against a plain string.

    python -m benchmarks.kernels.gdn_compile [--layers 12] [--json result.json]
    python -m benchmarks.kernels.gdn_compile --device cpu --backend count    (traces only; what the tests run)

One process a naming (VLLM_USE_LAYERNAME is read at import) with empty compiler caches: build the layers, compile and run each once, and
count how often Dynamo traced, how many different graphs it handed on, and how many of those Inductor compiled rather than found.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch

from vllm.config.checkpoint import TINY, load_hf_config
from vllm.config.gdn import GDNConfig
from vllm.forward_context import ForwardContext, GDNAttentionMetadata, set_forward_context
from vllm.model_executor.layers.mamba.gdn_sources import separate_sources
from vllm.model_executor.layers.quantization.plan import ConfigPlan
from vllm.model_executor.models.qwen3_5 import DecoderLayer
from vllm.utils import torch_utils
from vllm.version import __version__

NAMINGS = {"LayerName": "1", "string": "0"}


def build(count: int, device: str, dtype: torch.dtype) -> list[DecoderLayer]:
    """Dense decoder layers with a GDN mixer, states bound: of the 9B model's size on a GPU, tiny on a CPU."""
    text = replace(
        load_hf_config(TINY).text, num_hidden_layers=count, layer_types=["linear_attention"] * count, num_experts=0
    )
    sizes = {"hidden_size": 64, "intermediate_size": 96}
    if device == "cuda":
        sizes = {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
        }
    plan, config = ConfigPlan(None, dtype), GDNConfig(gdn_in_proj="dual_stream")
    generator, layers = torch.Generator(device).manual_seed(0), []
    with torch.device(device):
        for i in range(count):
            layer = DecoderLayer(replace(text, **sizes), i, plan, separate_sources, config).requires_grad_(False)
            for module in layer.modules():
                if hasattr(module, "fill_dummy"):
                    module.fill_dummy(generator)
            layers.append(layer)
    return layers


def clear_states(layers: list[DecoderLayer], x: torch.Tensor) -> None:
    for layer in layers:
        gdn = layer.linear_attn
        gdn.conv_state = gdn.make_state("conv_state", 8, x.dtype, x.device)
        gdn.ssm_state = gdn.make_state("ssm_state", 8, torch.float32, x.device)


def compile_all(count: int, device: str, backend: str) -> dict:
    """Compile and run every layer; the counts, the seconds, and the largest difference from running them as they are."""
    layers = build(count, device, torch.bfloat16 if device == "cuda" else torch.float32)
    weight = layers[0].input_layernorm.weight
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, weight.shape[0], generator=generator).to(weight)
    meta = GDNAttentionMetadata(
        num_decodes=4,
        num_prefills=0,
        num_prefill_tokens=0,
        state_indices=torch.tensor([1, 4, 2, 7], dtype=torch.int32, device=device),
        prefill_query_start_loc=torch.zeros(1, dtype=torch.int32, device=device),
        prefill_query_lens_cpu=(),
        prefill_has_initial_state=torch.zeros(0, dtype=torch.bool, device=device),
    )
    graphs: list[str] = []

    def counting(gm: torch.fx.GraphModule, inputs: list):
        graphs.append(gm.print_readable(print_output=False, include_stride=True))
        if backend == "count":
            return gm.forward
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(gm, inputs)

    torch._dynamo.config.recompile_limit = 2 * count + 8
    compiled = [torch.compile(layer, backend=counting, fullgraph=True, dynamic=False) for layer in layers]
    with torch.inference_mode(), set_forward_context(ForwardContext(attn=None, gdn=meta)):
        clear_states(layers, x)
        want = [layer(x, torch.zeros_like(x), None) for layer in layers]  # compiles the Triton kernels too
        clear_states(layers, x)
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        got = [layer(x, torch.zeros_like(x), None) for layer in compiled]
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    counters = torch._dynamo.utils.counters
    return {
        "opaque": torch_utils.USE_LAYERNAME,
        "traced": len(graphs),
        "different_graphs": len(set(graphs)),
        "inductor_compiled": counters["inductor"]["fxgraph_cache_miss"] + counters["inductor"]["fxgraph_cache_bypass"],
        "inductor_found": counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"],
        "seconds": round(seconds, 2),
        "max_difference": max((a - b).abs().max().item() for a, b in zip(sum(got, ()), sum(want, ()))),
    }


def in_fresh_process(naming: str, count: int, device: str, backend: str) -> dict:
    command = [sys.executable, "-m", "benchmarks.kernels.gdn_compile", "--child", "--layers", str(count)]
    command += ["--device", device, "--backend", backend]
    with tempfile.TemporaryDirectory() as cache:
        env = {**os.environ, "VLLM_USE_LAYERNAME": NAMINGS[naming], "TORCHINDUCTOR_CACHE_DIR": cache}
        done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--backend", choices=("inductor", "count"), default="inductor")
    parser.add_argument("--child", action="store_true", help="measure the naming of this process's environment")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(compile_all(args.layers, args.device, args.backend)))
        return
    result = {
        "benchmark": "kernels/gdn_compile",
        "command": f"python -m benchmarks.kernels.gdn_compile --layers {args.layers} --device {args.device} --backend {args.backend}",
        "date": date.today().isoformat(),
        "gpu": torch.cuda.get_device_name() if args.device == "cuda" else None,
        "vllm": __version__,
        "torch": torch.__version__,
        "layers": args.layers,
        "backend": args.backend,
    }
    for naming in NAMINGS:
        result[naming] = in_fresh_process(naming, args.layers, args.device, args.backend)
        print(naming, result[naming], flush=True)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
