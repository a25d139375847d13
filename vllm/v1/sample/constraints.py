"""Tokens that a row may not have, must have, or should rather have: allow-lists, bad words, biases, stops before min_tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from vllm.v1.sample.row_table import RowTable, to_device

_NEG_INF = float("-inf")
_ANY = -1  # in a bad word's padding: matches every token
_NONE = -2  # in the tail of what was generated: no token yet


class AllowLists:
    """For rows with allowed_token_ids: one byte a token, true where it is forbidden."""

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device) -> None:
        self.table = RowTable(num_rows, device)
        self.table.add_column("forbidden", (vocab_size,), torch.bool, False)

    def add(self, row: int, allowed: Sequence[int]) -> None:
        entry = self.table.take(row)
        forbidden = self.table["forbidden"][entry]  # [V]
        forbidden.fill_(True)
        forbidden.index_fill_(0, to_device(list(allowed), torch.int64, forbidden.device), False)

    def apply(self, logits: torch.Tensor, rows: torch.Tensor) -> None:
        """Set forbidden tokens of logits [S, V] float32 to -inf, in place."""
        logits.masked_fill_(self.table.lookup("forbidden", rows), _NEG_INF)


class LogitBias:
    """For rows with logit_bias: a list of (token, amount). Unused places add 0 to token 0."""

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self.table = RowTable(num_rows, device)
        self.table.add_column("tokens", (0,), torch.int64, 0)
        self.table.add_column("amounts", (0,), torch.float32, 0.0)

    def add(self, row: int, bias: Mapping[int, float]) -> None:
        entry = self.table.take(row)
        self.table.put("tokens", entry, list(bias))
        self.table.put("amounts", entry, list(bias.values()))

    def apply(self, logits: torch.Tensor, rows: torch.Tensor) -> None:
        """Add the biases to logits [S, V] float32, in place."""
        logits.scatter_add_(1, self.table.lookup("tokens", rows), self.table.lookup("amounts", rows))


class StopBans:
    """For rows with min_tokens: the tokens that would end the sequence, forbidden until enough were generated."""

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self.table = RowTable(num_rows, device)
        self.table.add_column("tokens", (0,), torch.int64, _ANY)
        self.table.add_column("until", (1,), torch.int64, 0)

    def add(self, row: int, min_tokens: int, stops: Iterable[int]) -> None:
        entry = self.table.take(row)
        self.table.put("tokens", entry, sorted(stops))
        self.table.put("until", entry, [min_tokens])

    def apply(self, logits: torch.Tensor, rows: torch.Tensor, num_generated: torch.Tensor) -> None:
        """Forbid the stops of rows whose num_generated [S] int64 is below their minimum, in place."""
        tokens = self.table.lookup("tokens", rows)  # [S, M]
        early = num_generated[:, None] < self.table.lookup("until", rows)  # [S, 1]
        _ban(logits, tokens, early & (tokens >= 0))


class BadWords:
    """For rows with bad_words: each word's tokens, and the last tokens generated, as many as the longest word has.

    A word of m tokens stands at the end of its L places, after padding that matches anything; its last token is forbidden
    when the m-1 before it are the last ones generated.
    """

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self.table = RowTable(num_rows, device)
        self.table.add_column("words", (0, 1), torch.int64, _ANY)
        self.table.add_column("tail", (1,), torch.int64, _NONE)

    def add(self, row: int, words: Sequence[Sequence[int]], output_token_ids: Sequence[int]) -> None:
        entry = self.table.take(row)
        longest = max(map(len, words))
        self.table.put("words", entry, [[_ANY] * (longest - len(word)) + list(word) for word in words])
        width = self.table["words"].shape[2]
        self.table.widen("tail", (width,))
        if output_token_ids:
            self.table.put("tail", entry, list(output_token_ids[-width:]))

    def append(self, rows: torch.Tensor, token_ids: torch.Tensor) -> None:
        tail = self.table["tail"]  # [E, L]
        entries = self.table.entry[rows]
        tail[entries] = torch.cat((tail[entries, 1:], token_ids[:, None]), dim=1)

    def apply(self, logits: torch.Tensor, rows: torch.Tensor) -> None:
        """Forbid the tokens that would complete a bad word in logits [S, V] float32, in place."""
        words = self.table.lookup("words", rows)  # [S, B, L]
        before, last = words[..., :-1], words[..., -1]
        tail = self.table.lookup("tail", rows)[:, None, 1:]  # [S, 1, L-1]
        matches = ((before == _ANY) | (before == tail)).all(dim=-1)  # [S, B]
        _ban(logits, last, matches & (last >= 0))


def _ban(logits: torch.Tensor, tokens: torch.Tensor, where: torch.Tensor) -> None:
    """Set logits [S, V] to -inf at tokens [S, M] int64 where `where` [S, M] bool; other places add 0 to some token."""
    amounts = torch.zeros_like(tokens, dtype=logits.dtype).masked_fill_(where, _NEG_INF)
    logits.scatter_add_(1, tokens.clamp(min=0), amounts)
