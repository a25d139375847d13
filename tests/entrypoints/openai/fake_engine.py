"""The application around an engine that is not there, for what can be seen without one: no process, no model."""

import asyncio

import httpx

from tests.entrypoints.openai.server import TINY
from vllm.config import ModelConfig, VllmConfig
from vllm.entrypoints.openai.api_server import build_app
from vllm.entrypoints.openai.cli_args import ServerArgs
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.tokenizer import load_tokenizer

CONFIG = VllmConfig.create(ModelConfig(model=str(TINY), served_model_name="tiny"), device="cpu")


class FakeEngine:
    """Every request is answered with `texts`, one output each; an exception among them is raised there.

    Args:
        texts: strings and exceptions.
        refuses: raised by add_request.
    """

    def __init__(self, *texts, refuses=None, config=CONFIG):
        self.config, self.texts, self.refuses = config, texts, refuses
        self.dead = None
        self.requests = []
        self.open = 0
        self._tokenizer = load_tokenizer(config)
        self._processor = InputProcessor(config, self._tokenizer)

    def get_tokenizer(self):
        return self._tokenizer

    def default_sampling_params(self, **changes):
        return self._processor.default_sampling_params(**changes)

    async def check_health(self):
        if self.dead:
            raise self.dead

    @property
    def num_unfinished_requests(self):
        return self.open

    async def add_request(self, prompt, sampling_params, request_id, *, priority=0):
        if self.refuses:
            raise self.refuses
        self.requests.append((prompt, sampling_params, request_id, priority))
        self.open += 1
        return FakeStream(self, request_id, prompt["prompt_token_ids"])


class FakeStream:
    """An output "abort" or "abort REASON" is the end of a request that was dropped."""

    def __init__(self, engine, request_id, token_ids):
        self._engine, self._request_id, self._token_ids = engine, request_id, token_ids
        self._texts = list(engine.texts)
        self._closed = False

    def __aiter__(self):
        return self

    async def __anext__(self):
        if not self._texts:
            raise StopAsyncIteration
        await asyncio.sleep(0)
        text = self._texts.pop(0)
        if isinstance(text, Exception):
            raise text
        last = not self._texts
        completion = CompletionOutput(0, text, [5], finish_reason="stop" if last else None)
        if text.startswith("abort"):
            completion.finish_reason, completion.stop_reason = "abort", text[6:] or None
        return RequestOutput(self._request_id, None, self._token_ids, None, [completion], last)

    async def aclose(self):
        self._engine.open -= not self._closed
        self._closed = True


def ask(app, method, path, **options):
    """One request to the application; what it raises inside does not come through."""

    async def send():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
            return await http.request(method, path, **options)

    return asyncio.run(send())


def app_of(engine=None, **args):
    return build_app(engine or FakeEngine("46"), ServerArgs(**args))
