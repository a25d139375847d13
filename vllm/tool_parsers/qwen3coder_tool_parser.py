"""Calls as Qwen3-Coder, Qwen3-Coder-Next, Qwen3.5 and Qwen3.6 write them; the reader shared by `qwen3_coder` and `qwen3_xml`.

    <tool_call>
    <function=NAME>
    <parameter=KEY>
    VALUE
    </parameter>
    </function>
    </tool_call>

Rules. Between tags there may be up to 64 characters of white space; a name has up to 256 characters and no `<`, `>` or newline.

- `<tool_call>`, `<function=NAME>` and then `<parameter=KEY>`, `</function>` or `</tool_call>` begin a call. Anything less is content.
- A value ends at a `</parameter>` that another tag of the format follows, or at `</function>` and `</tool_call>`. So a value may hold any of
  these tags, as text about this format does, except in exactly those sequences.
- One newline is taken off each end of a value. The schema then decides what it is (vllm.tool_parsers.coercion).
- Of parameters with one name the first counts: it may have been sent before the second is seen.
- `</function>` and the closing `</tool_call>` may be missing, and one block may hold several functions.
- Where the output ends inside a call, the call keeps what it has and its arguments are closed. `qwen3_coder` sends a value when it
  is complete, so a value that was cut off is left out; `qwen3_xml` says what it does instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import ClassVar

from vllm.tool_parsers.abstract_tool_parser import ToolParser
from vllm.tool_parsers.calls import new_call_id
from vllm.tool_parsers.coercion import FunctionSchema, dump
from vllm.tool_parsers.tags import GAP, NAME, Tag

_NEXT_PART: list = [("<parameter=", NAME, ">"), ("</function>",), ("</tool_call>",)]
# What makes a function's tag the start of a call is the tag after it.
_CALL = ("<function=", NAME, ">", GAP, _NEXT_PART)
_OPENING = ("<tool_call>", GAP, *_CALL)
_SIBLING = Tag(GAP, *_CALL)
_VALUE_ENDS: list = [("</function>", GAP, "</tool_call>"), ("</parameter>", GAP, [*_NEXT_PART, _OPENING])]
_VALUE_END = Tag(_VALUE_ENDS)

_NAME_OF_CALL = re.compile(r"(?:<tool_call>)?\s*<function=([^>]+)>")
_NEXT = re.compile(r"\s*(?:<parameter=([^>]+)>|(</function>)|(</tool_call>)|)")
_PARAMETER_END = "</parameter>"
_NO_SCHEMA = FunctionSchema(None)


class Qwen3CoderToolParser(ToolParser):
    """See the module."""

    opening = Tag(*_OPENING)
    stream_strings: ClassVar[bool] = False

    def __init__(self, tools: list[dict] | None = None, make_id: Callable[[], str] = new_call_id) -> None:
        super().__init__(tools, make_id)
        self._schema = _NO_SCHEMA
        self._keys: set[str] = set()
        # The parameter being read. `_streams`: its value is sent as it comes.
        self._key = ""
        self._repeated = False
        self._streams = False
        self._value: list[str] = []
        self._value_started = False
        self._newline = ""

    def _begin(self) -> None:
        head = _NAME_OF_CALL.match(self._text, self._at)
        self._at = head.end()
        self._schema = self._schemas.get(head[1], _NO_SCHEMA)
        self._keys.clear()
        self._open_call(head[1])
        self._step = self._read_tag

    def _read_tag(self) -> bool:
        """Between the parts of a call, where the tag that comes next is known to be whole."""
        tag = _NEXT.match(self._text, self._at)
        if tag[1]:
            self._at = tag.end()
            self._begin_value(tag[1])
            return True
        self._argue("}" if self._keys else "{}")
        if tag[2]:
            self._at = tag.end()
            self._step = self._read_sibling
        else:  # </tool_call>, or the next call's
            self._step = self._read_closing
        return True

    def _read_sibling(self) -> bool:
        """After `</function>`: another function of the same block, or the end of it."""
        end, possible = _SIBLING.match(self._text, self._at)
        if end is not None:
            self._begin()
            return True
        if possible:
            return False
        self._step = self._read_closing
        return True

    def _begin_value(self, key: str) -> None:
        self._key = key
        self._repeated = key in self._keys
        self._streams = self.stream_strings and not self._repeated and self._schema.is_text(key)
        self._value_started = False
        self._newline = ""
        if self._streams:
            self._argue(f'{self._lead()}"')
        self._step = self._read_value

    def _lead(self) -> str:
        """What goes before the current parameter's value."""
        lead = f"{', ' if self._keys else '{'}{dump(self._key)}: "
        self._keys.add(self._key)
        return lead

    def _read_value(self) -> bool:
        ended, place = _VALUE_END.find(self._text, self._at)
        self._take(self._text[self._at : place])
        self._at = place
        if ended:
            self._end_value()
        return ended

    def _take(self, text: str) -> None:
        if not text or self._repeated:
            return
        if not self._value_started:
            self._value_started = True
            text = text.removeprefix("\n")
        if not self._streams:
            self._value.append(text)
            return
        text = self._newline + text
        self._newline = "\n" if text.endswith("\n") else ""
        if body := text.removesuffix("\n"):
            self._argue(dump(body)[1:-1])

    def _end_value(self) -> None:
        if self._text.startswith(_PARAMETER_END, self._at):
            self._at += len(_PARAMETER_END)
        if self._streams:
            self._argue('"')
        elif not self._repeated:
            text = "".join(self._value).removesuffix("\n")
            self._argue(self._lead() + self._schema.to_json(self._key, text))
        self._value.clear()
        self._step = self._read_tag

    def _end(self, rest: str) -> None:
        if self._step == self._read_value:
            if rest.startswith((_PARAMETER_END, "</function>")):
                self._end_value()
            elif self._streams:
                self._argue('"')
            self._argue("}" if self._keys else "{}")
            return
        if self._step == self._read_sibling:
            self._step = self._read_closing
        super()._end(rest)
