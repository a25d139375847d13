"""What benchmarks ask: prompts of known lengths, made up or from a file, the same ones for the same seed."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DATASETS = ("random", "sharegpt", "custom", "prefix_repetition")
_MOST_TRIES = 20


@dataclass(frozen=True)
class Sample:
    """One request: a text (or token ids, where there is no tokenizer), its tokens, and how many to generate."""

    prompt: str | list[int]
    prompt_len: int
    output_len: int


def add_dataset_args(parser: argparse.ArgumentParser, num_prompts: int = 1000) -> None:
    """The flags that say which requests."""
    group = parser.add_argument_group("requests")
    group.add_argument("--dataset-name", choices=DATASETS, default="random", help="what to ask [random]")
    group.add_argument(
        "--dataset-path",
        metavar="FILE",
        help="the file of sharegpt (JSON) or custom (one JSON object with a prompt a line)",
    )
    group.add_argument("--num-prompts", type=int, default=num_prompts, metavar="N", help=f"requests [{num_prompts}]")
    group.add_argument(
        "--no-oversample",
        action="store_true",
        help="fewer requests rather than the same ones again where a file has too few",
    )
    group.add_argument(
        "--random-input-len", type=int, default=1024, metavar="N", help="tokens of a random prompt [1024]"
    )
    group.add_argument("--random-output-len", type=int, default=128, metavar="N", help="tokens generated for it [128]")
    group.add_argument(
        "--random-range-ratio",
        type=float,
        default=0.0,
        metavar="X",
        help="both lengths vary by this share of themselves, at most [0]",
    )
    group.add_argument(
        "--random-prefix-len",
        type=int,
        default=0,
        metavar="N",
        help="tokens that all random prompts begin with, beside the others [0]",
    )
    group.add_argument(
        "--sharegpt-output-len",
        type=int,
        metavar="N",
        help="tokens to generate; default: as many as the answer in the file has",
    )
    group.add_argument(
        "--custom-output-len",
        type=int,
        default=256,
        metavar="N",
        help="tokens to generate where a line has no output_tokens [256]",
    )
    group.add_argument(
        "--prefix-repetition-prefix-len", type=int, default=256, metavar="N", help="tokens of a shared prefix [256]"
    )
    group.add_argument(
        "--prefix-repetition-suffix-len", type=int, default=256, metavar="N", help="tokens of each own suffix [256]"
    )
    group.add_argument(
        "--prefix-repetition-num-prefixes", type=int, default=10, metavar="N", help="different prefixes [10]"
    )
    group.add_argument(
        "--prefix-repetition-output-len", type=int, default=128, metavar="N", help="tokens to generate [128]"
    )


def check_dataset_args(args: argparse.Namespace) -> None:
    """Raise ValueError for what can be seen to be wrong without a tokenizer."""
    if args.num_prompts < 1:
        raise ValueError(f"--num-prompts must be at least 1; got {args.num_prompts}")
    if not 0 <= args.random_range_ratio < 1:
        raise ValueError(f"--random-range-ratio must lie in 0 to 1; got {args.random_range_ratio:g}")
    lengths = [
        name
        for name in vars(args)
        if name.startswith(("random_", "prefix_repetition_", "sharegpt_", "custom_")) and name != "random_range_ratio"
    ]
    for name in lengths:
        value, least = getattr(args, name), 0 if name == "random_prefix_len" else 1
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}; got {value}")
    if args.dataset_name in ("sharegpt", "custom"):
        if args.dataset_path is None:
            raise ValueError(f"--dataset-name {args.dataset_name} needs --dataset-path FILE")
        if not Path(args.dataset_path).expanduser().is_file():
            raise FileNotFoundError(f"--dataset-path {args.dataset_path}: no such file")


def make_samples(
    args: argparse.Namespace, tokenizer: Any | None, vocab_size: int | None = None, seed: int = 0
) -> list[Sample]:
    """The requests that the flags ask for.

    Args:
        tokenizer: of transformers; None gives token ids in the place of random texts.
        vocab_size: ids below it are used where there is no tokenizer.

    Raises:
        ValueError: the file is not what it should be, or holds nothing that can be asked.
    """
    draw = random.Random(seed)
    if args.dataset_name == "random":
        return _random(args, Words(tokenizer, vocab_size, draw), draw)
    if args.dataset_name == "prefix_repetition":
        return _prefix_repetition(args, Words(tokenizer, vocab_size, draw), draw)
    if tokenizer is None:
        raise ValueError(
            f"--dataset-name {args.dataset_name} needs a tokenizer, to know how long its texts are: give --tokenizer"
        )
    read = read_sharegpt if args.dataset_name == "sharegpt" else read_custom
    found = read(Path(args.dataset_path).expanduser(), tokenizer, args, draw)
    if not found:
        raise ValueError(f"--dataset-path {args.dataset_path}: nothing in it can be asked")
    if len(found) < args.num_prompts and not args.no_oversample:
        found += draw.choices(found, k=args.num_prompts - len(found))
    return found[: args.num_prompts]


class Words:
    """Random prompts of an exact number of tokens.

    Decoded and encoded again, random tokens become others, and more or fewer: neighbours join. So a text is cut or grown until its
    length is right; the few that never get there keep the nearest length, which is what `Sample.prompt_len` then says.
    """

    def __init__(self, tokenizer: Any | None, vocab_size: int | None, draw: random.Random) -> None:
        self._tokenizer, self._draw = tokenizer, draw
        if tokenizer is None and vocab_size is None:
            raise ValueError("random token ids need the size of the vocabulary")
        special = set() if tokenizer is None else set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        size = tokenizer.vocab_size if tokenizer is not None else vocab_size
        self._ids = [i for i in range(size) if i not in special]

    def ids(self, length: int) -> list[int]:
        return self._draw.choices(self._ids, k=length)

    def prompt(self, ids: Sequence[int]) -> tuple[str | list[int], int]:
        """Token ids -> a prompt of as many tokens, and how many it really has."""
        if self._tokenizer is None:
            return list(ids), len(ids)
        wanted, ids = len(ids), list(ids)
        best: tuple[str, int] = ("", 0)
        before: list[int] = []
        for _ in range(_MOST_TRIES):
            text = self._tokenizer.decode(ids)
            again = self._tokenizer.encode(text, add_special_tokens=False)
            if abs(len(again) - wanted) < abs(best[1] - wanted):
                best = (text, len(again))
            if len(again) == wanted:
                break
            ids = again[:wanted] if len(again) > wanted else again + self.ids(wanted - len(again))
            if (
                again[:wanted] == before
            ):  # a cut through a letter that will always be encoded otherwise: end with other tokens
                ids = ids[: wanted - 3] + self.ids(min(3, wanted))
            before = again[:wanted]
        return best


def _random(args: argparse.Namespace, words: Words, draw: random.Random) -> list[Sample]:
    prefix = words.ids(args.random_prefix_len)
    spread = args.random_range_ratio
    length = lambda n: n if not spread else max(draw.randint(round(n * (1 - spread)), round(n * (1 + spread))), 1)
    samples = []
    for _ in range(args.num_prompts):
        prompt, count = words.prompt(prefix + words.ids(length(args.random_input_len)))
        samples.append(Sample(prompt, count, length(args.random_output_len)))
    return samples


def _prefix_repetition(args: argparse.Namespace, words: Words, draw: random.Random) -> list[Sample]:
    prefixes = [words.ids(args.prefix_repetition_prefix_len) for _ in range(args.prefix_repetition_num_prefixes)]
    samples = []
    for i in range(args.num_prompts):
        ids = prefixes[i % len(prefixes)] + words.ids(args.prefix_repetition_suffix_len)
        prompt, count = words.prompt(ids)
        samples.append(Sample(prompt, count, args.prefix_repetition_output_len))
    draw.shuffle(samples)
    return samples


def read_sharegpt(path: Path, tokenizer: Any, args: argparse.Namespace, draw: random.Random) -> list[Sample]:
    """First question and answer of each conversation, shuffled; very short and very long ones are left out, as is usual with this file."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--dataset-path {path}: not JSON: {error}") from None
    if not isinstance(entries, list):
        raise ValueError(f"--dataset-path {path}: expected a list of conversations")
    turns = [
        entry.get("conversations") or entry.get("conversation") or [] for entry in entries if isinstance(entry, dict)
    ]
    pairs = [
        (t[0].get("value"), t[1].get("value"))
        for t in turns
        if isinstance(t, list) and len(t) >= 2 and all(isinstance(x, dict) for x in t[:2])
    ]
    draw.shuffle(pairs)
    samples: list[Sample] = []
    for question, answer in pairs:
        if len(samples) == args.num_prompts:
            break
        if not isinstance(question, str) or not isinstance(answer, str):
            continue
        asked = len(tokenizer.encode(question))
        told = args.sharegpt_output_len or len(tokenizer.encode(answer))
        if asked >= 4 and (args.sharegpt_output_len or told >= 4) and asked <= 1024 and asked + told <= 2048:
            samples.append(Sample(question, asked, told))
    return samples


def read_custom(path: Path, tokenizer: Any, args: argparse.Namespace, draw: random.Random) -> list[Sample]:
    """One JSON object a line: `prompt`, and `output_tokens` where a line knows better than the flag. In the file's order."""
    samples = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"--dataset-path {path}: not text: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip() or len(samples) == args.num_prompts:
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"--dataset-path {path}, line {number}: not JSON: {error}") from None
        prompt = entry.get("prompt") if isinstance(entry, dict) else None
        output = entry.get("output_tokens", args.custom_output_len) if isinstance(entry, dict) else None
        if not isinstance(prompt, str) or not prompt or not isinstance(output, int) or output < 1:
            raise ValueError(
                f'--dataset-path {path}, line {number}: expected {{"prompt": "...", "output_tokens": N}}, the latter optional'
            )
        samples.append(Sample(prompt, len(tokenizer.encode(prompt)), output))
    return samples
