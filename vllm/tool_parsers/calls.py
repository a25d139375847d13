"""What tool parsers hand out: whole calls, and the pieces of calls that a stream is made of."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(slots=True)
class ToolCall:
    """One call. `arguments` is the text of a JSON object."""

    id: str
    name: str
    arguments: str


@dataclass(slots=True)
class ExtractedToolCalls:
    """A whole output: the text outside of calls, None if there is none, and the calls in the order written."""

    content: str | None
    tool_calls: list[ToolCall]


@dataclass(slots=True)
class DeltaToolCall:
    """A piece of call number `index`: `id` and `name` come once, with the call's first piece; the `arguments` pieces add up."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(slots=True)
class ToolDelta:
    """What one delta of text has settled: a piece of content and pieces of calls, at most one a call. Falsy if nothing."""

    content: str = ""
    tool_calls: list[DeltaToolCall] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.content or self.tool_calls)


def new_call_id() -> str:
    """An id for a call that no other call has."""
    return f"call_{uuid.uuid4().hex[:24]}"


def join_calls(pieces: Iterable[DeltaToolCall]) -> list[ToolCall]:
    """The calls that a stream's pieces add up to."""
    heads: list[DeltaToolCall] = []
    arguments: list[list[str]] = []
    for piece in pieces:
        if piece.index == len(heads):
            heads.append(piece)
            arguments.append([])
        arguments[piece.index].append(piece.arguments)
    return [ToolCall(head.id, head.name, "".join(parts)) for head, parts in zip(heads, arguments)]


def join_deltas(deltas: Iterable[ToolDelta]) -> ExtractedToolCalls:
    """The whole output that a stream's deltas add up to."""
    deltas = list(deltas)
    content = "".join(delta.content for delta in deltas)
    return ExtractedToolCalls(content or None, join_calls(piece for delta in deltas for piece in delta.tool_calls))
