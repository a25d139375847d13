"""/v1/chat/completions: check -> render -> submit -> answer, whole or as a stream."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from vllm.entrypoints.openai.body import read_request
from vllm.entrypoints.openai.context import ServerContext
from vllm.entrypoints.openai.conversation import tool_dicts
from vllm.entrypoints.openai.errors import bad_request, json_response
from vllm.entrypoints.openai.generation import Generation
from vllm.entrypoints.openai.logprobs import Candidates, chat_logprobs, prompt_logprobs
from vllm.entrypoints.openai.protocol.chat import ChatCompletionRequest
from vllm.entrypoints.openai.renderer import Prompt
from vllm.entrypoints.openai.streaming import ChunkWriter, EventStream, until_disconnect
from vllm.outputs import CompletionOutput
from vllm.reasoning.output_parser import ChatDelta, ChatOutputParser
from vllm.tool_parsers.calls import DeltaToolCall, join_calls


class ChatServing:
    """The route, on one server's engine and settings."""

    def __init__(self, context: ServerContext) -> None:
        self.context = context

    async def __call__(self, http: Request) -> Response:
        context = self.context
        context.check_accepting()
        request = await read_request(http, ChatCompletionRequest, context.args.max_body_size)
        model = context.check_model(request.model)
        self._check_tools(request)
        prompt = await context.renderer.chat(request, _effort(request), with_tools=self._shows_tools(request))
        max_tokens = request.max_completion_tokens or request.max_tokens
        context.check_length(prompt, max_tokens, request.n or 1)
        top = (request.top_logprobs or 0) if request.logprobs else None
        thinking = self._thinks(prompt)
        thinking_ends = context.reasoning_parser.end_marker if thinking else None
        params = context.sampling_params(request, max_tokens, top, thinking_ends)

        generation = context.new_generation(request, "chatcmpl", http.headers.get("x-request-id"))
        answer = _Answer(context, request, model, prompt, generation, params.n, thinking)
        headers = {"X-Request-Id": generation.request_id}
        try:
            await generation.submit(prompt, params, request.priority or 0)
            if request.stream:
                return EventStream(answer.events(), generation.close, headers)
            body = await until_disconnect(http.receive, answer.whole())
        except BaseException:
            await generation.close()
            raise
        await generation.close()
        return json_response(body, headers=headers)

    def _check_tools(self, request: ChatCompletionRequest) -> None:
        """Tools need a parser, or a call would come back as text."""
        if not request.offers_tools:
            return
        args = self.context.args
        missing = [] if args.tool_call_parser else ["--tool-call-parser"]
        if request.tool_choice in (None, "auto") and not args.enable_auto_tool_choice:
            missing.insert(0, "--enable-auto-tool-choice")
        if missing:
            raise bad_request(
                f'tools need a server that was started with {" and ".join(missing)} (or send tool_choice "none")',
                "tools",
            )

    def _thinks(self, prompt: Prompt) -> bool:
        """Whether the output begins with thinking, which a parser will take out."""
        parser = self.context.reasoning_parser
        return parser is not None and parser.prompt_opens_thinking(prompt.text)

    def _shows_tools(self, request: ChatCompletionRequest) -> bool:
        return request.offers_tools or not self.context.args.exclude_tools_when_tool_choice_none


def _effort(request: ChatCompletionRequest) -> dict[str, Any]:
    """What reasoning_effort means to a template: a variable of that name, and "none" also turns thinking off."""
    effort = request.reasoning_effort
    if effort is None:
        return {}
    return {"reasoning_effort": effort, **({"enable_thinking": False} if effort == "none" else {})}


@dataclass(slots=True)
class _Choice:
    """One of the n messages while it comes in."""

    index: int
    parser: ChatOutputParser | None
    started: bool = False
    # What belongs to text that a parser holds back: it goes out with the text.
    logprobs: list[Candidates] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)


class _Answer:
    """What one request is answered with."""

    def __init__(
        self,
        context: ServerContext,
        request: ChatCompletionRequest,
        model: str,
        prompt: Prompt,
        generation: Generation,
        n: int,
        thinking: bool,
    ) -> None:
        self._context = context
        self._request = request
        self._prompt = prompt
        self._generation = generation
        self._names = context.token_names(request)
        self._head = {"id": generation.request_id, "created": int(time.time()), "model": model}
        self._choices = [_Choice(i, self._parser(thinking)) for i in range(n)]

    async def whole(self) -> dict[str, Any]:
        """The chat.completion object."""
        outputs = await self._generation.finals()
        (output,) = outputs
        body = {
            **self._head,
            "object": "chat.completion",
            "choices": [self._message(completion) for completion in output.outputs],
            "usage": self._context.usage_of(outputs),
        }
        if self._request.prompt_logprobs is not None:
            body["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs)
        if self._request.return_token_ids:
            body["prompt_token_ids"] = output.prompt_token_ids
        return body

    async def events(self) -> AsyncIterator[bytes]:
        """The chat.completion.chunk events."""
        last_usage, every_usage = self._context.wants_usage(self._request)
        writer = ChunkWriter({**self._head, "object": "chat.completion.chunk"})
        prompt_tokens, tokens, cached = len(self._prompt.token_ids), 0, 0
        async for _, output in self._generation.outputs():
            pieces = []
            for completion in output.outputs:
                tokens += len(completion.token_ids)
                usage = self._context.usage(prompt_tokens, tokens, output.num_cached_tokens) if every_usage else None
                choice = self._choices[completion.index]
                if not choice.started:
                    choice.started = True
                    pieces.append(self._first(writer, choice, usage))
                chunk = self._chunk(choice, completion)
                if chunk is not None:
                    pieces.append(writer.choice(chunk, usage))
            cached = output.num_cached_tokens or cached
            if pieces:
                yield b"".join(pieces)
        if last_usage:
            yield writer.usage(self._context.usage(prompt_tokens, tokens, cached))

    def _parser(self, thinking: bool) -> ChatOutputParser | None:
        """None where the output's text is the message's content."""
        context, request = self._context, self._request
        reasoning = context.reasoning_parser
        tools = context.tool_parser if request.offers_tools else None
        if reasoning is None and tools is None:
            return None
        return ChatOutputParser(reasoning, tools, tool_dicts(request.tools) if tools else None, thinking)

    def _message(self, completion: CompletionOutput) -> dict[str, Any]:
        """A choice of a whole answer, from the same parse that a stream makes."""
        choice = self._choices[completion.index]
        delta = self._parse(choice, completion)
        message: dict[str, Any] = {"role": "assistant", "content": delta.content or None}
        if not delta.content and not delta.reasoning and not delta.tool_calls:
            message["content"] = ""
        if self._context.reasoning_parser:
            message["reasoning"] = delta.reasoning or None
        if delta.tool_calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in join_calls(delta.tool_calls)
            ]
        result = {
            "index": completion.index,
            "message": message,
            "logprobs": self._logprobs(completion.logprobs),
            "finish_reason": _finish_reason(choice, completion),
            "stop_reason": completion.stop_reason,
        }
        if self._request.return_token_ids:
            result["token_ids"] = completion.token_ids
        return result

    def _first(self, writer: ChunkWriter, choice: _Choice, usage: dict[str, Any] | None) -> bytes:
        chunk = {"index": choice.index, "delta": {"role": "assistant", "content": ""}, "logprobs": None}
        extra = {"prompt_token_ids": self._prompt.token_ids} if self._request.return_token_ids else None
        return writer.choice({**chunk, "finish_reason": None}, usage, extra)

    def _chunk(self, choice: _Choice, completion: CompletionOutput) -> dict[str, Any] | None:
        """The choice of the next chunk; None where nothing is settled yet."""
        delta = self._parse(choice, completion)
        if completion.logprobs:
            choice.logprobs += completion.logprobs
        if self._request.return_token_ids:
            choice.token_ids += completion.token_ids
        finish_reason = _finish_reason(choice, completion)
        # Without a parser that may be waiting for more, a token without text (half a letter) tells a reader when it came.
        silent = not delta and finish_reason is None
        if silent and (choice.parser is not None or not completion.token_ids):
            return None
        chunk: dict[str, Any] = {
            "index": choice.index,
            "delta": {"content": ""} if silent else _delta(delta),
            "logprobs": None,
        }
        if choice.logprobs:
            chunk["logprobs"] = self._logprobs(choice.logprobs)
            choice.logprobs = []
        chunk["finish_reason"] = finish_reason
        if finish_reason is not None:
            chunk["stop_reason"] = completion.stop_reason
        if self._request.return_token_ids:
            chunk["token_ids"], choice.token_ids = choice.token_ids, []
        return chunk

    def _parse(self, choice: _Choice, completion: CompletionOutput) -> ChatDelta:
        """What the new text says, less what the client does not want."""
        if choice.parser is None:
            return ChatDelta(content=completion.text)
        delta = choice.parser.feed(completion.text)
        if completion.finished:
            rest = choice.parser.finish()
            calls = delta.tool_calls + rest.tool_calls
            delta = ChatDelta(delta.reasoning + rest.reasoning, delta.content + rest.content, calls)
        if self._request.parallel_tool_calls is False:
            delta.tool_calls = [call for call in delta.tool_calls if call.index == 0]
        if not self._request.include_reasoning:
            delta.reasoning = ""
        return delta

    def _logprobs(self, positions: list[Candidates] | None) -> dict[str, Any] | None:
        if not self._request.logprobs or positions is None:
            return None
        return {"content": chat_logprobs(positions, self._names, self._request.top_logprobs or 0)}


def _delta(delta: ChatDelta) -> dict[str, Any]:
    result: dict[str, Any] = {}
    if delta.reasoning:
        result["reasoning"] = delta.reasoning
    if delta.content:
        result["content"] = delta.content
    if delta.tool_calls:
        result["tool_calls"] = [_call_piece(piece) for piece in delta.tool_calls]
    return result


def _call_piece(piece: DeltaToolCall) -> dict[str, Any]:
    """The first piece of a call names it; the others only go on with its arguments."""
    if piece.name is None:
        return {"index": piece.index, "function": {"arguments": piece.arguments}}
    function = {"name": piece.name, "arguments": piece.arguments}
    return {"index": piece.index, "id": piece.id, "type": "function", "function": function}


def _finish_reason(choice: _Choice, completion: CompletionOutput) -> str | None:
    if completion.finish_reason == "stop" and choice.parser and choice.parser.call_count:
        return "tool_calls"
    return completion.finish_reason
