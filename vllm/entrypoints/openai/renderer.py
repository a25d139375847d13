"""Prompts: the chat template and the tokenizer, in a thread of their own, so that a long prompt delays nobody's tokens."""

from __future__ import annotations

import asyncio
import copy
import inspect
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from jinja2 import TemplateError, TemplateSyntaxError

from vllm.entrypoints.openai.cli_args import ServerArgs
from vllm.entrypoints.openai.conversation import conversation, tool_dicts
from vllm.entrypoints.openai.errors import bad_request
from vllm.entrypoints.openai.protocol.chat import TemplateFields

Result = TypeVar("Result")

# What a template may raise depends on the template and on the messages it is given.
_TEMPLATE_ERRORS = (
    TemplateError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    NotImplementedError,
)
_MOST_COMPOSED = 3
"""Characters that Unicode normalisation may make one of, before the tokenizer counts them."""


@dataclass(slots=True, frozen=True)
class Prompt:
    """Ready for the engine. `text` is None where the client sent token ids."""

    token_ids: list[int]
    text: str | None = None

    def for_engine(self) -> dict[str, Any]:
        return {"prompt": self.text, "prompt_token_ids": self.token_ids}


class Renderer:
    """Renders and tokenises, one piece of work after the other.

    Args:
        tokenizer: of transformers; a copy is used, because threads may not share one.
        max_model_len: longest prompt plus output, in tokens.
        args: the template, its default variables, and whether requests may bring their own.

    Raises:
        ValueError: the template cannot be compiled.
    """

    def __init__(self, tokenizer: Any, max_model_len: int, args: ServerArgs) -> None:
        self.max_model_len = max_model_len
        self._tokenizer = copy.deepcopy(tokenizer)
        self._tokenizer.model_max_length = 1 << 62  # the limit is checked here, without the tokenizer's warning
        self._template = args.chat_template_text()
        self._defaults = args.default_chat_template_kwargs
        self._trusted = args.trust_request_chat_template
        self._reserved = {*inspect.signature(self._tokenizer.apply_chat_template).parameters, "messages"} - {"kwargs"}
        self._most_chars = max_model_len * max(map(len, self._tokenizer.get_vocab())) * _MOST_COMPOSED
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="renderer")
        if unknown := self._reserved & self._defaults.keys():
            raise ValueError(f"--default-chat-template-kwargs: {', '.join(sorted(unknown))} cannot be set")
        wanted = args.chat_template_content_format
        reads_parts = self._template_reads_parts()
        self._parts_as_list = reads_parts if wanted == "auto" else wanted == "openai"

    @property
    def chat_template(self) -> str | None:
        """The template in use, where there is one."""
        return self._template or self._tokenizer.chat_template

    def tokenizer_settings(self) -> dict[str, Any]:
        """What the tokenizer was made with; special tokens as their text."""
        settings = {"tokenizer_class": type(self._tokenizer).__name__, **self._tokenizer.init_kwargs}
        return json.loads(json.dumps(settings, default=str, skipkeys=True))

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def chat(self, request: TemplateFields, variables: dict[str, Any], with_tools: bool = True) -> Prompt:
        """The prompt that a conversation makes. Raises APIError where the template refuses it."""
        return await self._run(self._chat, request, variables, with_tools)

    async def text(self, text: str, add_special_tokens: bool = True) -> Prompt:
        """A prompt that is plain text. Raises APIError where it is far longer than the context."""
        return await self._run(self._encode, text, add_special_tokens)

    async def decode(self, token_ids: list[int]) -> str:
        """The text of token ids, special ones too. Raises APIError for ids that the tokenizer does not have."""
        return await self._run(self._decode, token_ids)

    def token_strings(self, token_ids: list[int]) -> list[str]:
        """Each token as the vocabulary spells it."""
        return self._tokenizer.convert_ids_to_tokens(token_ids)

    def check_length(self, num_tokens: int, max_tokens: int | None) -> None:
        """Raise APIError unless a prompt of so many tokens leaves room for `max_tokens` (None: for one)."""
        limit = self.max_model_len
        if num_tokens + (max_tokens or 1) <= limit:
            return
        asked = f" and max_tokens is {max_tokens}" if max_tokens and num_tokens < limit else ""
        raise bad_request(
            f"This model's maximum context length is {limit} tokens, but the prompt has {num_tokens} tokens{asked}; "
            f"shorten the prompt{' or ask for less' if asked else ''}",
            "max_tokens" if asked else "prompt",
        )

    async def _run(self, work: Callable[..., Result], *args: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *args)

    def _chat(self, request: TemplateFields, variables: dict[str, Any], with_tools: bool) -> Prompt:
        variables = {**self._defaults, **variables, **(request.chat_template_kwargs or {})}
        if taken := self._reserved & variables.keys():
            raise bad_request(
                f"chat_template_kwargs may not hold {', '.join(sorted(taken))}: these have fields of their own",
                "chat_template_kwargs",
            )
        if request.chat_template is not None and not self._trusted:
            raise bad_request(
                "chat_template is refused: the server takes templates from requests only with --trust-request-chat-template",
                "chat_template",
            )
        messages = conversation(request.messages, self._parts_as_list)
        try:
            text = self._tokenizer.apply_chat_template(
                messages,
                tools=tool_dicts(request.tools) if with_tools else None,
                chat_template=request.chat_template or self._template,
                add_generation_prompt=request.add_generation_prompt,
                continue_final_message=request.continue_final_message,
                tokenize=False,
                **variables,
            )
        except _TEMPLATE_ERRORS as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise bad_request(f"the chat template refuses these messages: {reason}", "messages") from None
        return self._encode(text, request.add_special_tokens)

    def _encode(self, text: str, add_special_tokens: bool) -> Prompt:
        if len(text) > self._most_chars:
            raise bad_request(
                f"This model's maximum context length is {self.max_model_len} tokens, but the prompt has {len(text)} "
                "characters, which cannot fit; shorten it",
                "prompt",
            )
        return Prompt(self._tokenizer.encode(text, add_special_tokens=add_special_tokens), text)

    def _decode(self, token_ids: list[int]) -> str:
        most = len(self._tokenizer)
        for token_id in token_ids:
            if not 0 <= token_id < most:
                raise bad_request(f"tokens must hold ids from 0 to {most - 1}; got {token_id}", "tokens")
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)

    def _template_reads_parts(self) -> bool:
        """Whether a message of several parts may be given to the template as a list: found out by trying."""
        if self.chat_template is None:
            return False
        probe = [{"role": "user", "content": [{"type": "text", "text": "first"}, {"type": "text", "text": "second"}]}]
        try:
            text = self._tokenizer.apply_chat_template(probe, chat_template=self._template, tokenize=False)
        except TemplateSyntaxError as error:
            where = (
                f"--chat-template, line {error.lineno}"
                if self._template
                else f"the model's chat template, line {error.lineno}"
            )
            raise ValueError(f"{where}: {error.message}") from None
        except _TEMPLATE_ERRORS:
            return False
        return "first" in text and "second" in text and "'text'" not in text
