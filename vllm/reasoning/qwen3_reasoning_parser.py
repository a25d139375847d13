"""Thinking blocks of Qwen3, Qwen3.5, Qwen3.6 and Qwen3-Next.

The chat template writes `<think>\\nREASONING\\n</think>\\n\\nANSWER`. In thinking mode the prompt ends with `<think>\\n`, so the output
begins inside the block; otherwise the prompt holds a closed, empty block and the output is all answer. Rules:

- A `<think>` that the model writes itself as the first thing (after at most 64 characters of white space) opens the block, in
  both modes. Anywhere else it is ordinary text.
- The first `</think>` closes the block. So does the first `<tool_call>`, which then belongs to the content. After that nothing
  is a marker any more.
- Newlines that touch the block's ends are layout and belong to nobody: those at the start and at the end of the reasoning, and
  those right after `</think>`. Nothing else is ever removed: spaces stay, and so does the content's end.
- An output that ends inside the block is all reasoning.
"""

from __future__ import annotations

from vllm.reasoning.abs_reasoning_parsers import ReasoningParser

_MAX_INDENT = 64


class Qwen3ReasoningParser(ReasoningParser):
    """See the module. Holds back no more than the beginning of a marker and the newlines before it."""

    start_marker = "<think>"
    end_marker = "</think>"
    call_marker = "<tool_call>"

    def __init__(self, thinking: bool = True, calls_end_reasoning: bool = True) -> None:
        super().__init__(thinking, calls_end_reasoning)
        self._markers = (self.end_marker, self.call_marker) if calls_end_reasoning else (self.end_marker,)
        self._step = self._read_start
        self._text = ""  # not yet settled
        self._newlines = 0  # at the end of the reasoning so far, not yet sent
        self._thought = False  # some reasoning was sent
        self._ended_by_call = False
        self._reasoning: list[str] = []
        self._content: list[str] = []

    @property
    def in_reasoning(self) -> bool:
        return self._step == self._read_reasoning or (self.thinking and self._step == self._read_start)

    @property
    def ended_by_call(self) -> bool:
        return self._ended_by_call

    def feed(self, delta: str) -> tuple[str, str]:
        self._text += delta
        while self._text and self._step():
            pass
        return self._flush()

    def finish(self) -> tuple[str, str]:
        rest, self._text = self._text, ""
        if self.in_reasoning:
            self._think(rest)
        else:
            self._content.append(rest)
        return self._flush()

    def _flush(self) -> tuple[str, str]:
        settled = "".join(self._reasoning), "".join(self._content)
        self._reasoning.clear()
        self._content.clear()
        return settled

    # The states. Each looks at self._text and says whether there may be more to do with it.

    def _read_start(self) -> bool:
        text = self._text.lstrip()
        if len(self._text) - len(text) <= _MAX_INDENT:
            if text.startswith(self.start_marker):
                self._text = text[len(self.start_marker) :]
                self._step = self._read_reasoning
                return True
            if self.start_marker.startswith(text):
                return False
        self._step = self._read_reasoning if self.thinking else self._read_content
        return True

    def _read_reasoning(self) -> bool:
        text = self._text
        found = [at for at in map(text.find, self._markers) if at >= 0]
        if not found:
            # A marker has "<" only at its start, so only the last "<" can be the beginning of one.
            last = text.rfind("<")
            unsure = last >= 0 and any(marker.startswith(text[last:]) for marker in self._markers)
            self._think(text[:last] if unsure else text)
            self._text = text[last:] if unsure else ""
            return False
        end = min(found)
        self._think(text[:end])
        self._ended_by_call = not text.startswith(self.end_marker, end)
        if self._ended_by_call:
            self._text = text[end:]
            self._step = self._read_content
        else:
            self._text = text[end + len(self.end_marker) :]
            self._step = self._read_gap
        return True

    def _read_gap(self) -> bool:
        self._text = self._text.lstrip("\n")
        if self._text:
            self._step = self._read_content
        return True

    def _read_content(self) -> bool:
        self._content.append(self._text)
        self._text = ""
        return False

    def _think(self, text: str) -> None:
        if not self._thought:
            text = text.lstrip("\n")
        body = text.rstrip("\n")
        if body:
            self._reasoning.append("\n" * self._newlines + body)
            self._newlines, self._thought = 0, True
        self._newlines += len(text) - len(body)
