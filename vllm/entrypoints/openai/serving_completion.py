"""/v1/completions: check -> tokenise -> submit -> answer, whole or as a stream."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from vllm.entrypoints.openai.body import read_request
from vllm.entrypoints.openai.context import ServerContext
from vllm.entrypoints.openai.errors import json_response
from vllm.entrypoints.openai.generation import Generation
from vllm.entrypoints.openai.logprobs import CompletionLogprobs, joined, prompt_logprobs
from vllm.entrypoints.openai.protocol.completion import CompletionRequest
from vllm.entrypoints.openai.renderer import Prompt
from vllm.entrypoints.openai.streaming import ChunkWriter, EventStream, until_disconnect
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import SamplingParams


class CompletionServing:
    """The route, on one server's engine and settings."""

    def __init__(self, context: ServerContext) -> None:
        self.context = context

    async def __call__(self, http: Request) -> Response:
        context = self.context
        context.check_accepting()
        request = await read_request(http, CompletionRequest, context.args.max_body_size)
        model = context.check_model(request.model)
        params = self._params(request)
        prompts = [await self._prompt(request, given) for given in request.prompts]
        for prompt in prompts:
            context.check_length(prompt, request.max_tokens, request.n or 1)

        generation = context.new_generation(request, "cmpl", http.headers.get("x-request-id"))
        answer = _Answer(context, request, model, prompts, generation, params)
        headers = {"X-Request-Id": generation.request_id}
        try:
            for prompt in prompts:
                await generation.submit(prompt, params, request.priority or 0)
            if request.stream:
                return EventStream(answer.events(), generation.close, headers)
            body = await until_disconnect(http.receive, answer.whole())
        except BaseException:
            await generation.close()
            raise
        await generation.close()
        return json_response(body, headers=headers)

    def _params(self, request: CompletionRequest) -> SamplingParams:
        changes: dict[str, Any] = {}
        if request.echo and request.logprobs is not None:
            wanted = (request.logprobs, request.prompt_logprobs or 0)
            changes["prompt_logprobs"] = -1 if -1 in wanted else max(wanted)
        # With echo, max_tokens 0 asks for the prompt alone. The engine makes at least one token, which is then left out.
        max_tokens = 1 if request.max_tokens == 0 else request.max_tokens
        return self.context.sampling_params(request, max_tokens, request.logprobs, **changes)

    async def _prompt(self, request: CompletionRequest, given: str | list[int]) -> Prompt:
        if isinstance(given, str):
            return await self.context.renderer.text(given, request.add_special_tokens)
        self.context.check_length(Prompt(given), None)
        if not request.echo:
            return Prompt(given)
        return Prompt(given, await self.context.renderer.decode(given))


@dataclass(slots=True)
class _Choice:
    """One of the prompts' n completions while it comes in."""

    index: int
    prompt: Prompt
    logprobs: CompletionLogprobs
    started: bool = False
    early: list[CompletionOutput] = field(default_factory=list)  # came before the prompt's log-probabilities


class _Answer:
    """What one request is answered with."""

    def __init__(
        self,
        context: ServerContext,
        request: CompletionRequest,
        model: str,
        prompts: list[Prompt],
        generation: Generation,
        params: SamplingParams,
    ) -> None:
        self._context = context
        self._request = request
        self._generation = generation
        self._n = params.n
        self._prompts = prompts
        self._prompt_only = request.max_tokens == 0
        self._head = {
            "id": generation.request_id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        names = context.token_names(request)
        self._choices = [
            _Choice(i, prompts[i // self._n], CompletionLogprobs(names, params.skip_special_tokens))
            for i in range(self._n * len(prompts))
        ]

    async def whole(self) -> dict[str, Any]:
        """The text_completion object."""
        outputs = await self._generation.finals()
        choices = []
        for number, output in enumerate(outputs):
            for completion in output.outputs:
                choice = self._choices[number * self._n + completion.index]
                choices.append(self._choice(choice, output, completion, whole=True))
        usage = self._context.usage_of(outputs)
        if self._prompt_only:
            usage = {**usage, "completion_tokens": 0, "total_tokens": usage["prompt_tokens"]}
        return {**self._head, "choices": choices, "usage": usage}

    async def events(self) -> AsyncIterator[bytes]:
        """The text_completion events."""
        last_usage, every_usage = self._context.wants_usage(self._request)
        writer = ChunkWriter(self._head)
        prompt_tokens, tokens = sum(len(prompt.token_ids) for prompt in self._prompts), 0
        cached = [0] * len(self._prompts)
        waits = self._request.echo and self._request.logprobs is not None
        scores: dict[int, RequestOutput] = {}  # by prompt, the output that brought its log-probabilities
        async for number, output in self._generation.outputs():
            cached[number] = output.num_cached_tokens or cached[number]
            if output.prompt_logprobs is not None:
                scores[number] = output
            pieces = []
            for completion in self._ready(number, output, waits and number not in scores):
                tokens += 0 if self._prompt_only else len(completion.token_ids)
                choice = self._choices[number * self._n + completion.index]
                chunk = self._choice(choice, scores.get(number, output), completion, whole=False)
                usage = self._context.usage(prompt_tokens, tokens, sum(cached)) if every_usage else None
                # A token tells a reader something even while it has no text: when it came.
                made = completion.token_ids and not self._prompt_only
                if made or chunk["text"] or chunk["finish_reason"] or chunk["logprobs"]:
                    pieces.append(writer.choice(chunk, usage))
            if pieces:
                yield b"".join(pieces)
        if last_usage:
            yield writer.usage(self._context.usage(prompt_tokens, tokens, sum(cached)))

    def _ready(self, number: int, output: RequestOutput, wait: bool) -> list[CompletionOutput]:
        """What of the prompt's completions can be sent: with `wait` nothing yet, else also what had to wait before."""
        mine = self._choices[number * self._n : (number + 1) * self._n]
        if wait:
            for completion in output.outputs:
                mine[completion.index].early.append(completion)
            return []
        ready = [completion for choice in mine for completion in choice.early]
        for choice in mine:
            choice.early.clear()
        return [*ready, *output.outputs]

    def _choice(
        self, choice: _Choice, output: RequestOutput, completion: CompletionOutput, whole: bool
    ) -> dict[str, Any]:
        """A choice of the answer, or of a chunk; the first one of each holds the prompt, where it is echoed."""
        request, first = self._request, not choice.started
        choice.started = True
        text, token_ids, positions = completion.text, completion.token_ids, completion.logprobs
        finish_reason, stop_reason = completion.finish_reason, completion.stop_reason
        if self._prompt_only:
            text, token_ids, positions = "", [], [] if positions is not None else None
            finish_reason, stop_reason = finish_reason and "length", None
        logprobs = None
        if request.logprobs is not None and positions is not None:
            scored = None
            if request.echo and first:
                scored = choice.logprobs.prompt(output.prompt_token_ids, output.prompt_logprobs or [])
            logprobs = joined(scored, choice.logprobs.output(token_ids, positions))
        if request.echo and first:
            text = (choice.prompt.text or "") + text
        result = {
            "index": choice.index,
            "text": text,
            "logprobs": logprobs if logprobs and logprobs["tokens"] else None,
            "finish_reason": finish_reason,
            "stop_reason": stop_reason,
        }
        if whole and request.prompt_logprobs is not None:
            result["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs)
        if request.return_token_ids:
            result["token_ids"] = token_ids
            result["prompt_token_ids"] = output.prompt_token_ids if first else None
        return result
