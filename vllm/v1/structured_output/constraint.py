"""Where one text stands in its grammar."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

SECONDS_ALLOWED = 1.0
SECONDS_A_TOKEN = 0.005
"""What a text's masks may cost in all: a grammar with endless ways to read a text takes longer with each token of it."""

MOST_BLANKS = 64
MOST_NEWLINES = 2
"""White space in a row between the parts of a JSON text. Models that nothing stops there have gone on with it for ever."""


@dataclass(frozen=True, slots=True)
class TokenSets:
    """What constraints know of the vocabulary.

    Args:
        tokens: bytes of each token id.
        open_mask: every token but those that end a text.
        json_mask: every token without control characters other than line ends. Some of xgrammar's JSON strings allow them raw,
            which JSON does not.
        solid_mask: of these, every token that is not white space only.
    """

    tokens: list[bytes]
    open_mask: np.ndarray
    json_mask: np.ndarray
    solid_mask: np.ndarray


class Constraint:
    """One text's grammar. The text is what was generated, so a sequence that is preempted and computed anew keeps this.

    Args:
        matcher: of xgrammar, at the grammar's beginning.
        sets: of the vocabulary. Until the grammar begins every token may come but those that end the text.
        is_json: the text is JSON, in which white space means nothing.
        begin_after: the grammar begins behind the first place of this text; empty: at once.
        begin_at: it also begins with the first place of this text, where that comes earlier; empty: nowhere.
    """

    def __init__(
        self, matcher: Any, sets: TokenSets, is_json: bool = False, begin_after: str = "", begin_at: str = ""
    ) -> None:
        self._matcher = matcher
        self._sets = sets
        self._is_json = is_json
        self._num_blanks = self._num_newlines = 0  # at the end of the text
        self._begin_after = begin_after.encode()
        self._begin_at = begin_at.encode()
        self._tail: bytes | None = b"" if begin_after else None  # the end of the text, until the grammar begins
        self._num_tokens = 0
        self._seconds = 0.0
        self.is_done = False

    must_know_tokens = True  # there is a mask for every token, made of those before it; see ThinkingBudget
    is_idle = is_over = False

    @property
    def has_begun(self) -> bool:
        """Whether the grammar holds for the next token."""
        return self._tail is None

    def fill(self, words: np.ndarray, row: int) -> None:
        """Write the tokens that may come next into row `row` of words [C, W] int32."""
        if self._tail is not None:
            words[row] = self._sets.open_mask
            return
        start = time.thread_time()
        self._matcher.fill_next_token_bitmask(words, row)
        if self._is_json:
            endless = self._num_blanks >= MOST_BLANKS or self._num_newlines >= MOST_NEWLINES
            kept = words[row] & (self._sets.solid_mask if endless else self._sets.json_mask)
            if kept.any():
                words[row] = kept
        self._seconds += time.thread_time() - start

    def accept(self, token_id: int) -> bool:
        """Note the token that came. False if the text cannot go on: the token does not fit, or the grammar costs too much."""
        self._num_tokens += 1
        if self._tail is not None:
            self._look_for_beginning(self._sets.tokens[token_id])
            return True
        if self._is_json:
            self._count_blanks(self._sets.tokens[token_id])
        start = time.thread_time()
        accepted = self._matcher.accept_token(token_id)
        self._seconds += time.thread_time() - start
        self.is_done = self._matcher.is_terminated()
        return accepted and (self.is_done or not self.is_too_slow)

    @property
    def is_too_slow(self) -> bool:
        """Whether this text has used up the host's time that it may cost."""
        return self._seconds > SECONDS_ALLOWED + SECONDS_A_TOKEN * self._num_tokens

    def _count_blanks(self, new: bytes) -> None:
        body = new.rstrip()
        if body:
            self._num_blanks = self._num_newlines = 0
        self._num_blanks += len(new) - len(body)
        self._num_newlines += new.count(b"\n", len(body))

    def _look_for_beginning(self, new: bytes) -> None:
        text = self._tail + new
        after, at = text.find(self._begin_after), text.find(self._begin_at) if self._begin_at else -1
        if at >= 0 and (after < 0 or at < after) and self._begin(text[at:]):
            return
        if after >= 0:
            # The token that completed the marker may have brought more along; if that does not fit, it is still thinking.
            self._begin(text[after + len(self._begin_after) :])
            self._tail = None
            return
        longest = max(len(self._begin_after), len(self._begin_at))
        self._tail = text[max(at + 1, len(text) - longest + 1, 0) :]

    def _begin(self, rest: bytes) -> bool:
        """Let the grammar begin with `rest`, if that fits."""
        if rest and not self._matcher.accept_string(rest):
            self._matcher.reset()
            return False
        self._tail = None
        return True
