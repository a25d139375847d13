"""Tool parsers: the calls that an output makes, and the text around them."""

from vllm.tool_parsers.abstract_tool_parser import ToolParser, ToolParserManager
from vllm.tool_parsers.calls import DeltaToolCall, ExtractedToolCalls, ToolCall, ToolDelta

__all__ = ["DeltaToolCall", "ExtractedToolCalls", "ToolCall", "ToolDelta", "ToolParser", "ToolParserManager"]
