"""What a tool parser is: it takes the tool calls out of what a model wrote, as the text arrives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from vllm.reasoning.registry import ParserManager
from vllm.tool_parsers.calls import DeltaToolCall, ExtractedToolCalls, ToolDelta, join_deltas, new_call_id
from vllm.tool_parsers.coercion import read_tools
from vllm.tool_parsers.tags import GAP, Tag

CALL_END = "</tool_call>"
_CLOSING = Tag(GAP, CALL_END)


class ToolParser(ABC):
    """Reads ONE output. Feed it every delta, then finish it; then throw it away.

    There is one parser for streams and for whole texts (`extract_tool_calls` feeds everything at once), and it decides on the
    text alone, never on where deltas end, so both give the same.

    What is not a call is content, verbatim. A block that has not the form of a call is not a call. White space that touches a
    call is layout: it is dropped after a call, and before one unless other content has come and more follows. Without calls
    every character is content.

    Subclasses give `opening`, the tag at which a call begins, and `_begin`, which is called with the text at such a place.
    They are state machines: `_step` is the current state, a method that consumes text from `_at` on and says whether it is
    worth calling again before more text has come.
    """

    opening: ClassVar[Tag]

    def __init__(self, tools: list[dict] | None = None, make_id: Callable[[], str] = new_call_id) -> None:
        self.tools = tools
        self._make_id = make_id
        self._schemas = read_tools(tools)
        self._text = ""
        self._at = 0
        self._step: Callable[[], bool] = self._read_content
        # Content: what is settled, white space that waits for the text after it, whether anything was sent, and whether a call
        # was the last thing read.
        self._content: list[str] = []
        self._blank: list[str] = []
        self._said = False
        self._after_call = False
        # Calls: how many, the pieces since the last delta, and the argument pieces of the latest of those.
        self.call_count = 0
        self._pieces: list[DeltaToolCall] = []
        self._arguments: list[str] = []

    def feed(self, delta: str) -> ToolDelta:
        """What `delta` has settled."""
        self._text += delta
        while self._at < len(self._text) and self._step():
            pass
        self._text, self._at = self._text[self._at :], 0
        return self._flush()

    def finish(self) -> ToolDelta:
        """What was held back, now that the output is over."""
        rest, self._text = self._text, ""
        self._end(rest)
        if not self.call_count:
            self._content += self._blank
        return self._flush()

    def extract_tool_calls(self, text: str) -> ExtractedToolCalls:
        """Content and calls of a whole output. Leaves this parser's own state alone."""
        twin = type(self)(self.tools, self._make_id)
        return join_deltas([twin.feed(text), twin.finish()])

    @abstractmethod
    def _begin(self) -> None:
        """`opening` stands at `_at`: consume what of it is read here, and set the next state."""

    def _end(self, rest: str) -> None:
        """The output is over, with `rest` undecided."""
        if self._step != self._read_closing or not CALL_END.startswith(rest.strip()):
            self._say(rest)

    def _read_content(self) -> bool:
        opened, place = self.opening.find(self._text, self._at)
        self._say(self._text[self._at : place])
        self._at = place
        if opened:
            self._begin()
        return opened

    def _read_closing(self) -> bool:
        """After a call: its closing tag belongs to it; a missing one is not missed."""
        end, possible = _CLOSING.match(self._text, self._at)
        if possible and end is None:
            return False
        if end is not None:
            self._at = end
        self._step = self._read_content
        return True

    def _say(self, text: str) -> None:
        if self._after_call:
            text = text.lstrip()
            self._after_call = not text
        body = text.rstrip()
        if body:
            self._content += [*self._blank, body]
            self._blank.clear()
            self._said = True
        if len(body) < len(text):
            self._blank.append(text[len(body) :])

    def _open_call(self, name: str) -> None:
        self._flush_arguments()
        self._pieces.append(DeltaToolCall(self.call_count, self._make_id(), name))
        self.call_count += 1
        self._after_call = True
        if not self._said:
            self._blank.clear()

    def _argue(self, piece: str) -> None:
        self._arguments.append(piece)

    def _flush_arguments(self) -> None:
        if self._arguments:
            index = self.call_count - 1
            if not self._pieces:
                self._pieces.append(DeltaToolCall(index))
            self._pieces[-1].arguments = "".join(self._arguments)
            self._arguments.clear()

    def _flush(self) -> ToolDelta:
        if not (self._content or self._pieces or self._arguments):
            return ToolDelta()
        self._flush_arguments()
        delta = ToolDelta("".join(self._content), self._pieces)
        self._content.clear()
        self._pieces = []
        return delta


class ToolParserManager(ParserManager):
    """The values of --tool-call-parser."""

    kind = "tool call parser"
    _known: ClassVar[dict[str, type | str]] = {
        "hermes": "vllm.tool_parsers.hermes_tool_parser:Hermes2ProToolParser",
        "qwen3_coder": "vllm.tool_parsers.qwen3coder_tool_parser:Qwen3CoderToolParser",
        "qwen3_xml": "vllm.tool_parsers.qwen3xml_tool_parser:Qwen3XMLToolParser",
    }

    @classmethod
    def get_tool_parser(cls, name: str) -> type[ToolParser]:
        """The class of that name. Raises ValueError, listing the names there are, for any other."""
        return cls._get(name)
