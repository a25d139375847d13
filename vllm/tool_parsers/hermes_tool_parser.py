"""`hermes`: calls written as JSON, the format of Hermes 2 Pro that Qwen2.5, Qwen3 and Qwen3-Next-Instruct use.

    <tool_call>
    {"name": "NAME", "arguments": {...}}
    </tool_call>

A call is sent when its object is complete, because only then is it known to be one: the object must be JSON with a name that is
a string and arguments that are an object (or the JSON text of one; none at all means none are given). A block that is anything
else is content, verbatim, and so is one that the output's end cuts off. The closing tag may be missing. The object ends where its
braces balance, so strings may hold `</tool_call>`; outside of strings, or at the start of a line, that tag ends a broken object,
and the next call is not drawn into its ruin.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from vllm.tool_parsers.abstract_tool_parser import CALL_END, ToolParser
from vllm.tool_parsers.calls import new_call_id
from vllm.tool_parsers.coercion import dump, load, sendable
from vllm.tool_parsers.tags import GAP, Tag

_TO_OBJECT = re.compile(r"<tool_call>\s*")
_OUTSIDE = re.compile(r'["{}\[\]<]')
_INSIDE = re.compile(r'["\\\n]')


class Hermes2ProToolParser(ToolParser):
    """See the module."""

    opening = Tag("<tool_call>", GAP, "{")

    def __init__(self, tools: list[dict] | None = None, make_id: Callable[[], str] = new_call_id) -> None:
        super().__init__(tools, make_id)
        self._head = ""  # the opening tag and the white space after it, as written
        self._object: list[str] = []  # the object so far
        self._depth = 0
        self._in_string = False

    def _begin(self) -> None:
        opened = _TO_OBJECT.match(self._text, self._at)
        self._head, self._at = opened[0], opened.end()
        self._depth, self._in_string = 0, False
        self._step = self._read_object

    def _read_object(self) -> bool:
        start, text = self._at, self._text
        place, whole, broken = self._scan(text, start)
        self._object.append(text[start:place])
        self._at = place
        if not whole and not broken:
            return False
        if not (whole and self._call("".join(self._object))):
            self._give_up()
            return True
        self._object.clear()
        self._step = self._read_closing
        return True

    def _scan(self, text: str, place: int) -> tuple[int, bool, bool]:
        """How far the object is read: (place, it is complete there, it is broken there)."""
        while True:
            token = (_INSIDE if self._in_string else _OUTSIDE).search(text, place)
            if token is None:
                return len(text), False, False
            place, char = token.start(), token[0]
            if char in "\n<":
                tag = "\n" + CALL_END if char == "\n" else CALL_END
                if text.startswith(tag, place):
                    return place, False, True
                if tag.startswith(text[place : place + len(tag)]):
                    return place, False, False
            elif char == "\\":
                if place + 1 == len(text):
                    return place, False, False
                place += 1
            elif char == '"':
                self._in_string = not self._in_string
            else:
                self._depth += 1 if char in "{[" else -1
                if self._depth == 0:
                    return place + 1, True, False
            place += 1

    def _call(self, text: str) -> bool:
        """Send the call that `text` is, if it is one."""
        try:
            call = load(text)
            arguments = call.get("arguments")
            if isinstance(arguments, str):
                arguments = load(arguments)
            name = call.get("name")
            if not isinstance(name, str) or not name or not isinstance(arguments, dict | None):
                return False
            piece = dump(arguments or {})
        except (ValueError, RecursionError):
            return False
        self._open_call(sendable(name))
        self._argue(piece)
        return True

    def _give_up(self) -> None:
        self._say(self._head + "".join(self._object))
        self._object.clear()
        self._step = self._read_content

    def _end(self, rest: str) -> None:
        if self._step == self._read_object:
            self._give_up()
        super()._end(rest)
