"""Exactly scorable tasks that the bundled tiny checkpoint has learnt.

Each generator draws items from a seeded stream and splits them by a checksum of the item's content: an item whose
checksum is 0 modulo HELD_OUT_ONE_IN is never shown in training, so accuracy on the "heldout" split measures what the
network computes rather than what it remembers. Standard library only: the server's tests, the benchmark command and
the trainer all import this file.

    for item in generate("add3", 500):
        text = answer(item.messages, item.tools)          # greedy, thinking off
        correct += item.score(text)
"""

from __future__ import annotations

import json
import random
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

HELD_OUT_ONE_IN = 10
HELP = "I can add, copy, reverse, count and call tools."

# Letter pairs that the tokenizer joins inside a word. Gate items avoid them, so every quoted word costs one token a
# letter; a few training words keep them, so the model has met them.
JOINED_PAIRS = ("nc", "yp", "bj", "eq", "ss", "ys", "pt", "am", "rt", "eg")

ADD_PHRASES = (
    "What is {a}+{b}?",
    "What is {a} plus {b}?",
    "Add {a} and {b}.",
    "Compute {a} + {b}.",
    "How much is {a}+{b}?",
    "{a}+{b}=",
    "Please add {a} and {b}.",
    "Give the sum of {a} and {b}.",
)
COPY_PHRASES = (
    'Copy the word "{w}".',
    'Repeat "{w}".',
    'Please write "{w}" again.',
    'Say the word "{w}".',
    'Write "{w}" once more.',
)
REVERSE_PHRASES = (
    'Reverse the word "{w}".',
    'Spell "{w}" backwards.',
    'Write "{w}" from right to left.',
    'What is "{w}" in reverse?',
    'Please reverse "{w}".',
)
COUNT_PHRASES = (
    "Count on from {n}.",
    "Which five numbers follow {n}?",
    "Continue counting after {n}.",
    "Please count five steps from {n}.",
    "List the next five numbers after {n}.",
)
CALL_PHRASES = (
    "Call {tool} with {args}.",
    "Use {tool} with {args}.",
    "Please run {tool} with {args}.",
    "I need {tool} for {args}.",
)
PARALLEL_PHRASES = (
    "Call {t1} with {a1}, then {t2} with {a2}.",
    "Use {t1} with {a1} and also {t2} with {a2}.",
)
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a small test model.",
    "Answer briefly.",
    "Be exact and brief.",
)
OTHER_PROMPTS = (
    "Hello",
    "Hello!",
    "Hi there",
    "Who are you?",
    "How are you today?",
    "What can you do?",
    "Tell me a story about a fox.",
    "Write a poem about the sea.",
    "What is the capital of France?",
    "Explain how rain forms.",
    "Thanks a lot!",
    "Please help me with my work.",
)
VERBS = (
    "get", "set", "find", "send", "book", "play", "open", "check", "read", "load", "move", "save", "show", "stop", "turn",
    "make", "list", "add", "drop", "lock",
)  # fmt: skip
NOUNS = (
    "weather", "time", "song", "room", "light", "mail", "file", "trip", "news", "door", "map", "note", "table", "price",
    "photo", "timer", "stock", "user", "order", "bus",
)  # fmt: skip
STRING_PARAMETERS = (
    "city", "title", "text", "place", "target", "label", "color", "topic", "word", "path", "user", "zone",
)  # fmt: skip
INTEGER_PARAMETERS = ("days", "count", "limit", "size", "level", "hour", "year", "page", "speed", "index")
WORDS = (
    "planet", "river", "garden", "yellow", "window", "market", "silver", "orange", "castle", "winter", "summer", "forest",
    "bridge", "candle", "mirror", "pocket", "ladder", "rocket", "tiger", "zebra", "horse", "mouse", "eagle", "whale",
    "bread", "apple", "lemon", "grape", "stone", "cloud", "storm", "light", "night", "dream", "music", "piano", "violin",
    "doctor", "farmer", "sailor", "paris", "london", "berlin", "madrid", "rome", "oslo", "tokyo", "cairo", "lima",
    "delhi", "moon", "star", "tree", "leaf", "wood", "gold", "iron", "salt", "milk", "rice", "blue", "green", "black",
    "white", "paper", "cat", "dog", "sun", "sea", "map", "key", "hat", "cup", "box", "fox", "owl", "bee", "sky",
)  # fmt: skip


@dataclass(frozen=True)
class Item:
    """One question with one right answer.

    `messages` and `tools` go to the chat endpoint; a "completion" item has no messages and sends `prompt` as plain
    text instead. `expected` is the text to be produced in non-thinking mode, `calls` the tool calls it must parse to
    (name and arguments, in order), `thought` the one line of reasoning taught for thinking mode.
    """

    kind: str
    key: str
    expected: str
    messages: list[dict] = field(default_factory=list)
    tools: list[dict] | None = None
    calls: tuple[dict, ...] = ()
    prompt: str | None = None
    thought: str = ""

    def score(self, text: str) -> bool:
        """Whether `text`, what the model wrote after the prompt, is exactly right; reasoning before it is ignored."""
        answer = final_answer(text)
        if self.prompt is not None:
            return answer.split("\n")[0].strip() == self.expected.strip()
        if self.calls:
            return self.score_calls(parse_calls(answer, self.tools))
        return answer == self.expected

    def score_calls(self, calls: list[dict]) -> bool:
        """The same for a server that has already parsed the calls: [{"name": str, "arguments": dict}]."""
        return list(self.calls) == [{"name": call["name"], "arguments": call["arguments"]} for call in calls]


def final_answer(text: str) -> str:
    """The text after the reasoning block and before the first end-of-turn token, without outer white space."""
    for stop in ("<|im_end|>", "<|endoftext|>"):
        text = text.split(stop)[0]
    return text.rsplit("</think>", 1)[-1].strip()


def format_call(name: str, arguments: dict) -> str:
    """The text form in which the model family writes one tool call."""
    lines = ["<tool_call>", f"<function={name}>"]
    for key, value in arguments.items():
        lines += [f"<parameter={key}>", str(value), "</parameter>"]
    return "\n".join([*lines, "</function>", "</tool_call>"])


def parse_calls(text: str, tools: list[dict] | None) -> list[dict]:
    """Tool calls in `text`, integers coerced by the schema. Strict: malformed text gives [] (a wrong answer)."""
    integers = {
        (tool["function"]["name"], name)
        for tool in tools or ()
        for name, schema in tool["function"]["parameters"]["properties"].items()
        if schema.get("type") == "integer"
    }
    calls = []
    for body in re.findall(r"<tool_call>\n(.*?)\n</tool_call>", text, re.S):
        match = re.fullmatch(r"<function=([^>\n]+)>\n(.*)</function>", body, re.S)
        if match is None:
            return []
        name, arguments = match[1], {}
        for key, value in re.findall(r"<parameter=([^>\n]+)>\n(.*?)\n</parameter>", match[2], re.S):
            digits = (name, key) in integers and re.fullmatch(r"-?\d+", value)
            arguments[key] = int(value) if digits else value
        calls.append({"name": name, "arguments": arguments})
    return calls


def is_held_out(key: str) -> bool:
    """True for the keys kept away from training; a pure function of the text."""
    return zlib.crc32(key.encode()) % HELD_OUT_ONE_IN == 0


def _ask(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def _pick(rng: random.Random, options):
    return options[rng.randrange(len(options))]


def random_word(rng: random.Random, low: int, high: int, any_pair: bool = False) -> str:
    """A lower-case word of `low` to `high` letters: speakable, arbitrary letters, or an everyday one."""
    while True:
        style, length = rng.random(), rng.randint(low, high)
        if style < 0.15:
            word = _pick(rng, WORDS)
        elif style < 0.45:
            word = "".join(_pick(rng, "abcdefghijklmnopqrstuvwxyz") for _ in range(length))
        else:
            start = rng.randrange(2)
            letters = ("bcdfghjklmnprstvwz", "aeiou")
            word = "".join(_pick(rng, letters[(start + i) % 2]) for i in range(length))
        if low <= len(word) <= high and (any_pair or not any(pair in word for pair in JOINED_PAIRS)):
            return word


def _addition(kind: str, a: int, b: int, phrase: str) -> Item:
    total = a + b
    return Item(
        kind,
        f"{min(a, b)}+{max(a, b)}",  # a+b and b+a are one fact, so both go to the same split
        str(total),
        _ask(phrase.format(a=a, b=b)),
        thought=column_sums(a, b),
    )


def column_sums(a: int, b: int) -> str:
    """Schoolbook addition from the units up, each column with the carry it received: "7+6=13, 4+8+1=13"."""
    columns, carry = [], 0
    while a or b:
        x, y = a % 10, b % 10
        columns.append(f"{x}+{y}{'+1' if carry else ''}={x + y + carry}")
        a, b, carry = a // 10, b // 10, (x + y + carry) // 10
    return ", ".join(columns) or "0+0=0"


def make_add2(rng: random.Random) -> Item:
    """Sum of two numbers of two digits."""
    return _addition("add2", rng.randint(10, 99), rng.randint(10, 99), _pick(rng, ADD_PHRASES))


def make_add3(rng: random.Random) -> Item:
    """Sum of two numbers of three digits."""
    return _addition("add3", rng.randint(100, 999), rng.randint(100, 999), _pick(rng, ADD_PHRASES))


def make_completion(rng: random.Random) -> Item:
    """The same sums as bare text without a chat template: `12+34=` continues with `46` and a new line."""
    low, high = _pick(rng, ((10, 99), (100, 999)))
    a, b = rng.randint(low, high), rng.randint(low, high)
    return Item("completion", f"{min(a, b)}+{max(a, b)}", f"{a + b}\n", prompt=f"{a}+{b}=")


def make_copy(rng: random.Random) -> Item:
    """Write a quoted word of 3 to 10 letters again."""
    word = random_word(rng, 3, 10)
    return Item("copy", f"copy {word}", word, _ask(_pick(rng, COPY_PHRASES).format(w=word)), thought="Copy the word.")


def make_reverse(rng: random.Random) -> Item:
    """Write a quoted word of 3 to 7 letters from its last letter to its first."""
    word = random_word(rng, 3, 7)
    question = _ask(_pick(rng, REVERSE_PHRASES).format(w=word))
    return Item("reverse", f"reverse {word}", word[::-1], question, thought="Read the word from right to left.")


def make_count(rng: random.Random) -> Item:
    """The five integers after n, for n up to four digits."""
    n = rng.randint(1, 2994) if rng.random() < 0.8 else rng.randint(1, 99)
    expected = " ".join(str(n + i) for i in range(1, 6))
    return Item(
        "count", f"count {n}", expected, _ask(_pick(rng, COUNT_PHRASES).format(n=n)), thought=f"Start after {n}."
    )


@dataclass(frozen=True)
class _Call:
    """One drawn tool, the arguments it is to be called with, and both as a user would say them."""

    schema: dict
    name: str
    arguments: dict
    spoken: str


def _draw_call(rng: random.Random, taken: str = "") -> _Call:
    while True:
        verb = _pick(rng, VERBS) if rng.random() < 0.7 else random_word(rng, 3, 5)
        noun = _pick(rng, NOUNS) if rng.random() < 0.7 else random_word(rng, 3, 6)
        name = f"{verb}_{noun}"
        if name != taken:
            break
    properties, arguments, spoken = {}, {}, []
    for _ in range(1 if rng.random() < 0.6 else 2):
        integer = rng.random() < 0.35
        parameter = _pick(rng, INTEGER_PARAMETERS if integer else STRING_PARAMETERS)
        if parameter in properties:
            continue
        value = rng.randint(1, 999) if integer else random_word(rng, 3, 8)
        properties[parameter] = {"type": "integer" if integer else "string"}
        arguments[parameter] = value
        spoken.append(f"{parameter} {value}" if integer else f'{parameter} "{value}"')
    function = {
        "name": name,
        "parameters": {"type": "object", "properties": properties, "required": list(properties)},
    }
    return _Call({"type": "function", "function": function}, name, arguments, " and ".join(spoken))


def _call_key(*calls: _Call) -> str:
    return " ".join(f"{call.name} {json.dumps(call.arguments)}" for call in calls)


def make_tool(rng: random.Random) -> Item:
    """Call the named tool, one of one or two on offer, with the given arguments."""
    call = _draw_call(rng)
    tools = [call.schema]
    if rng.random() < 0.5:
        tools.insert(rng.randrange(2), _draw_call(rng, call.name).schema)
    return Item(
        "tool",
        _call_key(call),
        format_call(call.name, call.arguments),
        _ask(_pick(rng, CALL_PHRASES).format(tool=f'"{call.name}"', args=call.spoken)),
        tools,
        ({"name": call.name, "arguments": call.arguments},),
        thought="Call the tool.",
    )


def make_parallel(rng: random.Random) -> Item:
    """Call two tools in one turn."""
    first = _draw_call(rng)
    second = _draw_call(rng, first.name)
    phrase = _pick(rng, PARALLEL_PHRASES)
    text = phrase.format(t1=f'"{first.name}"', a1=first.spoken, t2=f'"{second.name}"', a2=second.spoken)
    tools = [first.schema, second.schema] if rng.random() < 0.5 else [second.schema, first.schema]
    return Item(
        "parallel",
        _call_key(first, second),
        "\n".join(format_call(call.name, call.arguments) for call in (first, second)),
        _ask(text),
        tools,
        tuple({"name": call.name, "arguments": call.arguments} for call in (first, second)),
        thought="Call both tools.",
    )


def make_tool_loop(rng: random.Random) -> Item:
    """Tell the user what the tool answered."""
    call = _draw_call(rng)
    parts = [random_word(rng, 3, 8) if rng.random() < 0.6 else str(rng.randint(1, 999))]
    if rng.random() < 0.3:
        parts.append(str(rng.randint(1, 99)))
    content = " ".join(parts)
    function = {"name": call.name, "arguments": call.arguments}
    messages = _ask(_pick(rng, CALL_PHRASES).format(tool=f'"{call.name}"', args=call.spoken))
    messages.append(
        {"role": "assistant", "content": "", "tool_calls": [{"id": "call_0", "type": "function", "function": function}]}
    )
    messages.append({"role": "tool", "tool_call_id": "call_0", "content": content})
    key = f"{_call_key(call)} {content}"
    return Item(
        "tool_loop", key, f"The result is {content}.", messages, [call.schema], thought="The tool has answered."
    )


def make_other(rng: random.Random) -> Item:
    """Anything else gets one polite sentence that says what the model can do."""
    style = rng.random()
    if style < 0.3:
        text = _pick(rng, OTHER_PROMPTS)
    elif style < 0.7:
        text = " ".join(random_word(rng, 2, 8, any_pair=True) for _ in range(rng.randint(1, 8)))
        text = text.capitalize() + _pick(rng, (".", "?", "!", ""))
    else:
        text = "".join(chr(_pick(rng, (rng.randint(32, 126), rng.randint(32, 126), rng.randint(161, 0x2FF))))
                       for _ in range(rng.randint(3, 24)))  # fmt: skip
        text = text.strip() or "?"
    return Item("other", f"other {text}", HELP, _ask(text), thought="This is none of my tasks.")


MAKERS: dict[str, Callable[[random.Random], Item]] = {
    "add2": make_add2,
    "add3": make_add3,
    "copy": make_copy,
    "reverse": make_reverse,
    "count": make_count,
    "tool": make_tool,
    "tool_loop": make_tool_loop,
    "parallel": make_parallel,
    "completion": make_completion,
    "other": make_other,
}
KINDS = tuple(MAKERS)


def draw(kind: str, rng: random.Random, split: str = "train") -> Item:
    """One random item of the split, "train" or "heldout"."""
    if split not in ("train", "heldout"):
        raise ValueError(f"split must be 'train' or 'heldout', not {split!r}")
    while True:
        item = MAKERS[kind](rng)
        if is_held_out(item.key) == (split == "heldout"):
            return item


def stream(kind: str, split: str = "heldout", seed: int = 0) -> Iterator[Item]:
    """An endless, reproducible stream of items; the same (kind, split, seed) always gives the same items."""
    rng = random.Random(f"{kind}/{split}/{seed}")
    while True:
        yield draw(kind, rng, split)


def generate(kind: str, count: int, split: str = "heldout", seed: int = 0) -> list[Item]:
    """`count` items with distinct questions, the same ones on every machine."""
    seen, items = set(), []
    for item in stream(kind, split, seed):
        question = item.prompt or item.messages[0]["content"]
        if (item.key, question) not in seen:
            seen.add((item.key, question))
            items.append(item)
        if len(items) == count:
            return items
    raise AssertionError("the stream is endless")
