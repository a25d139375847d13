"""/v1/chat/completions: messages, tools, and the request around them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vllm.entrypoints.openai.protocol.common import GenerationRequest, Strict


class _Open(BaseModel):
    """Fields beyond those named reach the chat template as they are."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class ContentPart(_Open):
    type: str
    text: str | None = None


class FunctionCall(_Open):
    name: str = Field(min_length=1)
    arguments: str | dict[str, Any] | None = Field(None, description="A JSON object, or the text of one.")


class MessageToolCall(_Open):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(_Open):
    """One turn. `reasoning` (or `reasoning_content`) is an assistant's earlier thinking."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class FunctionDefinition(_Open):
    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Open):
    type: Literal["function"]
    function: FunctionDefinition


class _FunctionName(Strict):
    name: str


class NamedToolChoice(Strict):
    type: Literal["function"] = "function"
    function: _FunctionName


class TemplateFields(Strict):
    """What decides how messages become a prompt; shared with /tokenize."""

    messages: list[Message] = Field(min_length=1, max_length=10_000)
    tools: Annotated[list[Tool], Field(max_length=1000)] | None = None
    add_generation_prompt: bool = Field(True, description="End the prompt where the assistant's turn begins.")
    continue_final_message: bool = Field(False, description="Let the model go on with the last message.")
    chat_template: str | None = Field(None, description="Needs --trust-request-chat-template.")
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description='Variables, such as {"enable_thinking": false}.'
    )
    add_special_tokens: bool = Field(False, description="Let the tokenizer add its own to what the template wrote.")

    @model_validator(mode="after")
    def _one_ending(self) -> TemplateFields:
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message needs add_generation_prompt: false")
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise ValueError("continue_final_message needs a last message of the assistant's")
        return self


class ChatCompletionRequest(GenerationRequest, TemplateFields):
    max_tokens: int | None = Field(None, ge=1, description="The older name of max_completion_tokens.")
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=-1)
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = True
    include_reasoning: bool = True
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    modalities: list[Literal["text"]] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ChatCompletionRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if isinstance(self.tool_choice, NamedToolChoice):
            name = self.tool_choice.function.name
            if name not in (tool.function.name for tool in self.tools or ()):
                raise ValueError(f"tool_choice names {name!r}, which is not among tools")
        elif self.tool_choice == "required" and not self.tools:
            raise ValueError('tool_choice "required" needs tools')
        return self

    @property
    def offers_tools(self) -> bool:
        """Whether the model may call tools in its answer."""
        return bool(self.tools) and self.tool_choice != "none"
