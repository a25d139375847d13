"""Log-probabilities in the shapes of OpenAI's two endpoints."""

from __future__ import annotations

import codecs
from typing import Any

from vllm.outputs import Logprob
from vllm.v1.engine.detokenizer import TokenTable

_LOWEST = -9999.0  # JSON has no infinities

Candidates = dict[int, Logprob]  # token id -> how likely; the token that stands there comes first


class TokenNames:
    """How tokens are written in answers.

    Args:
        table: the tokenizer's.
        as_ids: write "token_id:N" in place of the text.
    """

    def __init__(self, table: TokenTable, as_ids: bool) -> None:
        self.table = table
        self._as_ids = as_ids

    def name(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._as_ids else self.table.text_of(token_id)


def chat_logprobs(positions: list[Candidates], names: TokenNames, top: int) -> list[dict[str, Any]]:
    """The `content` of a chat choice's logprobs, with the `top` likeliest tokens at each position; -1 shows all there are."""
    content = []
    for candidates in positions:
        token_id = next(iter(candidates))
        ranked = sorted(candidates.items(), key=lambda item: item[1].rank or 0)
        shown = ranked if top < 0 else ranked[:top]
        entry = _entry(token_id, candidates[token_id], names)
        entry["top_logprobs"] = [_entry(other, logprob, names) for other, logprob in shown]
        content.append(entry)
    return content


def _entry(token_id: int, logprob: Logprob, names: TokenNames) -> dict[str, Any]:
    data = names.table.bytes_of(token_id)
    return {"token": names.name(token_id), "logprob": _number(logprob), "bytes": list(data)}


class CompletionLogprobs:
    """A completion choice's logprobs, position by position, with each token's place in the text.

    Args:
        names: how tokens are written.
        skip_special: special tokens of the output have no text; those of an echoed prompt have.
    """

    def __init__(self, names: TokenNames, skip_special: bool) -> None:
        self._names = names
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._offset = 0

    def prompt(self, token_ids: list[int], positions: list[Candidates | None]) -> dict[str, list[Any]]:
        """Of an echoed prompt; nothing comes before the first token, so that it has no log-probability."""
        return self._format(token_ids, positions, skip_special=False)

    def output(self, token_ids: list[int], positions: list[Candidates]) -> dict[str, list[Any]]:
        """Of the tokens that come next."""
        return self._format(token_ids, positions, skip_special=self._skip_special)

    def _format(self, token_ids: list[int], positions: list[Any], skip_special: bool) -> dict[str, list[Any]]:
        result: dict[str, list[Any]] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        for token_id, candidates in zip(token_ids, positions):
            result["text_offset"].append(self._offset)
            result["tokens"].append(self._names.name(token_id))
            result["token_logprobs"].append(None if candidates is None else _number(candidates[token_id]))
            result["top_logprobs"].append(None if candidates is None else self._top(candidates))
            if not (skip_special and token_id in self._names.table.special_ids):
                self._offset += len(self._utf8.decode(self._names.table.bytes_of(token_id)))
        return result

    def _top(self, candidates: Candidates) -> dict[str, float]:
        top: dict[str, float] = {}
        for token_id, logprob in candidates.items():  # of tokens with the same text, the first counts
            top.setdefault(self._names.name(token_id), _number(logprob))
        return top


def prompt_logprobs(positions: list[Candidates | None] | None) -> list[dict[str, Any] | None] | None:
    """The field of that name: token id -> logprob, rank and text, a prompt token a dictionary."""
    if positions is None:
        return None
    return [
        None
        if candidates is None
        else {
            str(token_id): {"logprob": _number(item), "rank": item.rank, "decoded_token": item.decoded_token}
            for token_id, item in candidates.items()
        }
        for candidates in positions
    ]


def joined(first: dict[str, list[Any]] | None, second: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Two stretches of a completion's logprobs, one after the other."""
    return second if first is None else {name: first[name] + second[name] for name in second}


def _number(logprob: Logprob) -> float:
    return max(logprob.logprob, _LOWEST)
