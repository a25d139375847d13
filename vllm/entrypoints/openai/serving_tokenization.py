"""/tokenize, /detokenize and /tokenizer_info: the tokenizer and the chat template, as the server uses them."""

from __future__ import annotations

from typing import Any

from fastapi import Request
from fastapi.responses import Response

from vllm.entrypoints.openai.body import parse_model, read_json
from vllm.entrypoints.openai.context import ServerContext
from vllm.entrypoints.openai.errors import json_response
from vllm.entrypoints.openai.protocol.tokenize import DetokenizeRequest, TokenizeChatRequest, TokenizeCompletionRequest


class TokenizationServing:
    """The routes, on one server's tokenizer."""

    def __init__(self, context: ServerContext) -> None:
        self.context = context

    async def tokenize(self, http: Request) -> Response:
        """Token ids of a text, or of the prompt that a conversation makes."""
        context, renderer = self.context, self.context.renderer
        body = await read_json(http, context.args.max_body_size)
        is_chat = isinstance(body, dict) and "messages" in body
        request: Any = parse_model(body, TokenizeChatRequest if is_chat else TokenizeCompletionRequest)
        context.check_model(request.model)
        if is_chat:
            prompt = await renderer.chat(request, {})
        else:
            prompt = await renderer.text(request.prompt, request.add_special_tokens)
        strings = renderer.token_strings(prompt.token_ids) if request.return_token_strs else None
        return json_response(
            {
                "count": len(prompt.token_ids),
                "max_model_len": context.max_model_len,
                "tokens": prompt.token_ids,
                "token_strs": strings,
            }
        )

    async def detokenize(self, http: Request) -> Response:
        """The text of token ids."""
        request = parse_model(await read_json(http, self.context.args.max_body_size), DetokenizeRequest)
        self.context.check_model(request.model)
        return json_response({"prompt": await self.context.renderer.decode(request.tokens)})

    async def info(self) -> dict[str, Any]:
        """What tokenizer_config.json says, and the chat template in use."""
        renderer = self.context.renderer
        return {**renderer.tokenizer_settings(), "chat_template": renderer.chat_template}
