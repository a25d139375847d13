"""/tokenize and /detokenize."""

from __future__ import annotations

from pydantic import Field

from vllm.entrypoints.openai.protocol.chat import TemplateFields
from vllm.entrypoints.openai.protocol.common import Strict


class TokenizeCompletionRequest(Strict):
    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool | None = False


class TokenizeChatRequest(TemplateFields):
    model: str | None = None
    return_token_strs: bool | None = False


class DetokenizeRequest(Strict):
    model: str | None = None
    tokens: list[int] = Field(description="Token ids.")
