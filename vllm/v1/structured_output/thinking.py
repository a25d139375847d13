"""How long one text may think: after so many tokens the block is closed for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from vllm.v1.structured_output.masks import pack_tokens

if TYPE_CHECKING:
    from vllm.v1.structured_output.constraint import Constraint


class ThinkingBudget:
    """Stands before a text's constraint, if it has one, and looks like one. It has a mask only while it forces the end.

    The text thinks from the start token on, whether that is the prompt's or the first token generated, until the end token or
    another of those that end the block. Of a text whose form already holds nothing is forced: that form decides.

    Args:
        most_tokens: of thinking. The next one is the end token.
        token_ids: (start, end, others that end the block): what the reasoning parser reads.
        prompt_token_ids: leave the block open where a start token is not followed by an end token.
        vocab_size: logits of a row.
        inner: the text's own constraint.
    """

    def __init__(
        self,
        most_tokens: int,
        token_ids: Sequence[int],
        prompt_token_ids: Sequence[int],
        vocab_size: int,
        inner: Constraint | None = None,
    ) -> None:
        self._start, self._end, *others = token_ids
        self._ends = {self._end, *others}
        self._left = most_tokens
        self._vocab_size = vocab_size
        self._inner = inner
        self._thinks = opens_thinking(prompt_token_ids, self._start, self._end)
        self._begun = self._thinks  # or it is too late for a block to begin

    @property
    def is_idle(self) -> bool:
        """Whether any token may come next: there is no mask to make."""
        return self._inner is None and not self._forces

    @property
    def must_know_tokens(self) -> bool:
        """Whether the token after one that is still being sampled may need a mask."""
        may_think = self._thinks or not self._begun
        return self._inner is not None or (may_think and self._left <= 1)

    @property
    def is_over(self) -> bool:
        """Whether it will be idle for ever."""
        return self._inner is None and self._begun and not self._thinks

    @property
    def is_done(self) -> bool:
        return self._inner is not None and self._inner.is_done

    def fill(self, words: np.ndarray, row: int) -> None:
        """Write the tokens that may come next into row `row` of words [C, W] int32. Not called while it is idle."""
        if self._forces:
            words[row] = pack_tokens([self._end], self._vocab_size, allowed=True)
        else:
            self._inner.fill(words, row)

    def accept(self, token_id: int) -> bool:
        """Note the token that came. False if the text cannot go on."""
        if self._thinks:
            self._left -= 1
            self._thinks = token_id not in self._ends
        elif not self._begun:
            self._thinks = token_id == self._start
        self._begun = True
        return self._inner is None or self._inner.accept(token_id)

    @property
    def _forces(self) -> bool:
        return self._thinks and self._left <= 0 and (self._inner is None or not self._inner.has_begun)


def opens_thinking(token_ids: Sequence[int], start: int, end: int) -> bool:
    """Whether the last start token of a prompt has no end token after it."""
    for token_id in reversed(token_ids):
        if token_id == end:
            return False
        if token_id == start:
            return True
    return False
