"""`vllm bench ab`: the same work under several settings of the engine, alternated A B A B, with intervals and a verdict.

Stages of the GDN layers change between two batches of one engine, on one set of weights. Anything else takes a fresh process a round, also
alternated. Before anything is timed, the variants' greedy tokens are compared.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import sys
from pathlib import Path
from typing import Any

from vllm.benchmarks import ab_report
from vllm.benchmarks.report import add_output_dir, begin, check_output_dir, write_json, write_report
from vllm.benchmarks.stats import rounds_needed
from vllm.benchmarks.variants import RUN_TIME, Variant, given, parse_variant
from vllm.engine.arg_utils import EngineArgs

LABELS = "ABCDEFGH"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """This command's flags and the engine's."""
    parser.add_argument("model_tag", nargs="?", metavar="MODEL", help="the same as --model")
    group = parser.add_argument_group("comparison")
    for label in LABELS:
        text = "settings of one variant: name=value, several with commas between; base is the other flags as they are"
        group.add_argument(
            f"--{label.lower()}",
            metavar="NAME=VALUE[,...]",
            required=label in "AB",
            help=text if label == "A" else "another one" if label < "D" else argparse.SUPPRESS,
        )
    group.add_argument("--concurrency", default="1", metavar="N[,N...]", help="sequences at once, one point each [1]")
    group.add_argument("--input-len", type=int, default=128, metavar="N", help="tokens of a prompt [128]")
    group.add_argument("--output-len", type=int, default=128, metavar="N", help="tokens generated for each [128]")
    group.add_argument("--rounds", type=int, default=10, metavar="N", help="times that each variant is measured [10]")
    group.add_argument("--confidence", type=float, default=0.99, metavar="X", help="of the intervals [0.99]")
    group.add_argument(
        "--min-effect",
        type=float,
        default=0.01,
        metavar="X",
        help="ratios nearer to 1 than this are no difference [0.01]",
    )
    group.add_argument(
        "--check-len", type=int, default=16, metavar="N", help="greedy tokens compared before timing [16]"
    )
    group.add_argument(
        "--max-logprob-difference",
        type=float,
        metavar="X",
        help="end with an error where variants differ by more before timing",
    )
    group.add_argument(
        "--roofline", action="store_true", help="bytes a step, the read bandwidth, and the share reached"
    )
    group.add_argument("--profile", action="store_true", help="kernels and time of a step, by component")
    group.add_argument("--accuracy", action="store_true", help="score the bundled checkpoint's tasks for each variant")
    group.add_argument("--accuracy-items", type=int, default=100, metavar="N", help="questions a task [100]")
    add_output_dir(group)
    EngineArgs.add_cli_args(parser)


def run(args: argparse.Namespace) -> int:
    """Measure and print. 0, or 130 where it was interrupted; a difference is an answer, not an error."""
    variants = variants_of(args)
    concurrency = numbers("--concurrency", args.concurrency)
    for name in ("input_len", "output_len", "rounds", "check_len", "accuracy_items"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1; got {getattr(args, name)}")
    if not 0.5 <= args.confidence < 1 or args.min_effect < 0:
        raise ValueError(
            f"--confidence must lie in 0.5 to 1 and --min-effect not below 0; got {args.confidence:g}, {args.min_effect:g}"
        )
    check_output_dir(args)
    comparison = Comparison(args, variants, concurrency)
    return comparison.run()


def variants_of(args: argparse.Namespace) -> list[Variant]:
    """The variants in the order of their letters. Raises ValueError for one that is wrong, or where a letter was left out."""
    texts = {label: getattr(args, label.lower()) for label in LABELS}
    return [parse_variant(label, text) for label, text in texts.items() if text is not None]


def numbers(flag: str, text: str) -> tuple[int, ...]:
    """ "1,2,4" -> (1, 2, 4). Raises ValueError."""
    try:
        found = tuple(int(word) for word in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise ValueError(f"{flag} {text}: expected whole numbers of at least 1 with commas between, such as 1,2,4")
    return found


def engine_kwargs(args: argparse.Namespace, sequences: int, tokens: int) -> dict[str, Any]:
    """The engine's arguments, sized for this work unless the user says otherwise."""
    engine = given(EngineArgs.from_cli_args(args))
    page = engine.get("block_size", EngineArgs().block_size)  # one more, see check_concurrency
    return {"max_num_seqs": sequences, "max_model_len": tokens + page, **engine, "use_tqdm_on_load": False}


class Comparison:
    """One run of the command: fills `result`, and writes it down whenever a point is done."""

    def __init__(self, args: argparse.Namespace, variants: list[Variant], concurrency: tuple[int, ...]) -> None:
        from vllm.benchmarks.ab_engine import Workload  # torch comes with it, seconds after a mistyped flag is known

        self.args, self.variants = args, variants
        self.work = Workload(
            concurrency, args.input_len, args.output_len, args.rounds, min(args.check_len, args.output_len)
        )
        self.engine_args = engine_kwargs(args, max(concurrency), args.input_len + args.output_len)
        self.restart = any(variant.needs_restart for variant in variants)
        self.result: dict[str, Any] = begin("ab", args) | {
            "model": self.engine_args["model"],
            "fresh_processes": self.restart,
            "workload": dataclasses.asdict(self.work),
            "confidence": args.confidence,
            "min_effect": args.min_effect,
            "variants": {v.label: {"text": v.text, "settings": v.settings, "env": v.env} for v in variants},
            "agreement": [],
            "points": [],
        }

    def run(self) -> int:
        args, interrupted = self.args, False
        if args.rounds < rounds_needed(args.confidence):
            self.say(
                f"fewer than {rounds_needed(args.confidence)} rounds can show no difference at a confidence of {args.confidence:g}"
            )
        try:
            # First what needs a device to itself, while no engine holds its memory.
            if args.accuracy:
                self.score()
            learnt = self.learn() if args.profile else []
            self.bandwidth = self.measure_bandwidth() if args.roofline else None
            if self.restart:
                self.measure_fresh()
            else:
                self.measure_shared(learnt)
            self.result["complete"] = True
        except KeyboardInterrupt:
            self.result["interrupted"] = interrupted = True
        except BaseException as error:
            self.result["error"] = f"{type(error).__name__}: {error}"
            if self.result["points"]:
                self.write()
            raise
        self.write()
        self.say("")
        for heading, text in ab_report.sections(self.result, ab_report.table):
            print(f"\n{heading}\n\n{text}")
        if interrupted:
            self.say(
                "interrupted; " + ("what was measured is above" if self.result["points"] else "nothing was measured")
            )
        return 130 if interrupted else 0

    def say(self, line: str) -> None:
        """Where things are: one line that is written over on a terminal."""
        print(
            f"\r{line:<100}" if sys.stderr.isatty() else line,
            end="" if sys.stderr.isatty() else "\n",
            file=sys.stderr,
            flush=True,
        )

    # Parts

    def measure_shared(self, learnt: list[Any]) -> None:
        from vllm.benchmarks.ab_engine import SharedEngine
        from vllm.entrypoints.llm import LLM

        engine = LLM(**self.engine_args).llm_engine
        shared = SharedEngine(engine, self.variants, self.work)
        for label, stages in shared.in_force.items():
            self.result["variants"][label]["in_force"] = stages
        self.agreed(shared.check(self.say))
        gc.collect()
        gc.freeze()  # what was made at the start is not looked through again in the middle of a round
        try:
            for concurrency in self.work.concurrency:
                self.measure_point(shared, concurrency)
        finally:
            gc.unfreeze()
        if self.bandwidth is not None:
            self.add_roofline({variant.label: engine.config for variant in self.variants})
        if self.args.profile:
            self.add_profiles(shared, learnt)

    def measure_point(self, shared: Any, concurrency: int) -> None:
        """The rounds at one concurrency; what there is of them is kept whatever ends them."""
        rows = []
        try:
            for row in shared.rounds(concurrency, self.say):
                rows.append(row)
        finally:
            self.add_point(concurrency, rows)

    def measure_fresh(self) -> None:
        from vllm.benchmarks.ab_engine import fresh_rounds

        rows: dict[int, list[dict[str, dict[str, float]]]] = {n: [] for n in self.work.concurrency}
        try:
            for results, agreed in fresh_rounds(self.engine_args, self.variants, self.work, self.say):
                self.agreed(agreed)
                for label, result in results.items():
                    self.result["variants"][label]["in_force"] = result["in_force"]
                for i, concurrency in enumerate(self.work.concurrency):
                    rows[concurrency].append({label: result["points"][i]["round"] for label, result in results.items()})
        finally:
            for concurrency, found in rows.items():
                self.add_point(concurrency, found)
        if self.bandwidth is not None:
            configs = {
                v.label: EngineArgs(**{**self.engine_args, **v.settings}).create_engine_config() for v in self.variants
            }
            self.add_roofline(configs)
        if self.args.profile:
            self.say(
                "--profile: variants that need fresh processes are not profiled; give each as flags of its own run of bench latency"
            )

    def score(self) -> None:
        from vllm.benchmarks.job import run_job

        self.say("scoring the bundled checkpoint's tasks")
        device = {key: value for key, value in self.engine_args.items() if key in ("device", "gpu_memory_utilization")}
        count, scores = self.args.accuracy_items, {}
        if self.restart:
            for variant in self.variants:
                spec = {"engine": {**device, **variant.settings}, "settings": [{}], "count": count}
                (scores[variant.name],) = run_job("accuracy", spec, variant.env)
        else:
            spec = {"engine": device, "settings": [variant.settings for variant in self.variants], "count": count}
            scores = dict(zip([variant.name for variant in self.variants], run_job("accuracy", spec)))
        self.result["accuracy"] = {"count": count, "scores": scores}

    def device(self) -> str:
        return EngineArgs(**self.engine_args).create_engine_config().parallel_config.device

    def measure_bandwidth(self) -> float:
        from vllm.benchmarks.read_bandwidth import read_bandwidth

        self.say("measuring the read bandwidth")
        return read_bandwidth(self.device())

    def learn(self) -> list[Any]:
        """Which kernels belong to which component, where graphs will hide it: a table a variant."""
        if self.restart or not uses_graphs(self.engine_args):
            return []
        from vllm.benchmarks.job import run_job

        self.say("profiling once without CUDA graphs, to learn which kernel belongs to which component")
        spec = {
            "engine": self.engine_args,
            "settings": [self.run_time_settings(variant) for variant in self.variants],
            "concurrency": self.profiled(),
            "input_len": self.work.input_len,
        }
        return run_job("profile", spec)

    def profiled(self) -> list[int]:
        """The least and the most sequences: between them lies more of the same."""
        return sorted({min(self.work.concurrency), max(self.work.concurrency)})

    def run_time_settings(self, variant: Variant) -> dict[str, Any]:
        return {name: variant.settings.get(name, self.engine_args.get(name, "auto")) for name in RUN_TIME}

    # Results

    def agreed(self, found: list[dict[str, Any]]) -> None:
        self.result["agreement"] += found
        allowed = self.args.max_logprob_difference
        worst = max((row["largest_logprob_difference"] for row in found), default=0.0)
        if allowed is not None and worst > allowed:
            raise ValueError(
                f"the variants' log-probabilities differ by {worst:.3g}, more than --max-logprob-difference {allowed:g}"
            )

    def add_point(self, concurrency: int, rows: list[dict[str, dict[str, float]]]) -> None:
        if not rows:
            return
        self.result["points"].append(
            ab_report.summarise_point(concurrency, rows, self.args.confidence, self.args.min_effect)
        )
        if self.args.output_dir:
            write_json(Path(self.args.output_dir) / "ab.json", self.result)

    def add_roofline(self, configs: dict[str, Any]) -> None:
        from vllm.benchmarks.roofline import reached, step_bytes

        rows = []
        for point in self.result["points"]:
            for label, values in point["variants"].items():
                context = self.work.input_len + self.work.output_len / 2
                moved = step_bytes(configs[label], point["concurrency"], context)
                found = reached(moved, values["step_ms"]["median"], self.bandwidth)
                rows.append({"concurrency": point["concurrency"], "variant": label, **found})
        self.result["roofline"] = {"read_bytes_s": self.bandwidth, "rows": rows}

    def add_profiles(self, shared: Any, learnt: list[Any]) -> None:
        from vllm.benchmarks.step_profile import learnt_from, profile_steps, summarise

        self.result["profile"] = []
        for i, variant in enumerate(self.variants):
            table = learnt_from(learnt[i]) if learnt else None
            for concurrency in self.profiled():
                self.say(f"profiling {variant.name} at concurrency {concurrency}")
                shared.switch(variant)
                kernels, steps = profile_steps(shared.engine, concurrency, self.work.input_len)
                found = summarise(kernels, steps, table)
                self.result["profile"].append({"variant": variant.label, "concurrency": concurrency, **found})

    def write(self) -> None:
        files = write_report(self.args, self.result, ab_report.sections(self.result))
        if files:
            self.say("written: " + ", ".join(map(str, files)))


def uses_graphs(engine_args: dict[str, Any]) -> bool:
    """Whether decode steps of such an engine are CUDA graphs."""
    config = EngineArgs(**engine_args).create_engine_config()
    compilation = getattr(config, "compilation_config", None)
    return config.parallel_config.device == "cuda" and compilation is not None and compilation.decode_graphs
