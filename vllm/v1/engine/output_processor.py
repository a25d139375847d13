"""From the engine's tokens to what callers read: text, stop strings, log-probabilities, n sequences in one output."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.detokenizer import Detokenizer, TokenTable
from vllm.v1.engine.input_processor import ProcessedRequest
from vllm.v1.engine.messages import EngineCoreOutput
from vllm.v1.outputs import TokenLogprobs

if TYPE_CHECKING:
    from vllm.v1.metrics.engine_metrics import EngineMetrics


@dataclass(slots=True, eq=False)
class _Sequence:
    """One of a request's n sequences."""

    index: int
    engine_id: str
    request: RequestState
    detokenizer: Detokenizer
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    num_delivered: int = 0  # tokens that a DELTA output has carried
    num_told: int = 0  # tokens when the request was last said to have news
    last_token_time: float | None = None
    has_news: bool = False  # since the request's last output was taken


@dataclass(slots=True, eq=False)
class RequestState:
    """A caller's request between `add_request` and its last output."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    metrics: RequestMetrics
    sequences: list[_Sequence] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    prompt_logprobs_delivered: bool = False
    num_cached_tokens: int | None = None
    num_unfinished: int = 0  # sequences
    news: list[_Sequence] = field(default_factory=list)  # sequences with something that no output has carried

    @property
    def finished(self) -> bool:
        return self.num_unfinished == 0


class OutputProcessor:
    """Keeps the unfinished requests' texts. Never waits, so an event loop may call it.

    Args:
        tokenizer: of transformers, byte-level; None gives token ids without text.
        metrics: where tokens and finished requests are recorded.
        stream_interval: tokens of a sequence that make it worth telling, after the first and before the end.
    """

    def __init__(self, tokenizer: Any | None, metrics: EngineMetrics | None = None, stream_interval: int = 1) -> None:
        self._interval = stream_interval
        self._table = None if tokenizer is None else TokenTable(tokenizer)
        self._metrics = metrics
        self._requests: dict[str, RequestState] = {}
        self._sequences: dict[str, _Sequence] = {}  # by the engine's id, unfinished ones only

    @property
    def num_unfinished_requests(self) -> int:
        return len(self._requests)

    @property
    def has_unfinished_requests(self) -> bool:
        return bool(self._requests)

    @property
    def num_unfinished_sequences(self) -> int:
        return len(self._sequences)

    def add_request(self, request: ProcessedRequest) -> RequestState:
        """Expect outputs for a request. Raises ValueError where its id, or one of its sequences', is in use."""
        children, params = request.children, request.sampling_params
        if request.request_id in self._requests or any(child.request_id in self._sequences for child in children):
            raise ValueError(f"request id {request.request_id!r} is in use")
        metrics = RequestMetrics(arrival_time=request.arrival_time)
        state = RequestState(request.request_id, request.prompt, request.prompt_token_ids, params, metrics)
        if params.prompt_logprobs is not None:
            state.prompt_logprobs = [None]
        for i, child in enumerate(children):
            sequence = _Sequence(i, child.request_id, state, Detokenizer(self._table, child.sampling_params))
            if params.logprobs is not None:
                sequence.logprobs, sequence.cumulative_logprob = [], 0.0
            state.sequences.append(sequence)
            self._sequences[child.request_id] = sequence
        state.num_unfinished = len(children)
        self._requests[request.request_id] = state
        return state

    def process(
        self, outputs: Iterable[EngineCoreOutput], now: float | None = None
    ) -> tuple[list[RequestOutput], list[str]]:
        """Take in one step of the engine, and make the outputs that it gives.

        Returns:
            What there is to tell callers, and the engine's ids of sequences that a stop string ended and the engine must abort.
        """
        requests, stopped = self.receive(outputs, now)
        return [self.take(request) for request in requests], stopped

    def receive(
        self, outputs: Iterable[EngineCoreOutput], now: float | None = None
    ) -> tuple[list[RequestState], list[str]]:
        """Take in one step of the engine; `take` makes outputs of it, at once or any number of steps later.

        Args:
            outputs: at most one a sequence; those of sequences that are unknown (aborted meanwhile) are passed over.
            now: seconds, time.time(); default: now.

        Returns:
            The requests that have something new to tell, and the engine's ids of sequences that a stop string ended and the
            engine must abort.
        """
        now = time.time() if now is None else now
        stopped: list[str] = []
        told: dict[str, RequestState] = {}
        for output in outputs:
            sequence = self._sequences.get(output.request_id)
            if sequence is None:
                continue
            self._take_in(sequence, output, now)
            request = sequence.request
            if sequence.finish_reason is not None:
                if output.finish_reason is None:
                    stopped.append(output.request_id)
                self._finish(sequence, now)
            elif not output.new_token_ids:
                continue
            if not sequence.has_news:
                sequence.has_news = True
                request.news.append(sequence)
            if request.num_unfinished == 0 or self._is_worth_telling(sequence):
                sequence.num_told = len(sequence.token_ids)
                told[request.request_id] = request
        return list(told.values()), stopped

    def _is_worth_telling(self, sequence: _Sequence) -> bool:
        if sequence.request.params.output_kind is RequestOutputKind.FINAL_ONLY:
            return False
        is_first_or_last = not sequence.num_told or sequence.finish_reason is not None
        return is_first_or_last or len(sequence.token_ids) - sequence.num_told >= self._interval

    def take(self, request: RequestState) -> RequestOutput:
        """What there is to tell of a request since the last time, in one output."""
        news, request.news = request.news, []
        for sequence in news:
            sequence.has_news = False
        return _request_output(request, news, request.finished)

    def abort(self, request_ids: Iterable[str], now: float | None = None, reason: str | None = None) -> list[str]:
        """Forget requests, by the ids that callers gave; unknown ones are ignored. `reason` becomes their stop reason.

        Returns:
            The engine's ids of their unfinished sequences.
        """
        now = time.time() if now is None else now
        engine_ids = []
        for request_id in request_ids:
            request = self._requests.get(request_id)
            for sequence in request.sequences if request else ():
                if sequence.finish_reason is None:
                    engine_ids.append(sequence.engine_id)
                    sequence.detokenizer.finish()
                    sequence.finish_reason, sequence.stop_reason = "abort", reason
                    self._finish(sequence, now)
                    if not sequence.has_news:
                        sequence.has_news = True
                        request.news.append(sequence)
        return engine_ids

    def _finish(self, sequence: _Sequence, now: float) -> None:
        request = sequence.request
        del self._sequences[sequence.engine_id]
        request.num_unfinished -= 1
        if request.num_unfinished:
            return
        request.metrics.finished_time = now
        del self._requests[request.request_id]
        if self._metrics is not None:
            last = max((s.last_token_time for s in request.sequences if s.last_token_time is not None), default=None)
            self._metrics.request_finished(
                sequence.finish_reason,
                request.metrics,
                last,
                len(request.prompt_token_ids),
                [len(s.token_ids) for s in request.sequences],
            )

    def _take_in(self, sequence: _Sequence, output: EngineCoreOutput, now: float) -> None:
        request, metrics = sequence.request, sequence.request.metrics
        if metrics.first_scheduled_time is None:
            metrics.first_scheduled_time = output.scheduled_time
        if output.new_token_ids:
            self._time_tokens(sequence, len(output.new_token_ids), now)
        if request.num_cached_tokens is None:
            request.num_cached_tokens = output.num_cached_tokens
        if request.prompt_logprobs is not None:
            request.prompt_logprobs += [self._logprobs(request.params, item) for item in output.new_prompt_logprobs]

        stop_string = self._add_tokens(sequence, output)
        if output.finish_reason is not None and stop_string is None:
            stop_string = sequence.detokenizer.finish()
        sequence.finish_reason, sequence.stop_reason = output.finish_reason, output.stop_reason
        if stop_string is not None:
            sequence.finish_reason, sequence.stop_reason = "stop", stop_string

    def _time_tokens(self, sequence: _Sequence, num_tokens: int, now: float) -> None:
        request, recorder = sequence.request, self._metrics
        if request.metrics.first_token_time is None:
            request.metrics.first_token_time = now
            if recorder is not None:
                recorder.first_token(len(request.prompt_token_ids), now - request.metrics.arrival_time)
        if recorder is not None:
            recorder.generation_tokens += num_tokens
            if sequence.last_token_time is not None:
                recorder.inter_token_latency.observe(now - sequence.last_token_time)
        sequence.last_token_time = now

    def _add_tokens(self, sequence: _Sequence, output: EngineCoreOutput) -> str | None:
        """Add tokens up to the one that completes a stop string, and return that string."""
        params = sequence.request.params
        last = len(output.new_token_ids) - 1
        for i, token_id in enumerate(output.new_token_ids):
            sequence.token_ids.append(token_id)
            if sequence.logprobs is not None and i < len(output.new_logprobs):
                sequence.logprobs.append(self._logprobs(params, output.new_logprobs[i]))
                sequence.cumulative_logprob += output.new_logprobs[i].logprobs[0]
            ended_here = i == last and output.finish_reason == "stop"
            silent = ended_here and not params.include_stop_str_in_output
            stop_string = sequence.detokenizer.push(token_id, silent=silent)
            if stop_string is not None:
                return stop_string
        return None

    def _logprobs(self, params: SamplingParams, item: TokenLogprobs) -> dict[int, Logprob]:
        """The token that stands there first, then the likeliest, each once."""
        table = self._table if params.detokenize else None
        ranks = [item.rank, *range(1, len(item.token_ids))]
        result: dict[int, Logprob] = {}
        for token_id, logprob, rank in zip(item.token_ids, item.logprobs, ranks):
            if token_id not in result:
                result[token_id] = Logprob(logprob, rank, None if table is None else table.text_of(token_id))
        return result


def _request_output(request: RequestState, news: list[_Sequence], finished: bool) -> RequestOutput:
    """All sequences so far, in order; for DELTA what is new of those with news."""
    prompt_logprobs = request.prompt_logprobs
    if prompt_logprobs is not None and len(prompt_logprobs) < len(request.prompt_token_ids):
        prompt_logprobs = None  # not complete yet: another child's prompt was done first
    if request.params.output_kind is RequestOutputKind.DELTA:
        completions = [_delta(sequence) for sequence in news]
        if prompt_logprobs is not None:
            prompt_logprobs = None if request.prompt_logprobs_delivered else prompt_logprobs
            request.prompt_logprobs_delivered = True
    else:
        completions = [_completion(sequence) for sequence in request.sequences]
    return RequestOutput(
        request_id=request.request_id,
        prompt=request.prompt,
        prompt_token_ids=request.prompt_token_ids,
        prompt_logprobs=prompt_logprobs,
        outputs=completions,
        finished=finished,
        metrics=request.metrics,
        num_cached_tokens=request.num_cached_tokens,
    )


def _completion(sequence: _Sequence) -> CompletionOutput:
    return CompletionOutput(
        index=sequence.index,
        text=sequence.detokenizer.text,
        token_ids=list(sequence.token_ids),
        cumulative_logprob=sequence.cumulative_logprob,
        logprobs=None if sequence.logprobs is None else list(sequence.logprobs),
        finish_reason=sequence.finish_reason,
        stop_reason=sequence.stop_reason,
    )


def _delta(sequence: _Sequence) -> CompletionOutput:
    start, sequence.num_delivered = sequence.num_delivered, len(sequence.token_ids)
    return CompletionOutput(
        index=sequence.index,
        text=sequence.detokenizer.take(),
        token_ids=sequence.token_ids[start:],
        cumulative_logprob=sequence.cumulative_logprob,
        logprobs=None if sequence.logprobs is None else sequence.logprobs[start:],
        finish_reason=sequence.finish_reason,
        stop_reason=sequence.stop_reason,
    )
