"""What a reasoning parser is: it splits what a model wrote into its thinking and its answer, as the text arrives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from vllm.reasoning.registry import ParserManager


class ReasoningParser(ABC):
    """Splits ONE output into reasoning and content. Feed it every delta, then finish it; then throw it away.

    `thinking` says whether the prompt left a thinking block open, so that the output begins inside it. `calls_end_reasoning`
    says whether a tool call that begins inside the block ends it: right where tools were offered; otherwise the marker is only
    a word that the model thinks about.
    """

    start_marker: ClassVar[str]
    end_marker: ClassVar[str]

    def __init__(self, thinking: bool = True, calls_end_reasoning: bool = True) -> None:
        self.thinking = thinking
        self.calls_end_reasoning = calls_end_reasoning

    @classmethod
    def prompt_opens_thinking(cls, prompt: str) -> bool:
        """Whether a rendered prompt ends inside a thinking block: the truth about `thinking`, whatever the template's defaults."""
        return prompt.rstrip().endswith(cls.start_marker)

    @property
    @abstractmethod
    def in_reasoning(self) -> bool:
        """Whether the text so far ends inside the thinking block."""

    @property
    @abstractmethod
    def ended_by_call(self) -> bool:
        """Whether a tool call ended the block before the model closed it."""

    @abstractmethod
    def feed(self, delta: str) -> tuple[str, str]:
        """The reasoning and the content that `delta` has settled; either may be empty."""

    @abstractmethod
    def finish(self) -> tuple[str, str]:
        """What was held back, now that the output is over."""

    def extract_reasoning(self, text: str) -> tuple[str | None, str | None]:
        """(reasoning, content) of a whole output; None for a part that is empty. Leaves this parser's own state alone."""
        twin = type(self)(self.thinking, self.calls_end_reasoning)
        reasoning, content = zip(twin.feed(text), twin.finish())
        return "".join(reasoning) or None, "".join(content) or None


class ReasoningParserManager(ParserManager):
    """The values of --reasoning-parser."""

    kind = "reasoning parser"
    _known: ClassVar[dict[str, type | str]] = {
        "qwen3": "vllm.reasoning.qwen3_reasoning_parser:Qwen3ReasoningParser",
    }

    @classmethod
    def get_reasoning_parser(cls, name: str) -> type[ReasoningParser]:
        """The class of that name. Raises ValueError, listing the names there are, for any other."""
        return cls._get(name)
