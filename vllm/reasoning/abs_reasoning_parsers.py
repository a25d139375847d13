"""What a reasoning parser is: it splits what a model wrote into its thinking and its answer, as the text arrives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from vllm.reasoning.registry import ParserManager


class ReasoningParser(ABC):
    """Splits ONE output into reasoning and content. Feed it every delta, then finish it; then throw it away.

    `thinking` says whether the prompt left a thinking block open, so that the output begins inside it. `calls_end_reasoning`
    says whether a tool call that begins inside the block ends it: right where tools were offered; otherwise the marker is only
    a word that the model thinks about.
    """

    start_marker: ClassVar[str]
    end_marker: ClassVar[str]
    call_marker: ClassVar[str | None] = None

    def __init__(self, thinking: bool = True, calls_end_reasoning: bool = True) -> None:
        self.thinking = thinking
        self.calls_end_reasoning = calls_end_reasoning

    @classmethod
    def prompt_opens_thinking(cls, prompt: str) -> bool:
        """Whether a rendered prompt ends inside a thinking block: the truth about `thinking`, whatever the template's defaults."""
        return prompt.rstrip().endswith(cls.start_marker)

    @classmethod
    def token_ids(cls, tokenizer: Any, calls_end_reasoning: bool = True) -> list[int]:
        """The start marker's token, the end marker's, and with `calls_end_reasoning` the call marker's if it is one token.

        Args:
            tokenizer: of transformers.

        Raises:
            ValueError: the start or the end marker is no single token of this tokenizer's.
        """
        markers = (
            cls.start_marker,
            cls.end_marker,
            *([cls.call_marker] if calls_end_reasoning and cls.call_marker else []),
        )
        # A marker that is no token gives None, or the id of the tokenizer's unknown token.
        ids = [tokenizer.convert_tokens_to_ids(marker) for marker in markers]
        found = [i is not None and tokenizer.convert_ids_to_tokens(i) == marker for i, marker in zip(ids, markers)]
        if not all(found[:2]):
            missing = " and no token ".join(marker for marker, known in zip(markers[:2], found) if not known)
            raise ValueError(f"the model's tokenizer has no token {missing}")
        return [i for i, known in zip(ids, found) if known]

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
