"""`qwen3_xml`: the format and the reader of `qwen3_coder`, with string values sent while they are being written.

Good for tools that take long texts, such as a file to write: the client sees it grow. The price is paid where the output ends in
the middle of a value (max_tokens, for one): what has been sent cannot be taken back, so the value stays in the arguments as far as
it came, and only `finish_reason` "length" says that it is not whole. Everything else is as in `qwen3_coder`.
"""

from __future__ import annotations

from vllm.tool_parsers.qwen3coder_tool_parser import Qwen3CoderToolParser


class Qwen3XMLToolParser(Qwen3CoderToolParser):
    """See the module. Values that are strings whatever they say (declared so, or not declared) are sent as they come."""

    stream_strings = True
