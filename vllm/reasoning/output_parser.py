"""One output of a chat request, from text to the three things that the answer is made of: reasoning, content, tool calls.

parser = ChatOutputParser(reasoning_class, tool_class, tools, thinking)      # one a choice
for text in deltas:
    delta = parser.feed(text)        # falsy when nothing is settled yet
delta = parser.finish()

output = ChatOutputParser(...).parse(text)      # the same for a whole text
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from vllm.reasoning.abs_reasoning_parsers import ReasoningParser
from vllm.tool_parsers.abstract_tool_parser import ToolParser
from vllm.tool_parsers.calls import DeltaToolCall, ToolCall, join_calls, new_call_id


@dataclass(slots=True)
class ChatDelta:
    """What one delta of text has settled. Falsy if nothing."""

    reasoning: str = ""
    content: str = ""
    tool_calls: list[DeltaToolCall] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.reasoning or self.content or self.tool_calls)


@dataclass(slots=True)
class ChatOutput:
    """A whole output. None for a text that is empty."""

    reasoning: str | None
    content: str | None
    tool_calls: list[ToolCall]


class ChatOutputParser:
    """Reasoning first, then tool calls in the content that is left. Either parser may be None.

    `thinking`: whether the prompt left a thinking block open (ReasoningParser.prompt_opens_thinking). Without tools a call's
    marker inside the block is a word like any other and does not end it. Where a call did end the block, the `</think>` that
    the model may still write outside of the calls is dropped, with the newlines after it.
    """

    def __init__(
        self,
        reasoning_parser: type[ReasoningParser] | None,
        tool_parser: type[ToolParser] | None,
        tools: list[dict] | None = None,
        thinking: bool = True,
        make_id: Callable[[], str] = new_call_id,
    ) -> None:
        calls = tool_parser is not None or bool(tools)
        self._reasoning = reasoning_parser(thinking, calls) if reasoning_parser else None
        self._tools = tool_parser(tools, make_id) if tool_parser else None
        self._late_end = _LateEnd(reasoning_parser.end_marker) if reasoning_parser and tool_parser else None

    @property
    def call_count(self) -> int:
        """How many calls the output has made so far; if any, a finish_reason "stop" is to be "tool_calls"."""
        return self._tools.call_count if self._tools else 0

    def feed(self, delta: str) -> ChatDelta:
        """What `delta` has settled."""
        reasoning, content = self._reasoning.feed(delta) if self._reasoning else ("", delta)
        if not self._tools or not content:
            return ChatDelta(reasoning, content)
        made = self._tools.feed(content)
        return ChatDelta(reasoning, self._without_late_end(made.content), made.tool_calls)

    def finish(self) -> ChatDelta:
        """What was held back, now that the output is over."""
        reasoning, content = self._reasoning.finish() if self._reasoning else ("", "")
        if not self._tools:
            return ChatDelta(reasoning, content)
        first, last = self._tools.feed(content), self._tools.finish()
        content = self._without_late_end(first.content + last.content, final=True)
        return ChatDelta(reasoning, content, first.tool_calls + last.tool_calls)

    def parse(self, text: str) -> ChatOutput:
        """The whole output at once. For a parser that has been fed nothing."""
        return join_chat([self.feed(text), self.finish()])

    def _without_late_end(self, content: str, final: bool = False) -> str:
        if self._late_end and self._reasoning.ended_by_call:
            return self._late_end.feed(content, final)
        return content


def join_chat(deltas: Iterable[ChatDelta]) -> ChatOutput:
    """The whole output that a stream's deltas add up to."""
    deltas = list(deltas)
    return ChatOutput(
        "".join(delta.reasoning for delta in deltas) or None,
        "".join(delta.content for delta in deltas) or None,
        join_calls(piece for delta in deltas for piece in delta.tool_calls),
    )


class _LateEnd:
    """Takes the first `marker` out of a text, and the newlines after it."""

    def __init__(self, marker: str) -> None:
        self._marker = marker
        self._held = ""
        self._found = False
        self._after = False

    def feed(self, text: str, final: bool) -> str:
        if not self._found:
            text = self._held + text
            before, found, after = text.partition(self._marker)
            if not found:
                last = text.rfind("<")
                unsure = not final and last >= 0 and self._marker.startswith(text[last:])
                self._held = text[last:] if unsure else ""
                return text[:last] if unsure else text
            self._found = self._after = True
            return before + self.feed(after, final)
        if self._after:
            text = text.lstrip("\n")
            self._after = not text
        return text
