"""`vllm bench startup`: from nothing to the first token, with every cache empty and with every cache full.

Caches are those of compiled kernels. Both kinds of start use a folder of this command's own in their place, which it makes and removes: nobody
else's files are touched. The operating system's cache of files is as it is, so the weights are warm unless they have never been read.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from vllm import envs
from vllm.benchmarks.job import run_job
from vllm.benchmarks.report import (
    add_output_dir,
    begin,
    check_output_dir,
    markdown_table,
    table,
    write_json,
    write_report,
)
from vllm.benchmarks.variants import given
from vllm.engine.arg_utils import EngineArgs

CACHES = {
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "CUDA_CACHE_PATH": "cuda",
    "VLLM_CACHE_ROOT": "vllm",
}
"""Environment variable -> folder inside our own."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """This command's flags and the engine's."""
    parser.add_argument("model_tag", nargs="?", metavar="MODEL", help="the same as --model")
    group = parser.add_argument_group("startup")
    group.add_argument("--num-cold", type=int, default=1, metavar="N", help="starts with empty caches [1]")
    group.add_argument(
        "--num-warm", type=int, default=2, metavar="N", help="starts with what the last cold one left [2]"
    )
    group.add_argument("--input-len", type=int, default=32, metavar="N", help="tokens of the first prompt [32]")
    group.add_argument("--output-json", metavar="FILE", help="write the result into this file")
    add_output_dir(group)
    EngineArgs.add_cli_args(parser)


def run(args: argparse.Namespace) -> int:
    """Start, time, print; 130 where it was interrupted."""
    if args.num_cold < 1 or args.num_warm < 0 or args.input_len < 1:
        raise ValueError("--num-cold and --input-len must be at least 1, and --num-warm not below 0")
    check_output_dir(args)
    engine = {**given(EngineArgs.from_cli_args(args)), "use_tqdm_on_load": False}
    EngineArgs(**engine).create_engine_config()  # a wrong model is known before anything is started
    result = begin("startup", args) | {"model": engine["model"], "starts": []}
    try:
        for number in range(1, args.num_cold + 1):
            with tempfile.TemporaryDirectory(prefix="vllm-startup-") as folder:
                start("cold", number, engine, args.input_len, folder, result)
                if number == args.num_cold:
                    for warm in range(1, args.num_warm + 1):
                        start("warm", warm, engine, args.input_len, folder, result)
        result["complete"] = True
    except KeyboardInterrupt:
        result["interrupted"] = True
    if result["starts"]:
        finish(args, result)
    if result["interrupted"]:
        print(f"interrupted after {len(result['starts'])} starts", file=sys.stderr)
        return 130
    return 0


def cache_environment(folder: str) -> dict[str, str]:
    """Every cache of compiled code, moved into the folder. A variable of ours is left out where nothing reads it."""
    return {
        name: str(Path(folder) / place)
        for name, place in CACHES.items()
        if not name.startswith("VLLM_") or name in envs.VARIABLES
    }


def start(kind: str, number: int, engine: dict[str, Any], input_len: int, folder: str, result: dict[str, Any]) -> None:
    """One start, whose caches are in the folder."""
    print(f"{kind} start {number}", file=sys.stderr, flush=True)
    found = run_job("startup", {"engine": engine, "input_len": input_len}, cache_environment(folder))
    result["starts"].append({"kind": kind, "number": number, **found})


def finish(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Print and write the phases."""
    for kind in ("cold", "warm"):
        totals = [start["total"] for start in result["starts"] if start["kind"] == kind]
        if totals:
            result[f"{kind}_seconds"] = statistics.median(totals)
    head, rows = phase_table(result)
    print(table(head, rows))
    if args.output_json:
        write_json(Path(args.output_json), result)
    write_report(args, result, [("Seconds to the first token", markdown_table(head, rows))])


def phase_table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Starts down, phases across."""
    phases = list(result["starts"][0]["phases"])
    rows = [
        [
            f"{start['kind']} {start['number']}",
            *(f"{start['phases'][name]:.2f}" for name in phases),
            f"{start['total']:.2f}",
        ]
        for start in result["starts"]
    ]
    for row, start in zip(rows, result["starts"]):
        row.append(f"{start['compiled']} / {start['loaded']}")
    return ["start, seconds", *phases, "in all", "compiled / loaded"], rows
