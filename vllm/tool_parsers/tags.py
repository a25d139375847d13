"""Tags that arrive in pieces: does one stand here, might one stand here once more text has come, or neither?

A tag is a sequence of literal texts and runs of limited length, so the answer always comes within a bounded number of characters:
a parser never has to hold back, or look again at, more than that. No tag's text can be continued to a different match, which
makes the answers independent of how the text was cut.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import reduce


@dataclass(frozen=True)
class Run:
    """A stretch of characters, as a regular expression that cannot match the start of what follows it."""

    pattern: str


GAP = Run(r"[ \t\r\n]{0,64}")
NAME = Run(r"[^<>\n]{1,256}")

# A sequence of these. A list, of the sequences that may follow, comes last if at all.
Part = str | Run | list


class Tag:
    """A tag, perhaps with several endings, of which at most one can match a given text."""

    def __init__(self, *parts: Part) -> None:
        self._pattern = re.compile(_pattern(parts))

    def match(self, text: str, place: int) -> tuple[int | None, bool]:
        """(where the tag at `place` ends, whether it stands or might stand there): the end is None unless it stands."""
        match = self._pattern.match(text, place)
        if match is None:
            return None, False
        return (match.end() if match.lastindex else None), True

    def find(self, text: str, start: int) -> tuple[bool, int]:
        """The first place from `start` where the tag stands (True, place) or might (False, place); (False, end) if nowhere.

        For tags that begin with "<".
        """
        place = text.find("<", start)
        while place >= 0:
            if match := self._pattern.match(text, place):
                return bool(match.lastindex), place
            place = text.find("<", place + 1)
        return False, len(text)


def _pattern(parts: tuple[Part, ...]) -> str:
    """A pattern for the whole tag, marked by an empty group, or for a beginning of it that the text ends in."""
    if not parts:
        return "()"
    first, rest = parts[0], parts[1:]
    if isinstance(first, list):
        return "(?:" + "|".join(map(_pattern, first)) + ")"
    steps = [first.pattern] if isinstance(first, Run) else list(map(re.escape, first))
    return reduce(lambda after, step: rf"{step}(?:{after}|\Z)", reversed(steps), _pattern(rest))
