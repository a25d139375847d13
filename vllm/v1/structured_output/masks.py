"""Which tokens may come next, for the rows of a step that are constrained. Plain data: it may cross a process boundary."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(slots=True)
class TokenMasks:
    """One bit a token, 1 where it may come: bit t % 32 of word t // 32."""

    request_ids: list[str]  # [C]
    words: np.ndarray  # [C, ceil(vocabulary / 32)] int32


def num_words(vocab_size: int) -> int:
    """Words of a row."""
    return -(-vocab_size // 32)


def pack_tokens(token_ids: list[int], vocab_size: int, *, allowed: bool) -> np.ndarray:
    """A row in which these tokens, or with allowed=False all others, may come."""
    bits = np.full(num_words(vocab_size) * 32, not allowed)
    bits[token_ids] = allowed
    bits[vocab_size:] = False
    return np.packbits(bits, bitorder="little").view(np.int32)


def unpack_tokens(words: np.ndarray, vocab_size: int) -> np.ndarray:
    """The ids of the tokens that may come, of one row."""
    return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")[:vocab_size])
