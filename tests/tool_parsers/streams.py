"""Cuts of texts, hostile pieces of text, and the bundled checkpoint's chat template as an oracle."""

import itertools
import json
from functools import cache
from pathlib import Path

from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

import vllm
from vllm.tool_parsers.calls import DeltaToolCall

TEMPLATE = Path(vllm.__file__).parent / "assets/tiny-qwen3_5-moe/chat_template.jinja"

TAGS = [
    "<tool_call>", "</tool_call>", "<function=f>", "<function=", "</function>", "<parameter=a>", "<parameter=n>", "<parameter=",
    "</parameter>", "</param", "<think>", "</think>", "<|im_end|>",
]  # fmt: skip
SCRAPS = [
    "\n",
    "\n\n",
    " ",
    "<",
    ">",
    "</",
    '"',
    "\\",
    "'",
    "5",
    "true",
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    "é",
    "日本",
    "🎉",
    "\u2028",
    "word",
]
JSON_SCRAPS = [
    '{"name": "f", "arguments": {',
    '"name": "g"',
    '"arguments": {}',
    '{"a": 1}',
    '{"name": "f", "arguments": {"a": "</tool_call>"}}',
]
CALL = "<tool_call>\n<function=f>\n<parameter=a>\nx\n</parameter>\n<parameter=n>\n5\n</parameter>\n</function>\n</tool_call>"
JSON_CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "x", "n": 5}}\n</tool_call>'

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "string"}, "n": {"type": "integer"}, "o": {"type": ["object", "null"]}},
            },
        },
    }
]


def hostile_texts(max_size: int = 24) -> st.SearchStrategy[str]:
    """Texts of tags, halves of tags, whole calls and ordinary characters in any order."""
    parts = [
        *TAGS,
        *TAGS,
        *SCRAPS,
        *JSON_SCRAPS,
        CALL,
        JSON_CALL,
        "<function=f>\n<parameter=a>\n",
        "\n</parameter>\n</function>",
    ]
    cut_off = st.sampled_from(parts).flatmap(lambda part: st.integers(0, len(part)).map(lambda end: part[:end]))
    piece = st.one_of(st.sampled_from(parts), st.sampled_from(parts), cut_off, st.text(max_size=4))
    return st.lists(piece, max_size=max_size).map("".join)


@st.composite
def cuts(draw, text: str) -> list[str]:
    """The text in deltas: single characters, or cut at some places; empty deltas too."""
    if draw(st.booleans()):
        return list(text)
    places = sorted(draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return [text[start:end] for start, end in itertools.pairwise([0, *places, len(text)])]


def ids():
    """A fresh source of predictable ids."""
    counter = itertools.count()
    return lambda: f"id{next(counter)}"


def check_pieces(pieces: list[DeltaToolCall]) -> None:
    """What an OpenAI client relies on: calls one after the other, id and name with the first piece and only there."""
    latest = -1
    for piece in pieces:
        if piece.index == latest:
            assert piece.id is None and piece.name is None
        else:
            latest += 1
            assert piece.index == latest and piece.id and piece.name


def feed_all(parser, deltas: list[str]) -> list:
    """What each delta and the end give."""
    return [*(parser.feed(delta) for delta in deltas), parser.finish()]


@cache
def _template():
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    environment.globals["raise_exception"] = _raise
    return environment.from_string(TEMPLATE.read_text())


def _raise(message):
    raise ValueError(message)


def render_turn(content: str, calls: list[tuple[str, dict]], reasoning: str = "") -> str:
    """An assistant turn as the chat template writes it, from where the model takes over in thinking mode."""
    turn = {
        "role": "assistant",
        "content": content,
        "reasoning_content": reasoning,
        "tool_calls": [{"function": {"name": name, "arguments": arguments}} for name, arguments in calls],
    }
    text = _template().render(messages=[{"role": "user", "content": "?"}, turn])
    start = "<|im_start|>assistant\n<think>\n"
    end = "<|im_end|>\n"
    assert text.endswith(end)
    return text[text.index(start) + len(start) : -len(end)]
