"""The one place where fields of a request become a constraint on what is generated."""

from __future__ import annotations

from typing import Any

from vllm.entrypoints.openai.errors import bad_request
from vllm.entrypoints.openai.protocol.chat import ChatCompletionRequest
from vllm.entrypoints.openai.protocol.common import GenerationRequest, ResponseFormat, StructuredOutputs
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.structured_output.tool_grammar import tool_call_constraint


def structured_outputs(
    request: GenerationRequest, thinking_ends: str | None = None, tool_call_parser: str | None = None
) -> StructuredOutputsParams | None:
    """What a request asks for; None where it asks for nothing.

    Args:
        thinking_ends: the text before which the model may write what it likes, where it begins with thinking.
        tool_call_parser: the format of the calls that a tool_choice can enforce.

    Raises:
        APIError: it asks for several constraints at once.
        ValueError: it asks for one that cannot be.
    """
    wanted = {
        "structured_outputs": _from_field(request.structured_outputs),
        "response_format": _from_format(request.response_format),
        "tool_choice": _from_tool_choice(request, thinking_ends, tool_call_parser),
    }
    given = [name for name, constraint in wanted.items() if constraint is not None]
    if len(given) > 1:
        raise bad_request(f"{' and '.join(given)} cannot both constrain one answer; send one of them", given[1])
    if not given:
        return None
    constraint = wanted[given[0]]
    if isinstance(constraint, StructuredOutputsParams):
        return constraint
    return StructuredOutputsParams(**constraint, begin_after=thinking_ends)


def _from_field(field: StructuredOutputs | None) -> dict[str, Any] | None:
    return None if field is None else field.model_dump(by_alias=True, exclude_none=True)


def _from_format(field: ResponseFormat | None) -> dict[str, Any] | None:
    if field is None or field.type == "text":
        return None
    if field.type == "json_object":
        return {"json_object": True}
    if field.type == "json_schema":
        return {"json": field.json_schema.json_schema}
    return {"structural_tag": field.model_dump(exclude_none=True)}


def _from_tool_choice(
    request: GenerationRequest, thinking_ends: str | None, tool_call_parser: str | None
) -> StructuredOutputsParams | None:
    """A call that must be made; "auto" and "none" constrain nothing."""
    if not isinstance(request, ChatCompletionRequest) or tool_call_parser is None:
        return None
    parallel = request.parallel_tool_calls is not False
    return tool_call_constraint(
        request.tools or (), request.tool_choice, tool_call_parser, parallel=parallel, begin_after=thinking_ends
    )
