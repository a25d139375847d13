"""`vllm bench throughput`: many requests that are all there at once, through LLM.generate."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from vllm.benchmarks.datasets import add_dataset_args, check_dataset_args, make_samples
from vllm.benchmarks.report import add_output_dir, begin, check_output_dir, markdown_table, write_json, write_report
from vllm.benchmarks.variants import given
from vllm.engine.arg_utils import EngineArgs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """This command's flags and the engine's."""
    parser.add_argument("model_tag", nargs="?", metavar="MODEL", help="the same as --model")
    add_dataset_args(parser)
    group = parser.add_argument_group("throughput")
    group.add_argument("--input-len", type=int, metavar="N", help="the same as --random-input-len")
    group.add_argument(
        "--output-len", type=int, metavar="N", help="the number of tokens to generate, whatever the data set says"
    )
    group.add_argument("--output-json", metavar="FILE", help="write the result into this file")
    add_output_dir(group)
    EngineArgs.add_cli_args(parser)


def run(args: argparse.Namespace) -> int:
    """Measure and print; 130 where it was interrupted, with what was done until then."""
    if args.input_len is not None:
        args.random_input_len = args.input_len
    for name in ("random", "sharegpt", "custom", "prefix_repetition"):
        if args.output_len is not None:
            setattr(args, f"{name}_output_len", args.output_len)
    check_dataset_args(args)
    check_output_dir(args)
    engine = {**given(EngineArgs.from_cli_args(args)), "use_tqdm_on_load": False}
    result = begin("throughput", args) | {"model": engine["model"]}
    measure(args, engine, result)
    finish(args, result)
    if result["interrupted"]:
        print(f"interrupted: {result['num_requests']} of {args.num_prompts} requests were done", file=sys.stderr)
        return 130
    return 0


def measure(args: argparse.Namespace, engine: dict[str, Any], result: dict[str, Any]) -> None:
    """Run the requests; `result` gets time and tokens of those that were finished."""
    from tqdm import tqdm

    from vllm.entrypoints.llm import LLM
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    llm = LLM(**engine)
    core, vocab = llm.llm_engine, llm.llm_engine.config.hf_config.text.vocab_size
    made_up = args.dataset_name in ("random", "prefix_repetition")
    samples = make_samples(args, None if made_up else llm.get_tokenizer(), vocab, args.seed)
    llm.generate([{"prompt_token_ids": [1]}], SamplingParams(max_tokens=2, ignore_eos=True), use_tqdm=False)
    sent, prompt_tokens, output_tokens = [], 0, 0
    start = time.perf_counter()
    with tqdm(total=len(samples), desc="requests", dynamic_ncols=True) as bar:
        try:
            for i, sample in enumerate(samples):
                prompt = sample.prompt if isinstance(sample.prompt, str) else {"prompt_token_ids": sample.prompt}
                params = SamplingParams(
                    temperature=1.0,
                    top_p=1.0,
                    max_tokens=sample.output_len,
                    ignore_eos=True,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                )
                core.add_request(f"bench-{i}", prompt, params)
                sent.append(f"bench-{i}")
            while core.has_unfinished_requests:
                for output in core.step():
                    prompt_tokens += len(output.prompt_token_ids)
                    output_tokens += len(output.outputs[0].token_ids)
                    bar.update()
            result["complete"] = True
        except KeyboardInterrupt:
            core.abort_requests(sent)
            result["interrupted"] = True
        done = bar.n
    elapsed = time.perf_counter() - start
    result |= {
        "elapsed_time": elapsed,
        "num_requests": done,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "total_num_tokens": prompt_tokens + output_tokens,
        "requests_per_second": done / elapsed,
        "tokens_per_second": (prompt_tokens + output_tokens) / elapsed,
        "output_tokens_per_second": output_tokens / elapsed,
    }


def finish(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Print and write."""
    print(
        f"Throughput: {result['requests_per_second']:.2f} requests/s, {result['tokens_per_second']:.2f} total tokens/s, "
        f"{result['output_tokens_per_second']:.2f} output tokens/s"
    )
    print(f"Total num prompt tokens:  {result['prompt_tokens']}\nTotal num output tokens:  {result['output_tokens']}")
    if args.output_json:
        write_json(Path(args.output_json), result)
    names = ("num_requests", "elapsed_time", "requests_per_second", "tokens_per_second", "output_tokens_per_second")
    rows = [[name.replace("_", " "), f"{result[name]:,.2f}"] for name in names]
    write_report(args, result, [("Throughput", markdown_table(["", ""], rows))])
