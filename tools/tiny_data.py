"""Training batches of the tiny checkpoint: tasks as chats and as bare text, tokenised ahead of time by worker processes.

One step sees two blocks, many short rows and some long ones (chats with tools), so that little of either is padding.
Batch i of a seed is the same on every machine, however many workers prepare it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import random
from collections.abc import Iterator
from dataclasses import dataclass

import jinja2
import jinja2.ext
import numpy as np
import tiny_loose
from tiny_template import CHAT_TEMPLATE
from tiny_tokenizer import build_tokenizer

from vllm.benchmarks import tiny_tasks
from vllm.benchmarks.tiny_tasks import Item

# What predicting a token counts: codes of the second array of a block.
PAD, CONTEXT, ANSWER = 0, 1, 2

SHORT_LENGTH, LONG_LENGTH = 64, 448
THINKING_SHARE = 0.2
LOOSE_SHARE = 0.4
SYSTEM_SHARE = 0.12

SHORT_MIX = {"completion": 0.18, "add3": 0.22, "add2": 0.1, "copy": 0.11, "reverse": 0.15, "count": 0.1, "other": 0.1}
LONG_MIX = {"tool": 0.42, "parallel": 0.2, "tool_loop": 0.2, "two_turns": 0.12, "other": 0.06}
TURN_KINDS = ("add2", "add3", "copy", "reverse", "count", "other")


@dataclass(frozen=True)
class Shape:
    """Rows of one step: `short` of SHORT_LENGTH tokens and `long` of LONG_LENGTH."""

    short: int = 768
    long: int = 128


def refuse(message: str) -> None:
    """What the chat template's raise_exception does."""
    raise jinja2.exceptions.TemplateError(message)


def compile_template() -> jinja2.Template:
    """The chat template with the same settings as transformers, without its per-call overhead."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    environment.globals["raise_exception"] = refuse
    return environment.from_string(CHAT_TEMPLATE)


class Encoder:
    """Turns items into token ids. The chat template runs for anything but a plain single question."""

    def __init__(self):
        self.tokenizer = build_tokenizer()
        self.encode_text = self.tokenizer._tokenizer.encode
        self.template = compile_template()
        self.head = self.encode("<|im_start|>user\n")
        self.closed = self.encode("<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
        self.open = self.encode("<|im_end|>\n<|im_start|>assistant\n<think>\n")
        self.end = self.encode("<|im_end|>")
        (self.pad,) = self.encode("<|endoftext|>")

    def encode(self, text: str) -> list[int]:
        return self.encode_text(text, add_special_tokens=False).ids

    def prompt(self, messages: list[dict], tools: list[dict] | None, thinking: bool) -> list[int]:
        """Token ids of the chat up to and including the generation prompt."""
        question = messages[0]["content"]
        if len(messages) == 1 and not tools and question == question.strip():
            return self.head + self.encode(question) + (self.open if thinking else self.closed)
        text = self.template.render(
            messages=messages, tools=tools, add_generation_prompt=True, enable_thinking=thinking
        )
        return self.encode(text)

    def item_prompt(self, item: Item, thinking: bool = False) -> list[int]:
        """Token ids that stand before the answer of an item."""
        if item.prompt is not None:
            return self.encode(item.prompt)
        return self.prompt(item.messages, item.tools, thinking)

    def answer(self, item: Item, thinking: bool) -> list[int]:
        """Token ids that the model is to write, the end-of-turn token included."""
        if item.prompt is not None:
            return self.encode(item.expected)
        thought = f"{item.thought}\n</think>\n\n" if thinking else ""
        return self.encode(thought + item.expected) + self.end


class BatchMaker:
    """Draws the rows of one batch."""

    def __init__(self, seed: int, shape: Shape):
        self.seed, self.shape = seed, shape
        self.encoder = Encoder()

    def batch(self, index: int) -> tuple[np.ndarray, ...]:
        """Batch `index`: ids uint16 and codes uint8, [short, SHORT_LENGTH] and [long, LONG_LENGTH] each."""
        rng = random.Random(f"tiny/{self.seed}/{index}")
        return (
            *self._block(rng, SHORT_MIX, self.shape.short, SHORT_LENGTH),
            *self._block(rng, LONG_MIX, self.shape.long, LONG_LENGTH),
        )

    def _block(
        self, rng: random.Random, mix: dict[str, float], rows: int, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        ids = np.full((rows, length), self.encoder.pad, np.uint16)
        codes = np.zeros((rows, length), np.uint8)
        for row, kind in enumerate(rng.choices(list(mix), list(mix.values()), k=rows)):
            context, answer = (), ()
            while not answer:
                if kind == "completion":
                    break
                context, answer = self._chat(rng, kind)
                if len(context) + len(answer) > length:
                    answer = ()  # draw again: a cut answer would teach the wrong end
            if kind == "completion":
                row_ids, row_codes = self._sums(rng, length)
            else:
                row_ids = context + answer
                row_codes = [CONTEXT] * len(context) + [ANSWER] * len(answer)
            ids[row, : len(row_ids)] = row_ids
            codes[row, : len(row_ids)] = row_codes
        return ids, codes

    def _sums(self, rng: random.Random, length: int) -> tuple[list[int], list[int]]:
        """Lines `12+34=46`, sometimes with spaces, without a template, as many as fit."""
        ids: list[int] = []
        codes: list[int] = []
        spaced = rng.random() < 0.1
        while True:
            style = rng.random()
            low, high = (10, 99) if style < 0.25 else (100, 999) if style < 0.9 else (0, 999)
            a, b = rng.randint(low, high), rng.randint(low, high)
            if tiny_tasks.is_held_out(f"{min(a, b)}+{max(a, b)}"):
                continue
            question, answer = f"{a}+{b}=", f"{a + b}\n"
            if spaced:
                question, answer = f"{a} + {b} =", f" {answer}"
            context, target = self.encoder.encode(question), self.encoder.encode(answer)
            if len(ids) + len(context) + len(target) > length:
                return ids, codes
            ids += context + target
            codes += [CONTEXT] * len(context) + [ANSWER] * len(target)

    def _item(self, rng: random.Random, kind: str) -> Item:
        if rng.random() >= LOOSE_SHARE:
            return tiny_tasks.draw(kind, rng)
        while True:
            item = tiny_loose.MAKERS[kind](rng)
            if not tiny_tasks.is_held_out(item.key):
                return item

    def _chat(self, rng: random.Random, kind: str) -> tuple[list[int], list[int]]:
        """Token ids of one chat: everything before the last answer, and that answer."""
        thinking = rng.random() < THINKING_SHARE
        earlier: list[dict] = []
        if kind == "two_turns":
            for _ in range(rng.randint(1, 3)):
                item = self._item(rng, TURN_KINDS[rng.randrange(len(TURN_KINDS))])
                earlier += [*item.messages, {"role": "assistant", "content": item.expected}]
            kind = TURN_KINDS[rng.randrange(len(TURN_KINDS))]
        item = self._item(rng, kind)
        if rng.random() < SYSTEM_SHARE:
            prompts = (*tiny_tasks.SYSTEM_PROMPTS, tiny_loose.loose_other(rng).messages[0]["content"])
            earlier.insert(0, {"role": "system", "content": prompts[rng.randrange(len(prompts))]})
        context = self.encoder.prompt(earlier + item.messages, item.tools, thinking)
        return context, self.encoder.answer(item, thinking)


def _work(seed: int, shape: Shape, first: int, stride: int, results) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    maker = BatchMaker(seed, shape)
    index = first
    while True:
        results.put(maker.batch(index))
        index += stride


def batches(seed: int, shape: Shape, workers: int) -> Iterator[tuple[np.ndarray, ...]]:
    """Batches 0, 1, 2, ... prepared ahead by `workers` processes (0: in this one)."""
    if workers == 0:
        maker, index = BatchMaker(seed, shape), 0
        while True:
            yield maker.batch(index)
            index += 1
    context = multiprocessing.get_context("spawn")
    results = [context.Queue(maxsize=8) for _ in range(workers)]
    processes = [
        context.Process(target=_work, args=(seed, shape, i, workers, results[i]), daemon=True) for i in range(workers)
    ]
    for process in processes:
        process.start()
    index = 0
    try:
        while True:
            worker = index % workers
            try:
                yield results[worker].get(timeout=60)
            except queue.Empty:
                raise RuntimeError(f"data worker {worker} exit code {processes[worker].exitcode}") from None
            index += 1
    finally:
        for process in processes:
            process.terminate()
