"""From token ids to text, as they come.

The tokenizers of these models are byte-level: each token is a few bytes of UTF-8, and a text is its tokens' bytes put together.
So decoding needs no window of earlier tokens: a UTF-8 decoder that keeps incomplete characters back gives, piece by piece,
exactly what decoding everything at once gives.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Iterable
from typing import Any

from vllm.sampling_params import SamplingParams


def _byte_of_char() -> dict[str, int]:
    """The byte-level alphabet: printable bytes stand for themselves, the others for characters from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE = _byte_of_char()


class TokenTable:
    """Bytes of each token, looked up once.

    Args:
        tokenizer: of transformers, with a byte-level decoder.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        kind = type(getattr(backend, "decoder", None)).__name__
        if kind != "ByteLevel":
            raise ValueError(
                f"the tokenizer must have a byte-level decoder, as these models' tokenizers do; it has {kind}"
            )
        self._id_to_token = backend.id_to_token
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._known: dict[int, bytes] = {}

    def bytes_of(self, token_id: int) -> bytes:
        """Ids that stand for nothing (a model's vocabulary is padded beyond its tokenizer's) have no bytes."""
        known = self._known.get(token_id)
        if known is None:
            known = self._known[token_id] = self._look_up(token_id)
        return known

    def text_of(self, token_id: int) -> str:
        """One token by itself; half a character shows as U+FFFD."""
        return self.bytes_of(token_id).decode("utf-8", errors="replace")

    def _look_up(self, token_id: int) -> bytes:
        token = self._id_to_token(token_id) or ""
        try:
            return bytes(_BYTE[char] for char in token)
        except KeyError:  # an added token, spelled as it is
            return token.encode("utf-8")


class StopStrings:
    """Finds the first of several strings to be complete in a text that comes in pieces; of two complete at once, the longer.

    An automaton in the manner of Aho and Corasick: its state is the longest end of the text that begins some stop string. That
    is how far a match has come, and also exactly what must be held back because it may yet become one. A character costs the
    same, on average, however many strings there are.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._next: list[dict[str, int]] = [{}]  # state -> character -> state
        self._depth = [0]  # characters that lead to the state
        self._fallback = [0]  # the state of the longest proper end of those characters
        self._complete: list[str | None] = [None]  # the longest stop string at the end of those characters
        self._state = 0
        for stop in stops:
            self._insert(stop)
        queue = deque(self._next[0].values())
        while queue:  # shallow states first: a fallback is always shallower
            state = queue.popleft()
            self._complete[state] = self._complete[state] or self._complete[self._fallback[state]]
            for char, deeper in self._next[state].items():
                self._fallback[deeper] = self._step(self._fallback[state], char)
                queue.append(deeper)

    @property
    def held(self) -> int:
        """Characters at the end of the text that begin some stop string."""
        return self._depth[self._state]

    def feed(self, text: str, armed: bool) -> tuple[str, int] | None:
        """The stop string that is complete, and where in `text` it ends. Nothing counts unless `armed`."""
        for position, char in enumerate(text):
            self._state = self._step(self._state, char)
            complete = self._complete[self._state]
            if complete and armed:
                return complete, position + 1
            while self._state and not self._next[self._state]:  # the end of a string that did not count
                self._state = self._fallback[self._state]
        return None

    def _insert(self, stop: str) -> None:
        state = 0
        for char in stop:
            if char not in self._next[state]:
                self._next[state][char] = len(self._next)
                self._next.append({})
                self._depth.append(self._depth[state] + 1)
                self._fallback.append(0)
                self._complete.append(None)
            state = self._next[state][char]
        self._complete[state] = stop

    def _step(self, state: int, char: str) -> int:
        while state and char not in self._next[state]:
            state = self._fallback[state]
        return self._next[state].get(char, 0)


class Detokenizer:
    """The text of one sequence.

    Args:
        table: of the tokenizer; None gives no text at all, as `params.detokenize` False does.
    """

    def __init__(self, table: TokenTable | None, params: SamplingParams) -> None:
        self._table = table if params.detokenize else None
        self._skipped = table.special_ids if table and params.skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stops = StopStrings(params.stop) if params.stop else None
        self._include_stop = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._num_tokens = 0
        self._held = ""  # the beginning of a stop string, perhaps
        self._released: list[str] = []

    def push(self, token_id: int, *, silent: bool = False) -> str | None:
        """Add one token; the stop string that it completed, if any. After one, or after `finish`, nothing more may come.

        Args:
            silent: the token ended the sequence and its text is not wanted.
        """
        self._num_tokens += 1
        if self._table is None or silent or token_id in self._skipped:
            return None
        return self._add(self._utf8.decode(self._table.bytes_of(token_id)))

    def finish(self) -> str | None:
        """Release what was held back: no more tokens come. The stop string completed by that, if any."""
        stop = self._add(self._utf8.decode(b"", final=True))
        if stop is None:
            self._release(self._held)
            self._held = ""
        return stop

    @property
    def text(self) -> str:
        """What was released and not taken."""
        self._released = ["".join(self._released)]
        return self._released[0]

    def take(self) -> str:
        """What was released since the last `take`."""
        text = self.text
        self._released.clear()
        return text

    def _add(self, piece: str) -> str | None:
        if not piece:
            return None
        if self._stops is None:
            self._release(piece)
            return None
        text = self._held + piece
        match = self._stops.feed(piece, armed=self._num_tokens > self._min_tokens)
        if match is not None:
            stop, end = match
            self._release(text[: len(self._held) + end - (0 if self._include_stop else len(stop))])
            self._held = ""
            return stop
        cut = len(text) - self._stops.held
        self._release(text[:cut])
        self._held = text[cut:]
        return None

    def _release(self, piece: str) -> None:
        if piece:
            self._released.append(piece)
