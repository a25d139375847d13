"""/v1/completions: one prompt or several, as text or token ids."""

from __future__ import annotations

from pydantic import Field, model_validator

from vllm.entrypoints.openai.protocol.common import MOST_SEQUENCES, REFUSED, GenerationRequest

DEFAULT_MAX_TOKENS = 16
"""OpenAI's, for requests that do not say."""


class CompletionRequest(GenerationRequest):
    prompt: str | list[int] | list[str] | list[list[int]] = Field(union_mode="left_to_right")
    max_tokens: int | None = Field(DEFAULT_MAX_TOKENS, ge=0, description="0 only together with echo.")
    logprobs: int | None = Field(None, ge=-1)
    echo: bool | None = False
    add_special_tokens: bool = True

    refused = {**REFUSED, "suffix": "write the whole prompt into prompt"}

    @model_validator(mode="after")
    def _consistent(self) -> CompletionRequest:
        if self.prompt in ([], ""):
            raise ValueError("prompt must not be empty")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens must be at least 1, except with echo")
        if self.num_sequences > MOST_SEQUENCES:
            raise ValueError(
                f"prompts times n may be at most {MOST_SEQUENCES}; got {len(self.prompts)} times {self.n or 1}"
            )
        return self

    @property
    def num_sequences(self) -> int:
        return len(self.prompts) * (self.n or 1)

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or token ids."""
        several = isinstance(self.prompt, list) and self.prompt and not isinstance(self.prompt[0], int)
        return list(self.prompt) if several else [self.prompt]
