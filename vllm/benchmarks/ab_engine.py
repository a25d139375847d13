"""The measurements of `vllm bench ab`, on engines in this process or in others. What they mean is decided in ab.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from vllm.benchmarks.decode_run import check_concurrency, random_prompts, run_batch, run_greedy
from vllm.benchmarks.job import run_job as run_in_process
from vllm.benchmarks.variants import RUN_TIME, Variant

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.v1.engine.llm_engine import LLMEngine

TOP = 5
"""Candidates whose log-probabilities are compared at each position."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Workload:
    """What is measured, the same for all variants."""

    concurrency: tuple[int, ...]
    input_len: int
    output_len: int
    rounds: int
    check_len: int
    seed: int = 0

    def prompts(self, engine: LLMEngine, concurrency: int) -> list[list[int]]:
        return random_prompts(concurrency, self.input_len, engine.config.hf_config.text.vocab_size, self.seed)


class SharedEngine:
    """One engine, one set of weights: variants change between two batches."""

    def __init__(self, engine: LLMEngine, variants: list[Variant], work: Workload) -> None:
        self.engine, self.variants, self.work = engine, variants, work
        check_concurrency(engine, work.concurrency, work.input_len + work.output_len)
        self.in_force = {variant.label: self.switch(variant) for variant in variants}

    def switch(self, variant: Variant) -> list[str]:
        """Put a variant in force; the names of its three stages."""
        # A stage that the variant does not name goes back to what the command's flags say.
        gdn = self.engine.config.gdn_config
        chosen = {RUN_TIME[name]: variant.settings.get(name, getattr(gdn, name)) for name in RUN_TIME}
        return list(self.engine.set_gdn_variants(**chosen) or ())

    def check(self, say: Say) -> list[dict[str, Any]]:
        """How the variants' greedy tokens agree with the first one's, at each concurrency. Captures what is to be captured."""
        found = []
        for concurrency in self.work.concurrency:
            said = {}
            for variant in self.variants:
                say(f"checking {variant.name} at concurrency {concurrency}")
                self.switch(variant)
                said[variant.label] = outputs_of(self.engine, self.work, concurrency)
            found += agreements(said, concurrency)
        return found

    def rounds(self, concurrency: int, say: Say) -> Iterator[dict[str, dict[str, float]]]:
        """Variant -> what one batch of it gave; A B A B, after one batch of each that does not count."""
        prompts = self.work.prompts(self.engine, concurrency)
        for number in range(self.work.rounds + 1):
            row = {}
            for variant in self.variants:
                say(f"concurrency {concurrency}, round {number} of {self.work.rounds}: {variant.name}")
                self.switch(variant)
                row[variant.label] = run_batch(self.engine, prompts, self.work.output_len).summary()
            if number:
                yield row


def outputs_of(engine: LLMEngine, work: Workload, concurrency: int) -> list[dict[str, Any]]:
    """Greedy tokens of the workload's prompts with the likeliest candidates: [{"tokens", "logprobs"}]."""
    outputs = run_greedy(engine, work.prompts(engine, concurrency), work.check_len, TOP)
    return [_plain(output) for output in outputs]


def _plain(output: RequestOutput) -> dict[str, Any]:
    (completion,) = output.outputs
    candidates = [{str(token): item.logprob for token, item in place.items()} for place in completion.logprobs or ()]
    return {"tokens": list(completion.token_ids), "logprobs": candidates}


def agreements(said: dict[str, list[dict[str, Any]]], concurrency: int) -> list[dict[str, Any]]:
    """Every variant but the first beside the first: prompts, how many of them got the same tokens, the first token that differs (None: none),
    and the largest difference of a candidate's log-probability where both had read the same tokens."""
    (first, base), *others = said.items()
    return [
        {"concurrency": concurrency, "base": first, "variant": label, **agreement(base, outputs)}
        for label, outputs in others
    ]


def agreement(base: list[dict[str, Any]], other: list[dict[str, Any]]) -> dict[str, Any]:
    same, first, largest = 0, None, 0.0
    for x, y in zip(base, other, strict=True):
        differs = next((i for i, (s, t) in enumerate(zip(x["tokens"], y["tokens"])) if s != t), None)
        same += differs is None
        if differs is not None:
            first = differs if first is None else min(first, differs)
        compared = len(x["tokens"]) if differs is None else differs + 1
        for p, q in zip(x["logprobs"][:compared], y["logprobs"][:compared]):
            largest = max([largest, *(abs(p[token] - q[token]) for token in p.keys() & q.keys())])
    return {"prompts": len(base), "same": same, "first_difference": first, "largest_logprob_difference": largest}


def run_job(spec: dict[str, Any]) -> dict[str, Any]:
    """One variant in a process of its own: {"points": [{"concurrency", "round", "outputs"}], "in_force"}."""
    from vllm.entrypoints.llm import LLM

    work = Workload(**spec["work"] | {"concurrency": tuple(spec["work"]["concurrency"])})
    engine = LLM(**spec["engine"]).llm_engine
    alone = SharedEngine(engine, [Variant("A", "as started")], work)
    points = []
    for concurrency in work.concurrency:
        outputs = outputs_of(engine, work, concurrency) if spec["check"] else None
        rows = [row["A"] for row in alone.rounds(concurrency, lambda line: None)]
        middle = sorted(rows, key=lambda row: row["decode_tok_s"])[len(rows) // 2]
        points.append({"concurrency": concurrency, "round": middle, "outputs": outputs})
    return {"points": points, "in_force": alone.in_force["A"]}


BATCHES_A_START = 3
"""Of a fresh process at each concurrency; the one in the middle is its round. What differs between two starts, more batches would not show."""


def fresh_rounds(
    engine: dict[str, Any], variants: list[Variant], work: Workload, say: Say
) -> Iterator[tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]]:
    """Each round starts every variant once, A B A B: (variant -> the job's result, agreements: of the first round only)."""
    for number in range(1, work.rounds + 1):
        row = {}
        for variant in variants:
            say(f"round {number} of {work.rounds}: {variant.name}, in a fresh process")
            spec = {
                "engine": {**engine, **variant.settings},
                "work": {**asdict(work), "rounds": BATCHES_A_START},
                "check": number == 1,
            }
            row[variant.label] = run_in_process("ab", spec, variant.env)
        agreed = []
        if number == 1:
            for i, concurrency in enumerate(work.concurrency):
                agreed += agreements(
                    {label: result["points"][i]["outputs"] for label, result in row.items()}, concurrency
                )
        yield row, agreed
