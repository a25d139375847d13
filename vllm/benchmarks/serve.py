"""`vllm bench serve`: drive a running OpenAI-compatible server, ours or another's, and report what its clients feel."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import signal
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from vllm import envs
from vllm.benchmarks import serve_metrics
from vllm.benchmarks.datasets import Sample, add_dataset_args, check_dataset_args, make_samples
from vllm.benchmarks.report import add_output_dir, begin, check_output_dir, write_json, write_report
from vllm.engine.arg_parser import json_object

BACKENDS = {"openai": "/v1/completions", "vllm": "/v1/completions", "openai-chat": "/v1/chat/completions"}
"""Backend -> its endpoint."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """This command's flags. There is no engine here, so there are none of its flags."""
    server = parser.add_argument_group("server")
    server.add_argument(
        "--backend",
        choices=BACKENDS,
        default="openai",
        help="completions (openai, vllm) or conversations (openai-chat) [openai]",
    )
    server.add_argument("--base-url", metavar="URL", help="such as http://127.0.0.1:8000; default: --host and --port")
    server.add_argument("--host", default="127.0.0.1", help="[127.0.0.1]")
    server.add_argument("--port", type=int, default=8000, help="[8000]")
    server.add_argument("--endpoint", metavar="PATH", help="default: the backend's")
    server.add_argument("--model", metavar="NAME", help="default: the first that the server lists")
    server.add_argument(
        "--served-model-name", metavar="NAME", help="the model's name in requests, where --model names its tokenizer"
    )
    server.add_argument(
        "--tokenizer", metavar="NAME", help="folder or id, to make prompts of exact lengths; default: the model's"
    )
    server.add_argument(
        "--skip-tokenizer-init", action="store_true", help="send random prompts as token ids, without a tokenizer"
    )
    server.add_argument(
        "--header", action="append", default=[], metavar="NAME=VALUE", help="sent with every request; may be repeated"
    )
    server.add_argument(
        "--extra-body", type=json_object, default={}, metavar="JSON", help="fields laid over every request"
    )
    server.add_argument(
        "--ready-check-timeout-sec",
        type=float,
        default=60,
        metavar="S",
        help="wait so long for the server to answer; 0: do not ask before [60]",
    )
    add_dataset_args(parser)
    load = parser.add_argument_group("load")
    load.add_argument(
        "--request-rate",
        type=float,
        default=float("inf"),
        metavar="X",
        help="requests a second; inf sends all at once [inf]",
    )
    load.add_argument(
        "--burstiness",
        type=float,
        default=1.0,
        metavar="X",
        help="1: Poisson arrivals; less: bursts; more: even ones [1]",
    )
    load.add_argument("--max-concurrency", type=int, metavar="N", help="most requests at once; the others wait here")
    load.add_argument("--num-warmups", type=int, default=0, metavar="N", help="requests before the clock starts [0]")
    load.add_argument("--ignore-eos", action="store_true", help="generate as many tokens as were asked for")
    for name in ("temperature", "top_p", "min_p"):
        load.add_argument(
            f"--{name.replace('_', '-')}",
            type=float,
            metavar="X",
            help="of sampling" + (" [0]" if name == "temperature" else ""),
        )
    load.add_argument("--top-k", type=int, metavar="N", help="of sampling")
    load.add_argument("--seed", type=int, default=0, help="of prompts and arrivals [0]")
    output = parser.add_argument_group("result")
    output.add_argument(
        "--percentile-metrics", default="ttft,tpot,itl,e2el", metavar="NAMES", help="of ttft, tpot, itl, e2el [all]"
    )
    output.add_argument("--metric-percentiles", default="99", metavar="N[,N...]", help="[99]")
    output.add_argument(
        "--goodput",
        nargs="+",
        default=[],
        metavar="NAME:MS",
        help="count requests that keep these limits, such as ttft:200 tpot:20",
    )
    output.add_argument("--save-result", action="store_true", help="write a JSON file")
    output.add_argument("--save-detailed", action="store_true", help="with an entry for each request")
    output.add_argument("--result-dir", metavar="DIR", help="where to write it [.]")
    output.add_argument("--result-filename", metavar="NAME", help="default: from backend, rate, model and time")
    output.add_argument("--label", help="kept in the result")
    output.add_argument("--disable-tqdm", action="store_true", help="no progress bar")
    add_output_dir(output)


def run(args: argparse.Namespace) -> int:
    """0 where at least one request succeeded; 130 where it was interrupted."""
    limits, metrics, percentiles = (
        parse_goodput(args.goodput),
        parse_metrics(args.percentile_metrics),
        parse_percentiles(args.metric_percentiles),
    )
    check_dataset_args(args)
    if not (args.request_rate > 0 and 0 < args.burstiness < float("inf")):  # nan is neither
        raise ValueError(
            f"--request-rate and --burstiness must be above 0, and only the first may be inf; got {args.request_rate:g} and {args.burstiness:g}"
        )
    if args.max_concurrency is not None and args.max_concurrency < 1:
        raise ValueError(f"--max-concurrency must be at least 1; got {args.max_concurrency}")
    if args.num_warmups < 0 or not args.ready_check_timeout_sec >= 0:
        raise ValueError(
            "--num-warmups and --ready-check-timeout-sec must not be below 0; "
            f"got {args.num_warmups} and {args.ready_check_timeout_sec:g}"
        )
    check_output_dir(args)
    check_output_dir_of_result(args)
    result = begin("serve", args)
    records: list[serve_metrics.Record] = []
    failure = asyncio.run(_measure(args, result, records))
    if failure is not None:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    if not any(record.start for record in records):
        print("interrupted before a request was sent", file=sys.stderr)
        return 130
    result |= serve_metrics.summarise(records, result["duration"], metrics, percentiles, limits)
    print(serve_metrics.block(result, metrics, percentiles, args.request_rate, args.max_concurrency))
    _report(args, result, records, metrics, percentiles)
    return _judge(result, records)


def _judge(result: dict[str, Any], records: list[serve_metrics.Record]) -> int:
    """The exit code, and on stderr what went wrong."""
    errors = [record.error for record in records if record.error and record.error != "interrupted"]
    if errors:
        print(f"{len(errors)} requests failed; the first: {errors[0]}", file=sys.stderr)
    if any(record.success and not record.counted for record in records):
        print("the server does not report usage: each streamed event was counted as one token", file=sys.stderr)
    if result["interrupted"]:
        print(f"interrupted: the result holds the {result['completed']} requests that were done", file=sys.stderr)
        return 130
    return 0 if result["completed"] else 1


def check_output_dir_of_result(args: argparse.Namespace) -> None:
    """Raise ValueError for a folder that is not there, before anything is measured."""
    if (args.save_result or args.save_detailed) and args.result_dir and not Path(args.result_dir).expanduser().is_dir():
        raise ValueError(f"--result-dir {args.result_dir}: no such folder")


async def _measure(args: argparse.Namespace, result: dict[str, Any], records: list[serve_metrics.Record]) -> str | None:
    """Fill records; Ctrl-C ends the sending but keeps them. Returns why nothing could be measured, or None."""
    from tqdm import tqdm

    from vllm.benchmarks.drive import Endpoint, arrival_times, ask, drive, wait_until_ready
    from vllm.benchmarks.http_client import Client, RequestFailed

    client = Client(args.base_url or f"http://{args.host}:{args.port}", _headers(args))
    say = lambda line: print(line, file=sys.stderr, flush=True)
    task = asyncio.current_task()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    try:
        model = args.served_model_name or args.model or await _first_model(client, args.ready_check_timeout_sec)
        chat = BACKENDS[args.backend].endswith("chat/completions")
        endpoint = Endpoint(args.endpoint or BACKENDS[args.backend], chat, model, _fields(args))
        tokenizer_name, samples = _samples(args, model)
        result |= {"backend": args.backend, "model_id": model, "tokenizer_id": tokenizer_name, "label": args.label}
        if args.ready_check_timeout_sec > 0:
            first = Sample(samples[0].prompt, samples[0].prompt_len, min(samples[0].output_len, 4))
            await wait_until_ready(client, endpoint, first, args.ready_check_timeout_sec, say)
        for i in range(args.num_warmups):
            await ask(client, endpoint, samples[i % len(samples)])
        times = arrival_times(len(samples), args.request_rate, args.burstiness, args.seed)
        used = _cpu_seconds()
        with tqdm(
            total=len(samples), desc="requests", disable=args.disable_tqdm, dynamic_ncols=True, mininterval=0.5
        ) as bar:
            await drive(client, endpoint, samples, times, args.max_concurrency, records, lambda record: bar.update())
        result["complete"] = True
    except RequestFailed as error:
        return f"{args.base_url or f'http://{args.host}:{args.port}'}: {error}"
    except asyncio.CancelledError:
        result["interrupted"] = True
    finally:
        client.close()
    starts = [record.start for record in records if record.start]
    ends = [record.arrivals[-1] for record in records if record.arrivals]
    result["duration"] = max([*ends, min(starts) + 1e-9]) - min(starts) if starts else 0.0
    if records:
        result["client_cpu_seconds"] = _cpu_seconds() - used
    return None


def _samples(args: argparse.Namespace, model: str) -> tuple[str | None, list[Sample]]:
    """The tokenizer's name and the requests."""
    if args.skip_tokenizer_init:
        if args.backend == "openai-chat":
            raise ValueError("--skip-tokenizer-init: a conversation cannot be sent as token ids; give --tokenizer")
        return None, make_samples(args, None, 1000, args.seed)
    from vllm.config.checkpoint import resolve_model
    from vllm.v1.engine.tokenizer import load_tokenizer

    name = args.tokenizer or args.model or model
    try:
        folder = resolve_model(name) if name.startswith("preset:") else name
        tokenizer = load_tokenizer(folder)
    except (ValueError, FileNotFoundError) as error:
        hint = "" if args.tokenizer else "; give --tokenizer FOLDER, or --skip-tokenizer-init to send token ids"
        raise ValueError(f"{error}{hint}") from None
    return name, make_samples(args, tokenizer, None, args.seed)


async def _first_model(client: Any, seconds: float) -> str:
    from vllm.benchmarks.http_client import RequestFailed

    end = time.monotonic() + seconds
    while True:
        try:
            found = await client.get("/v1/models")
            return found["data"][0]["id"]
        except RequestFailed as error:
            if error.status is not None or time.monotonic() >= end:
                raise
            await asyncio.sleep(0.5)
        except (KeyError, IndexError, TypeError):
            raise RequestFailed("/v1/models lists no model; give --model") from None


def _headers(args: argparse.Namespace) -> dict[str, str]:
    headers = {}
    for item in args.header:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise ValueError(f"--header {item}: expected NAME=VALUE")
        headers[name.strip()] = value
    key = envs.VLLM_API_KEY or os.environ.get("OPENAI_API_KEY")
    if key and not any(name.lower() == "authorization" for name in headers):
        headers["Authorization"] = f"Bearer {key}"
    return headers


def _fields(args: argparse.Namespace) -> dict[str, Any]:
    """What every request's body has beside the prompt."""
    sampling = {name: getattr(args, name) for name in ("temperature", "top_p", "top_k", "min_p")}
    fields = {name: value for name, value in sampling.items() if value is not None}
    return fields | ({"ignore_eos": True} if args.ignore_eos else {}) | args.extra_body


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _report(
    args: argparse.Namespace,
    result: dict[str, Any],
    records: list[serve_metrics.Record],
    metrics: list[str],
    percentiles: list[float],
) -> None:
    saved = dict(result)
    if args.save_detailed:
        saved |= serve_metrics.details(records)
    saved |= {
        "num_prompts": len(records),
        "request_rate": "inf" if args.request_rate == float("inf") else args.request_rate,
    }
    saved |= {
        "burstiness": args.burstiness,
        "max_concurrency": args.max_concurrency,
        "date": saved["environment"]["date"],
    }
    if args.save_result or args.save_detailed:
        rate = saved["request_rate"] if saved["request_rate"] == "inf" else f"{args.request_rate:g}"
        model = str(result["model_id"]).rstrip("/").split("/")[-1].replace(":", "-")
        name = args.result_filename or f"{args.backend}-{rate}qps-{model}-{datetime.now():%Y%m%d-%H%M%S}.json"
        path = Path(args.result_dir or ".").expanduser() / name
        write_json(path, saved)
        print(f"written: {path}", file=sys.stderr)
    good = [record for record in records if record.success]
    if good:
        saved["distributions"] = {
            "ttfts": [record.ttft for record in good],
            "tpots": [tpot for record in good if (tpot := record.tpot) is not None] or [0.0],
            "e2els": [record.e2el for record in good],
        }
    text = f"```text\n{serve_metrics.block(result, metrics, percentiles, args.request_rate, args.max_concurrency)}\n```"
    write_report(args, saved, [("Result", text)])


def parse_goodput(words: list[str]) -> dict[str, float]:
    """["ttft:200"] -> {"ttft": 200.0}, milliseconds. Raises ValueError."""
    limits = {}
    for word in words:
        name, colon, value = word.partition(":")
        try:
            limits[name] = float(value)
        except ValueError:
            colon = ""
        if not colon or name not in ("ttft", "tpot", "e2el") or not limits[name] >= 0:
            raise ValueError(f"--goodput {word}: expected ttft, tpot or e2el and milliseconds, such as ttft:200")
    return limits


def parse_metrics(text: str) -> list[str]:
    """ "ttft,itl" -> ["ttft", "itl"]. Raises ValueError."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in serve_metrics.TITLES:
            raise ValueError(f"--percentile-metrics {name}: expected {', '.join(serve_metrics.TITLES)}")
    return names


def parse_percentiles(text: str) -> list[float]:
    """ "50,99.9" -> [50.0, 99.9]. Raises ValueError."""
    try:
        found = [float(word) for word in text.split(",")]
    except ValueError:
        found = [-1.0]
    if not all(0 <= p <= 100 for p in found):
        raise ValueError(f"--metric-percentiles {json.dumps(text)}: expected numbers from 0 to 100 with commas between")
    return found
