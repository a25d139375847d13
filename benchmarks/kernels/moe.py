"""One layer's mixture of experts, router and shared expert included, of the 35B shape: our ways beside PyTorch's.

    python -m benchmarks.kernels.moe [--json result.json] [--tokens 1,16] [--weights "fp8 blocks"]

Weights are cold: calls rotate over several layers, and each call has tokens of its own. `bytes` counts what must be read once: the
weights of the experts that the tokens chose, the shared expert's and the router's.
"""

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.kernels.timing import bandwidths, interleaved_us, write_result
from tools.tiny_formats import nvfp4, packed
from vllm.config.checkpoint import load_hf_config, resolve_model
from vllm.config.quantization import parse_quantization
from vllm.model_executor.layers.fused_moe import layer as module
from vllm.model_executor.layers.fused_moe.experts import ExpertsPlan, plan_experts
from vllm.model_executor.layers.fused_moe.ops import grouped
from vllm.model_executor.layers.fused_moe.ops.grouped_fp8 import prefers_fp8
from vllm.model_executor.layers.quantization.plan import ConfigPlan
from vllm.model_executor.models.qwen3_5 import SparseMoE

TOKENS = (1, 2, 4, 8, 12, 16, 32, 64, 128, 256, 1024, 4096)
PLAIN = ["lm_head", r"re:.*mlp\.gate$", r"re:.*shared_expert_gate$"]
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
WEIGHTS = {  # preset, and how its weights are stored where it does not say
    "int4 g32": ("preset:qwen3.5-35b-a3b-awq-4bit", None),
    "bf16": ("preset:qwen3.5-35b-a3b", None),
    "fp8 blocks": ("preset:qwen3.5-35b-a3b", FP8),
    "int8 g128": ("preset:qwen3.5-35b-a3b", packed(8, 128, True).config(PLAIN)),
    "fp4": ("preset:qwen3.5-35b-a3b", nvfp4().config(PLAIN)),
}
LAYERS = 4


def build(preset: str, quantization: dict | None) -> tuple[SparseMoE, ...]:
    """Layers of random weights, of the size that a trained model's have."""
    config = load_hf_config(resolve_model(preset))
    generator = torch.Generator("cuda").manual_seed(0)
    plan = ConfigPlan(parse_quantization(quantization or config.quantization, preset), torch.bfloat16)
    layers = []
    for i in range(LAYERS):
        with torch.device("cuda"):
            layer = SparseMoE(config.text, f"model.layers.{i}.mlp", plan)
        for part in layer.modules():
            if hasattr(part, "fill_dummy"):
                part.fill_dummy(generator)
        for part in layer.modules():
            if hasattr(part, "process_weights_after_loading"):
                part.process_weights_after_loading()
        layers.append(layer.requires_grad_(False))
    return tuple(layers)


def forced(plan: ExpertsPlan | None, fp8_inputs: bool = True):
    """A call of the layer that takes this way."""

    def call(layer: SparseMoE, x: torch.Tensor) -> torch.Tensor:
        module.plan_experts = plan_experts if plan is None else lambda *args, **kwargs: plan
        grouped.prefers_fp8 = prefers_fp8 if fp8_inputs else lambda *args: False
        try:
            return layer(x)
        finally:
            module.plan_experts, grouped.prefers_fp8 = plan_experts, prefers_fp8

    return call


def ways(tokens: int, weights: str) -> dict[str, ExpertsPlan | None]:
    """What is worth timing at this size; "auto" is what the layer does."""
    found: dict[str, ExpertsPlan | None] = {"auto": None, "auto_again": None}
    if tokens <= 16:
        found["few"] = ExpertsPlan("few")
    if tokens <= 64 and weights.startswith(("int4", "fp4")):
        found["w4"] = ExpertsPlan("w4")
    if tokens > 1:
        found |= {
            f"tiles_{block}": ExpertsPlan("tiles", block)
            for block in (16, 32, 64, 128)
            if block <= max(16, tokens // 2)
        }
    if weights == "bf16" or tokens >= 256:
        found["grouped"] = ExpertsPlan("grouped")
    return found


def weight_bytes(layer: SparseMoE, x: torch.Tensor) -> int:
    """Bytes of the weights that these tokens need."""
    chosen = layer.gate(x).topk(layer.experts.top_k).indices.unique().numel()
    sizes = {
        name: sum(p.numel() * p.element_size() for p in part.parameters()) for name, part in layer.named_children()
    }
    return sizes.pop("experts") * chosen // layer.experts.num_experts + sum(sizes.values())


def measure(layers: tuple[SparseMoE, ...], tokens: int, weights: str, bandwidth: float) -> dict:
    calls = 8 if tokens <= 256 else LAYERS
    xs = [torch.randn(tokens, 2048, device="cuda", dtype=torch.bfloat16) for _ in range(calls)]
    pairs = [(layers[i % LAYERS], x) for i, x in enumerate(xs)]
    timed = {name: forced(plan) for name, plan in ways(tokens, weights).items()}
    if weights == "fp8 blocks" and tokens >= 64:
        timed["tiles_32_16bit_inputs"] = forced(ExpertsPlan("tiles", 32), fp8_inputs=False)
    results = {name: call(*pairs[0]).float() for name, call in timed.items()}
    for name, result in results.items():
        # of the median token: where two experts are all but equal, a rounded logit may decide otherwise
        error = ((result - results["auto"]).norm(dim=1) / results["auto"].norm(dim=1)).median().item()
        if not error < (1e-1 if weights == "fp8 blocks" else 1e-2):  # by how inputs are rounded
            raise RuntimeError(f"{name} differs from auto by {error:.2g} at {tokens} tokens")
    chains = {name: [lambda c=call, p=pair: c(*p) for pair in pairs] for name, call in timed.items()}
    times = interleaved_us(chains, rounds=20 if tokens <= 256 else 8)
    moved = sum(weight_bytes(*pair) for pair in pairs) / calls
    row = {
        "tokens": tokens,
        "bytes": moved,
        "us": times["auto"],
        "share_of_read": moved / times["auto"] * 1e6 / bandwidth,
    }
    return row | {f"{name}_us": time for name, time in times.items() if name != "auto"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--weights", choices=WEIGHTS, action="append")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("needs a CUDA device")
    torch.manual_seed(0)
    bandwidth = bandwidths()
    print(
        f"{torch.cuda.get_device_name()}: read {bandwidth['read'] * 1e-12:.2f} TB/s. One layer, 256 experts, top 8, us:"
    )
    results = {}
    for name in args.weights or WEIGHTS:
        layers = build(*WEIGHTS[name])
        results[name] = []
        for tokens in map(int, args.tokens.split(",")):
            row = measure(layers, tokens, name, bandwidth["read"])
            results[name].append(row)
            others = ", ".join(f"{key[:-3]} {value:.1f}" for key, value in row.items() if key.endswith("_us"))
            print(
                f"{name} {tokens:5}: {row['us']:8.2f} us, {row['share_of_read']:4.0%} of the bandwidth ({others})",
                flush=True,
            )
        del layers
        torch.cuda.empty_cache()
    write_result(args.json, "moe", bandwidth, **results)


if __name__ == "__main__":
    main()
