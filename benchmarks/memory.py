"""Does a model stay within the memory that `vllm plan` prints for it? Generates with dummy weights on a GPU and compares.

    python benchmarks/memory.py --model preset:qwen3.5-35b-a3b --output-len 64 --out benchmarks/results/memory_35b.json

Exits with 1 where weights, workspace or total exceed the plan, or where more than 1 GiB of the GPU is in use beside weights and pools, CUDA's
own context with it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
import triton

from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.cli.plan import make_plan
from vllm.v1.core.memory_plan import RUNTIME_RESERVE, GiB, format_bytes


def git_hash() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="preset:qwen3.5-35b-a3b")
    parser.add_argument("--prompt-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--num-seqs", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--max-model-len", type=int, default=32768)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    parser.add_argument("--git", default=git_hash(), help="revision to note where the folder is not a git checkout")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    engine_args = {
        "model": args.model,
        "load_format": "dummy",
        "max_model_len": args.max_model_len,
        "gpu_memory_utilization": args.gpu_memory_utilization,
    }
    total = torch.cuda.get_device_properties(0).total_memory
    plan = make_plan(EngineArgs(**engine_args).create_engine_config(), total)
    print(plan.describe())

    start = time.perf_counter()
    llm = LLM(**engine_args)
    start_seconds = time.perf_counter() - start
    weights = sum(p.numel() * p.element_size() for p in llm.llm_engine.core.worker.runner.model.parameters())
    runs = []
    for n in args.num_seqs:
        prompts = [[(7 * i + j) % 200_000 + 100 for j in range(args.prompt_len)] for i in range(n)]
        params = SamplingParams(temperature=0.0, max_tokens=args.output_len, ignore_eos=True)
        llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True), use_tqdm=False)
        torch.cuda.synchronize()
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        lengths = {len(o.outputs[0].token_ids) for o in outputs}
        assert lengths == {args.output_len}, lengths
        runs.append({"num_seqs": n, "seconds": seconds, "tokens_per_second": n * args.output_len / seconds})
        print(f"{n:4d} sequences: {args.output_len} tokens each in {seconds:.2f} s")

    while llm.llm_engine.core.can_prepare:  # what a server does when it has nothing to do
        llm.llm_engine.core.prepare()
    sizes = llm.llm_engine.core.worker.sizes
    free, _ = torch.cuda.mem_get_info()
    pools = sizes.kv_bytes + sizes.state_bytes
    measured = {
        "weights": weights,
        "pools": pools,
        "workspace": torch.cuda.max_memory_reserved() - weights - pools,
        "beside_weights_and_pools": total - free - weights - pools,
        "used_on_device": total - free,
    }
    planned = {
        "weights": plan.weight_total,
        "workspace": plan.workspace + RUNTIME_RESERVE,
        "beside_weights_and_pools": GiB,
        "used_on_device": int(total * args.gpu_memory_utilization),
    }
    within = {name: measured[name] <= limit for name, limit in planned.items()}
    for name, limit in planned.items():
        verdict = "within" if within[name] else "MORE THAN"
        print(f"{name:25s} {format_bytes(measured[name]):>10s} measured, {verdict} {format_bytes(limit)} planned")
    if args.out:
        result = {
            "gpu": torch.cuda.get_device_name(0),
            "versions": {"torch": torch.__version__, "triton": triton.__version__, "python": sys.version.split()[0]},
            "git": args.git,
            "command": " ".join(["python", *sys.argv]),
            "start_seconds": start_seconds,
            "planned_bytes": planned,
            "measured_bytes": measured,
            "within": within,
            "runs": runs,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if all(within.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
