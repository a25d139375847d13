"""The engine for an event loop: requests in at any time, outputs out as they come, the core in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

from vllm import envs
from vllm.config import ModelConfig, VllmConfig
from vllm.logger import init_logger
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.engine.core_client import make_core_client
from vllm.v1.engine.exceptions import EngineDeadError, EngineOverloadedError, EngineStalledError
from vllm.v1.engine.input_processor import InputProcessor, ProcessedRequest
from vllm.v1.engine.messages import CallAnswer, EngineCoreInfo, EngineCoreOutputs
from vllm.v1.engine.output_processor import OutputProcessor, RequestState
from vllm.v1.engine.request_stream import Mailbox, RequestStream
from vllm.v1.engine.tokenizer import load_tokenizer
from vllm.v1.engine.vocabulary import load_vocabulary
from vllm.v1.metrics.engine_metrics import EngineMetrics
from vllm.v1.metrics.throughput_log import ThroughputLog
from vllm.v1.structured_output.checker import GrammarChecker

if TYPE_CHECKING:
    from vllm.engine.arg_utils import EngineArgs

logger = init_logger(__name__)

LONG_PROMPT = 8192
"""Prompts of more characters (or token ids) than this are tokenised and checked in a thread, so that streams go on meanwhile."""

SHUTTING_DOWN = "the server is shutting down"
"""Why a request is aborted that did not finish in the time that it had."""

MOST_CONSTRAINTS_IN_CHECK = 256
"""Requests whose constraints wait to be compiled for the first time. Each may take seconds where somebody means harm."""


class AsyncLLM:
    """Input processing, the core and output processing, for one event loop.

    The constructor reads the tokenizer while the engine process begins to load the model; `start` waits until that is ready.
    After `shutdown`, or when the engine has died, everything that would need the core raises EngineDeadError.

    Args:
        config: validated configuration.
        core_class: stands in for EngineCore, in tests and measurements.

    Raises:
        ValueError, FileNotFoundError: the tokenizer or the default sampling parameters cannot be read.
    """

    def __init__(self, config: VllmConfig, *, core_class: type | None = None) -> None:
        envs.warn_unknown()
        self.config = config
        limits = config.scheduler_config
        self.max_num_sequences = limits.max_num_seqs + limits.max_num_queued_requests
        self.dead_error: EngineDeadError | None = None
        self._info: EngineCoreInfo | None = None
        self._draining = False
        self._idle: asyncio.Future[None] | None = None
        self._mailboxes: dict[str, Mailbox] = {}
        self._engine_ids = itertools.count()
        self._call_ids = itertools.count()
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._threads: ThreadPoolExecutor | None = None
        self._client = make_core_client(config, core_class)
        try:
            self._tokenizer = load_tokenizer(config)
            self.input_processor = InputProcessor(config, self._tokenizer)
            self._grammar_checker = GrammarChecker(partial(load_vocabulary, config, self._tokenizer))
            self.metrics = EngineMetrics(config)
            self.output_processor = OutputProcessor(
                self._tokenizer, self.metrics, config.scheduler_config.stream_interval
            )
        except BaseException:
            self._client.shutdown()
            raise
        quiet = config.observability_config.disable_log_stats
        self._throughput = None if quiet else ThroughputLog(self.metrics)

    @classmethod
    def from_engine_args(cls, args: EngineArgs) -> AsyncLLM:
        """An engine from arguments as users give them."""
        return cls(args.create_engine_config())

    # Life and death.

    async def start(self) -> None:
        """Wait until the engine can take requests.

        Raises:
            ValueError, FileNotFoundError: the model cannot be loaded or does not fit, in one line that says what to change.
            EngineDeadError: the engine could not start for any other reason.
        """
        self._loop = asyncio.get_running_loop()
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        # A tokenizer belongs to one thread, so that one gets its own.
        self._long_prompts = self._threads.submit(lambda: InputProcessor(self.config, load_tokenizer(self.config)))
        try:
            self._info = await self._client.start(self._on_outputs, self._on_death)
        except BaseException as error:
            self._die(str(error))
            self.shutdown()
            raise
        self.metrics.engine_is_ready(self._info)

    @property
    def is_running(self) -> bool:
        return self._info is not None and self.dead_error is None

    @property
    def errored(self) -> bool:
        return self.dead_error is not None

    async def check_health(self) -> None:
        """Return if the engine can take requests and gets on with those it has.

        Raises:
            EngineDeadError: it has ended, and why.
            EngineStalledError: it is stopped, or its step takes longer than any step does.
        """
        self._check_alive()
        reason = self._client.why_stalled()
        self._check_alive()  # which may just have shown
        if reason is not None:
            raise EngineStalledError(reason)

    async def drain(self, timeout: float) -> bool:
        """Take no more requests, let those under way finish, and abort what is left after `timeout` seconds.

        Returns:
            Whether all of them finished.
        """
        self._draining = True
        if self.output_processor.has_unfinished_requests and self.is_running:
            self._idle = self._idle or asyncio.get_running_loop().create_future()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(asyncio.shield(self._idle), timeout)
        left = list(self._mailboxes)
        self.abort(left, SHUTTING_DOWN)
        return not left and not self.errored

    def shutdown(self) -> None:
        """End the engine and whatever is under way; takes moments. May be called again, and before `start`."""
        self._die("the engine was shut down")
        self._client.shutdown()
        self._grammar_checker.shutdown()
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    # Requests.

    async def add_request(
        self,
        prompt: Any,
        sampling_params: SamplingParams | None,
        request_id: str,
        *,
        priority: int = 0,
    ) -> RequestStream:
        """Check one prompt, tokenise it and queue it.

        Args:
            prompt: text, token ids, or a dict with `prompt` or `prompt_token_ids`.
            sampling_params: None means the model's defaults.
            request_id: unique among unfinished requests.
            priority: lower goes first under the priority policy.

        Returns:
            Its outputs. Close it (or use `async with`) when no more of them are wanted, or the engine goes on to the end.

        Raises:
            ValueError: the prompt or a parameter is impossible.
            EngineOverloadedError: too many requests are queued, or the engine is being shut down.
            EngineDeadError: there is no engine.
            In each case nothing has been queued.
        """
        params = self.default_sampling_params() if sampling_params is None else sampling_params
        self._check_alive()
        self._check_room(params.n)
        if params.structured_outputs is not None:
            await self._check_constraint(params.structured_outputs)
        request = await self._process(request_id, prompt, params, priority)
        self._check_alive()
        self._check_room(params.n)
        self._info.check_fits(len(request.prompt_token_ids))
        if request_id in self._mailboxes:
            raise ValueError(f"request id {request_id!r} is in use")
        # An id that a caller uses again must not get outputs of its first use, which may be on their way.
        for child in request.children:
            child.request_id = str(next(self._engine_ids))
        self._client.add_requests(request.children)
        state = self.output_processor.add_request(request)
        mailbox = self._mailboxes[request_id] = Mailbox(self._loop)
        self.metrics.queue_length(self.output_processor.num_unfinished_sequences)
        return RequestStream(self, state, mailbox)

    async def generate(
        self,
        prompt: Any,
        sampling_params: SamplingParams | None,
        request_id: str,
        *,
        priority: int = 0,
    ) -> AsyncIterator[RequestOutput]:
        """The outputs of one request, as its `output_kind` says; see `add_request`.

        Closing or cancelling the iterator aborts the request. A DELTA output holds all that came since the one before.
        """
        stream = await self.add_request(prompt, sampling_params, request_id, priority=priority)
        async with stream:
            async for output in stream:
                yield output

    def abort(self, request_id: str | Iterable[str], reason: str | None = None) -> None:
        """Drop requests and everything they hold; unknown ids are ignored.

        Their streams end with finish reason "abort" and `reason` as stop reason.
        """
        request_ids = [request_id] if isinstance(request_id, str) else list(request_id)
        engine_ids = self.output_processor.abort(request_ids, reason=reason)
        if self.is_running:
            self._client.abort_requests(engine_ids)
        for id in request_ids:
            if (mailbox := self._mailboxes.pop(id, None)) is not None:
                mailbox.notify()
        self._after_change()

    def _drop(self, state: RequestState) -> None:
        """Nobody can read a request's outputs any more. May be called from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed, and the engine goes with it
            self._loop.call_soon_threadsafe(lambda: None if state.finished else self.abort(state.request_id))

    @property
    def num_unfinished_requests(self) -> int:
        return len(self._mailboxes)

    # Between the steps.

    async def reset_prefix_cache(self) -> bool:
        """Forget what is cached of prompts, which is nothing in this version. Whether nothing is cached now."""
        return await self._call("reset_prefix_cache")

    async def start_profile(self) -> None:
        """Record what the engine's process does, with torch.profiler, until `stop_profile`. Raises ValueError if it is recorded."""
        await self._call("start_profile")

    async def stop_profile(self) -> str:
        """Write the record down, and return the file's path. Raises ValueError if there is none."""
        return await self._call("stop_profile")

    async def _call(self, method: str) -> Any:
        self._check_alive()
        call_id, answer = next(self._call_ids), self._loop.create_future()
        self._calls[call_id] = answer
        self._client.call(call_id, method)
        return await answer

    def _on_answer(self, answer: CallAnswer) -> None:
        future = self._calls.pop(answer.call_id)
        if future.done():  # whoever asked has gone
            return
        if answer.error is None:
            future.set_result(answer.result)
        else:
            future.set_exception(ValueError(answer.error))

    # What requests are made of.

    @property
    def model_config(self) -> ModelConfig:
        return self.config.model_config

    def get_tokenizer(self) -> Any:
        """The transformers tokenizer of the model. It belongs to the event loop's thread."""
        return self._tokenizer

    def default_sampling_params(self, **changes: Any) -> SamplingParams:
        """What a request gets that names no parameters, with `changes` laid over it."""
        return self.input_processor.default_sampling_params(**changes)

    def _check_alive(self) -> None:
        if self.dead_error is not None:
            raise EngineDeadError(str(self.dead_error))
        if self._info is None:
            raise EngineDeadError("the engine has not been started")

    def _check_room(self, num_sequences: int) -> None:
        if num_sequences > self.max_num_sequences:
            limits = self.config.scheduler_config
            raise ValueError(
                f"n must be at most {self.max_num_sequences}, which is all that may run or wait here (--max-num-seqs "
                f"{limits.max_num_seqs}, --max-num-queued-requests {limits.max_num_queued_requests}); got {num_sequences}"
            )
        if self._draining:
            raise EngineOverloadedError(SHUTTING_DOWN, retry_after=10)
        unfinished = self.output_processor.num_unfinished_sequences
        if unfinished + num_sequences > self.max_num_sequences:
            raise EngineOverloadedError(
                f"{unfinished} sequences run or wait, and at most {self.max_num_sequences} may; try again later"
            )

    async def _check_constraint(self, structured_outputs: StructuredOutputsParams) -> None:
        if self._grammar_checker.num_pending >= MOST_CONSTRAINTS_IN_CHECK:
            raise EngineOverloadedError("too many structured outputs wait to be checked; try again later")
        try:
            await self._grammar_checker.check_async(structured_outputs)
        except ValueError:
            self._check_alive()  # a check that ended with the engine says nothing about the constraint
            raise

    async def _process(self, request_id: str, prompt: Any, params: SamplingParams, priority: int) -> ProcessedRequest:
        arrival_time, tokenised = time.time(), None
        content = (prompt.get("prompt_token_ids") or prompt.get("prompt")) if isinstance(prompt, dict) else prompt
        if isinstance(content, (str, list, tuple)) and len(content) > LONG_PROMPT:
            tokenised = await self._loop.run_in_executor(self._threads, self._tokenise_long, prompt)
        return self.input_processor.process(request_id, prompt, params, priority, arrival_time, tokenised=tokenised)

    def _tokenise_long(self, prompt: Any) -> tuple[str | None, list[int]]:
        return self._long_prompts.result().tokenise(prompt)

    # What the core client reports.

    def _on_outputs(self, message: EngineCoreOutputs) -> None:
        """One step's outputs. Whatever goes wrong is a death: nobody would come again for the outputs behind these."""
        if self.dead_error is not None:
            return
        try:
            self._process_outputs(message)
        except Exception as error:
            logger.exception("The engine's outputs cannot be processed")
            self._on_death(f"its outputs cannot be processed: {type(error).__name__}: {error}")

    def _process_outputs(self, message: EngineCoreOutputs) -> None:
        requests, stopped = self.output_processor.receive(message.outputs)
        self._client.abort_requests(stopped)
        for request in requests:
            mailbox = self._mailboxes[request.request_id]
            if request.finished:
                del self._mailboxes[request.request_id]
            mailbox.notify()
        for answer in message.answers:
            self._on_answer(answer)
        self.metrics.step(message.stats, self.output_processor.num_unfinished_sequences)
        if self._throughput is not None:
            self._throughput.step()
        if self._idle is not None:
            self._after_change()

    def _on_death(self, reason: str) -> None:
        if self.dead_error is None:
            logger.error("The engine is dead: %s", reason)
            self._die(reason)

    def _die(self, reason: str) -> None:
        if self.dead_error is None:
            self.dead_error = EngineDeadError(reason)
        mailboxes, self._mailboxes = self._mailboxes, {}
        self.output_processor.abort(list(mailboxes))
        for mailbox in mailboxes.values():
            mailbox.fail(reason)
        for future in self._calls.values():
            if not future.done():
                future.set_exception(EngineDeadError(reason))
        self._calls.clear()
        self._after_change()

    def _after_change(self) -> None:
        """Requests came or went outside a step."""
        self.metrics.queue_length(self.output_processor.num_unfinished_sequences)
        if self._idle is not None and not self._mailboxes and not self._idle.done():
            self._idle.set_result(None)
