"""Small vocabularies, and random texts under a constraint without a model."""

from __future__ import annotations

import random

import numpy as np

from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.structured_output.manager import GrammarCache
from vllm.v1.structured_output.masks import num_words, unpack_tokens
from vllm.v1.structured_output.spec import Vocabulary

PIECES = [
    '":',
    '{"',
    '", "',
    '"}',
    '": "',
    ": ",
    "12",
    "[1",
    'a"',
    "true",
    "null",
    "false",
    "<tool_call>",
    "</tool_call>",
]
PIECES += [
    "</parameter>",
    "<parameter=",
    "</function>",
    "<function=",
    "</",
    "\n\n",
    ">\n",
    "\n<",
    "  ",
    '"name"',
    "</think>",
    "é",
]
STOP = 256 + len(PIECES)
VOCABULARY = Vocabulary(
    [*(bytes([i]) for i in range(256)), *(piece.encode() for piece in PIECES), b"", b"", b""], [STOP]
)


def large_vocabulary(size: int) -> Vocabulary:
    """The same with words, up to `size` tokens: most of what a real vocabulary holds."""
    draw, letters = random.Random(0), "etaoinshrdlucmfwypvbgkqjxz"
    words: dict[str, None] = {}
    while len(words) < size - len(VOCABULARY):
        words[draw.choice(["", " "]) + "".join(draw.choices(letters, k=draw.randint(2, 9)))] = None
    return Vocabulary([*VOCABULARY.tokens, *(word.encode() for word in words)], [STOP])


def grammars() -> GrammarCache:
    return GrammarCache(lambda: VOCABULARY)


def random_text(
    grammars: GrammarCache, params: StructuredOutputsParams, draw: random.Random, longest: int = 400
) -> str | None:
    """A text of tokens drawn at random; towards its end those are preferred that close something. None if it does not end."""
    constraint = grammars.constraint(params)
    words, text = np.empty((1, num_words(len(VOCABULARY))), np.int32), b""
    for step in range(longest):
        constraint.fill(words, 0)
        allowed = unpack_tokens(words[0], len(VOCABULARY)).tolist()
        assert allowed
        solid = [t for t in allowed if t == STOP or (VOCABULARY.tokens[t].strip() and VOCABULARY.tokens[t].isascii())]
        closing = [t for t in solid if t == STOP or VOCABULARY.tokens[t][:1] in (b'"', b"}", b"]", b"\n", b"<", b"/")]
        if solid and draw.random() < 0.9:
            allowed = solid
        if closing and draw.random() < (0.2 if step < longest // 4 else 0.8):
            allowed = closing
        if STOP in allowed and draw.random() < 0.5:
            allowed = [STOP]
        token = draw.choice(allowed)
        assert constraint.accept(token)
        if constraint.is_done:
            return text.decode("utf-8", errors="replace")  # half of a surrogate pair is not excluded
        text += VOCABULARY.tokens[token]
    return None
