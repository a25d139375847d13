"""What every route shares: the engine, the flags, and the checks that come before a request is submitted."""

from __future__ import annotations

import uuid
from typing import Any

from vllm.config import VllmConfig
from vllm.entrypoints.openai.cli_args import ServerArgs
from vllm.entrypoints.openai.errors import APIError, bad_request
from vllm.entrypoints.openai.generation import Generation
from vllm.entrypoints.openai.logprobs import TokenNames
from vllm.entrypoints.openai.protocol.common import GenerationRequest
from vllm.entrypoints.openai.renderer import Prompt, Renderer
from vllm.entrypoints.openai.structured_outputs import structured_outputs
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.detokenizer import TokenTable
from vllm.v1.engine.input_processor import load_sampling_defaults

DRAIN_RETRY = 5  # seconds after which a restarted server may be there
MOST_PROMPT_TOKENS = 1 << 24  # of one prompt, counted once for each of its n sequences: each brings its own copy


class ServerContext:
    """One server's engine and settings.

    Args:
        engine: need not be started yet.
        args: the server's flags.

    Raises:
        ValueError, FileNotFoundError: a template, parser or default that cannot be.
    """

    def __init__(self, engine: AsyncLLM, args: ServerArgs) -> None:
        self.engine = engine
        self.args = args
        self.config: VllmConfig = engine.config
        model = self.config.model_config
        self.model_names = model.served_model_names
        self.max_model_len: int = model.max_model_len
        self.reasoning_parser = args.reasoning_parser_class()
        self.tool_parser = args.tool_parser_class()
        self.renderer = Renderer(engine.get_tokenizer(), self.max_model_len, args)
        self.draining = False
        self._tokens = TokenTable(engine.get_tokenizer())
        self._length_has_default = "max_new_tokens" in load_sampling_defaults(model)

    def check_model(self, name: str | None) -> str:
        """The name that answers carry: the first one. Raises APIError 404 for a name that the model does not have."""
        if name is None or name in self.model_names:
            return self.model_names[0]
        served = ", ".join(self.model_names)
        raise APIError(404, f"The model {name!r:.200} does not exist; this server has: {served}", "model")

    def check_accepting(self) -> None:
        """Raise APIError 503 once the server has been told to stop."""
        if self.draining:
            raise APIError(503, "the server is shutting down", retry_after=DRAIN_RETRY)

    def new_generation(self, request: GenerationRequest, prefix: str, header: str | None) -> Generation:
        """The engine's side of a request. Its id is the request's own, else the X-Request-Id header's, else a new one."""
        usable = header and len(header) <= 128 and header.isascii() and header.isprintable()
        own = request.request_id or (header if usable else uuid.uuid4().hex)
        return Generation(self.engine, f"{prefix}-{own}", self.args.enable_log_requests)

    def sampling_params(
        self,
        request: GenerationRequest,
        max_tokens: int | None,
        logprobs: int | None,
        thinking_ends: str | None = None,
        **changes: Any,
    ) -> SamplingParams:
        """The request's parameters over the model's defaults. Raises APIError or ValueError for impossible ones.

        Args:
            max_tokens: None means as many as the context holds, unless the model's defaults say something else.
            logprobs: how many of the likeliest tokens to report.
            thinking_ends: text that ends the thinking with which the output begins, if it does: no constraint holds before it.
            changes: laid over everything else.
        """
        if request.priority and self.config.scheduler_config.scheduling_policy != "priority":
            raise bad_request("priority needs a server with --scheduling-policy priority", "priority")
        values = {**request.sampling_changes(), "logprobs": logprobs}
        if max_tokens is not None or not self._length_has_default:
            values["max_tokens"] = max_tokens
        values["structured_outputs"] = structured_outputs(request, thinking_ends, self.args.tool_call_parser)
        if request.thinking_token_budget not in (None, -1):
            values["thinking_token_ids"] = self._thinking_token_ids(request)
        return self.engine.default_sampling_params(**{**values, **changes})

    def _thinking_token_ids(self, request: GenerationRequest) -> list[int]:
        """What a budget of thinking is counted by. Raises APIError where nobody knows."""
        field = "thinking_token_budget"
        if self.reasoning_parser is None:
            raise bad_request(f"{field} needs a server that was started with --reasoning-parser", field)
        try:
            return self.reasoning_parser.token_ids(self.engine.get_tokenizer(), request.offers_tools)
        except ValueError as error:
            raise bad_request(f"{field} is not possible: {error}", field) from None

    def check_length(self, prompt: Prompt, max_tokens: int | None, n: int = 1) -> None:
        """Raise APIError unless the prompt and `max_tokens` more fit the context, and `n` times the prompt one message."""
        self.renderer.check_length(len(prompt.token_ids), max_tokens)
        if len(prompt.token_ids) * n > MOST_PROMPT_TOKENS:
            raise bad_request(
                f"n times the prompt's {len(prompt.token_ids)} tokens may be at most {MOST_PROMPT_TOKENS}; got n {n}",
                "n",
            )

    def token_names(self, request: GenerationRequest) -> TokenNames:
        return TokenNames(self._tokens, bool(request.return_tokens_as_token_ids))

    def wants_usage(self, request: GenerationRequest) -> tuple[bool, bool]:
        """Whether a stream ends with its usage, and whether every chunk holds the usage so far."""
        options = request.stream_options
        every = bool(options and options.continuous_usage_stats)
        last = bool(options and options.include_usage) or self.args.enable_force_include_usage
        return last, last and every

    def usage(self, prompt_tokens: int, completion_tokens: int, cached_tokens: int | None = None) -> dict[str, Any]:
        """OpenAI's usage object."""
        usage: dict[str, Any] = {
            "prompt_tokens": prompt_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "completion_tokens": completion_tokens,
        }
        if self.args.enable_prompt_tokens_details:
            usage["prompt_tokens_details"] = {"cached_tokens": cached_tokens or 0}
        return usage

    def usage_of(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        """The usage of finished requests."""
        return self.usage(
            sum(len(output.prompt_token_ids) for output in outputs),
            sum(len(completion.token_ids) for output in outputs for completion in output.outputs),
            sum(output.num_cached_tokens or 0 for output in outputs),
        )
