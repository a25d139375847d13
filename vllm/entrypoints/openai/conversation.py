"""From a client's messages to what chat templates expect: plain dictionaries, arguments as mappings, parts as the template wants them."""

from __future__ import annotations

from typing import Any

import orjson

from vllm.entrypoints.openai.errors import bad_request
from vllm.entrypoints.openai.protocol.chat import Message, MessageToolCall, Tool

_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")


def conversation(messages: list[Message], parts_as_list: bool) -> list[dict[str, Any]]:
    """The messages for the template. Raises APIError for a part that is no text and for arguments that are no object."""
    return [_message(message, f"messages[{i}]", parts_as_list) for i, message in enumerate(messages)]


def tool_dicts(tools: list[Tool] | None) -> list[dict[str, Any]] | None:
    """The tools as the template and the tool parser read them: OpenAI's dictionaries, without what was not sent."""
    return [tool.model_dump(exclude_unset=True) for tool in tools] if tools else None


def _message(message: Message, place: str, parts_as_list: bool) -> dict[str, Any]:
    turn = {name: value for name, value in message.model_dump(exclude_unset=True).items() if value is not None}
    # What developers say to newer models, templates know as the system message.
    turn["role"] = "system" if message.role == "developer" else message.role
    turn["content"] = _content(message, place, parts_as_list)
    reasoning = message.reasoning if message.reasoning is not None else message.reasoning_content
    if reasoning is not None:
        turn["reasoning"] = turn["reasoning_content"] = reasoning
    if message.tool_calls:
        turn["tool_calls"] = [_call(call, f"{place}.tool_calls[{i}]") for i, call in enumerate(message.tool_calls)]
    return turn


def _content(message: Message, place: str, parts_as_list: bool) -> str | list[dict[str, Any]]:
    if message.content is None or isinstance(message.content, str):
        return message.content or ""
    texts = []
    for i, part in enumerate(message.content):
        where = f"{place}.content[{i}]"
        if part.type not in _TEXT_PARTS:
            raise bad_request(f"{where} is of type {part.type!r:.40}: this model is served for text only", where)
        text = getattr(part, "refusal", None) if part.type == "refusal" else part.text
        if not isinstance(text, str):
            raise bad_request(f"{where} has no text", where)
        texts.append(text)
    return [{"type": "text", "text": text} for text in texts] if parts_as_list else "\n".join(texts)


def _call(call: MessageToolCall, place: str) -> dict[str, Any]:
    arguments = call.function.arguments or {}
    if isinstance(arguments, str):
        try:
            arguments = orjson.loads(arguments)
        except orjson.JSONDecodeError as error:
            raise bad_request(f"{place}.function.arguments is not JSON: {error}", place) from None
        if not isinstance(arguments, dict):
            raise bad_request(f"{place}.function.arguments must be a JSON object", place)
    turn = call.model_dump(exclude_none=True)
    turn["function"]["arguments"] = arguments
    return turn
