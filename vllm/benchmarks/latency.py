"""`vllm bench latency`: one batch of equal requests, from the prompts to the last token, over and over."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from vllm.benchmarks import ab_report
from vllm.benchmarks.ab import engine_kwargs, uses_graphs
from vllm.benchmarks.report import (
    add_output_dir,
    begin,
    check_output_dir,
    markdown_table,
    table,
    write_json,
    write_report,
)
from vllm.benchmarks.stats import percentile
from vllm.engine.arg_utils import EngineArgs

PERCENTILES = (10, 25, 50, 75, 90, 99)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """This command's flags and the engine's."""
    parser.add_argument("model_tag", nargs="?", metavar="MODEL", help="the same as --model")
    group = parser.add_argument_group("latency")
    group.add_argument("--input-len", type=int, default=32, metavar="N", help="tokens of a prompt [32]")
    group.add_argument("--output-len", type=int, default=128, metavar="N", help="tokens generated for each [128]")
    group.add_argument("--batch-size", type=int, default=8, metavar="N", help="prompts in the batch [8]")
    group.add_argument("--num-iters-warmup", type=int, default=10, metavar="N", help="batches that do not count [10]")
    group.add_argument("--num-iters", type=int, default=30, metavar="N", help="batches that count [30]")
    group.add_argument("--output-json", metavar="FILE", help="write the result into this file")
    group.add_argument(
        "--roofline", action="store_true", help="bytes a step, the read bandwidth, and the share reached"
    )
    group.add_argument("--profile", action="store_true", help="kernels and time of a step, by component")
    add_output_dir(group)
    EngineArgs.add_cli_args(parser)


def run(args: argparse.Namespace) -> int:
    """Measure and print; 130 where it was interrupted."""
    for name in ("input_len", "output_len", "batch_size", "num_iters", "num_iters_warmup"):
        least = 0 if name == "num_iters_warmup" else 1
        if getattr(args, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}; got {getattr(args, name)}")
    check_output_dir(args)
    kwargs = engine_kwargs(args, args.batch_size, args.input_len + args.output_len)
    result = begin("latency", args) | {"model": kwargs["model"], "latencies": []}
    try:
        measure(args, kwargs, result)
        result["complete"] = True
    except KeyboardInterrupt:
        result["interrupted"] = True
    if result["latencies"]:
        finish(args, result)
    if result["interrupted"]:
        print(f"interrupted after {len(result['latencies'])} of {args.num_iters} batches", file=sys.stderr)
        return 130
    return 0


def measure(args: argparse.Namespace, kwargs: dict[str, Any], result: dict[str, Any]) -> None:
    """Fill `result` in, batch by batch."""
    from tqdm import tqdm

    from vllm.benchmarks.decode_run import check_concurrency, random_prompts, run_batch
    from vllm.benchmarks.job import run_job
    from vllm.entrypoints.llm import LLM
    from vllm.sampling_params import SamplingParams

    bandwidth, learnt = None, []
    if args.profile and uses_graphs(kwargs):
        spec = {"engine": kwargs, "settings": [{}], "concurrency": [args.batch_size], "input_len": args.input_len}
        learnt = run_job("profile", spec)
    if args.roofline:
        from vllm.benchmarks.read_bandwidth import read_bandwidth

        bandwidth = read_bandwidth(EngineArgs(**kwargs).create_engine_config().parallel_config.device)
    llm = LLM(**kwargs)
    engine = llm.llm_engine
    check_concurrency(engine, [args.batch_size], args.input_len + args.output_len)
    token_ids = random_prompts(args.batch_size, args.input_len, engine.config.hf_config.text.vocab_size)
    prompts = [{"prompt_token_ids": ids} for ids in token_ids]
    params = SamplingParams(temperature=0.0, max_tokens=args.output_len, ignore_eos=True, detokenize=False)
    for i in tqdm(range(args.num_iters_warmup + args.num_iters), desc="batches", dynamic_ncols=True):
        start = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        if i >= args.num_iters_warmup:
            result["latencies"].append(time.perf_counter() - start)
    if args.roofline:
        from vllm.benchmarks.roofline import reached, step_bytes
        from vllm.benchmarks.stats import median_with_bounds

        runs = [run_batch(engine, token_ids, args.output_len).step_ms for _ in range(3)]
        moved = step_bytes(engine.config, args.batch_size, args.input_len + args.output_len / 2)
        row = reached(moved, median_with_bounds(runs)["median"], bandwidth)
        result["roofline"] = {
            "read_bytes_s": bandwidth,
            "rows": [{"concurrency": args.batch_size, "variant": "this engine", **row}],
        }
    if args.profile:
        from vllm.benchmarks.step_profile import learnt_from, profile_steps, summarise

        kernels, steps = profile_steps(engine, args.batch_size, args.input_len)
        found = summarise(kernels, steps, learnt_from(learnt[0]) if learnt else None)
        result["profile"] = [{"concurrency": args.batch_size, **found}]


def finish(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Averages and percentiles, printed and written."""
    latencies = result["latencies"]
    result["avg_latency"] = sum(latencies) / len(latencies)
    result["percentiles"] = {str(p): percentile(latencies, p) for p in PERCENTILES}
    print(f"Avg latency: {result['avg_latency']} seconds")
    for p, value in result["percentiles"].items():
        print(f"{p}% percentile latency: {value} seconds")
    for heading, text in ab_report.sections(result, table):
        print(f"\n{heading}\n\n{text}")
    if args.output_json:
        write_json(Path(args.output_json), result)
    rows = [
        ["average", f"{result['avg_latency']:.4f}"],
        *([f"{p}%", f"{v:.4f}"] for p, v in result["percentiles"].items()),
    ]
    heading = f"{args.batch_size} prompts of {args.input_len} tokens, {args.output_len} generated for each"
    sections = [(heading, markdown_table(["of the batches", "seconds"], rows)), *ab_report.sections(result)]
    write_report(args, result, sections)
