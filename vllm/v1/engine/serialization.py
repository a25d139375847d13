"""Messages between the front end and an engine core in another process, as msgpack.

Dataclasses travel as arrays of their fields in order, so nothing is spelled out that both sides know; sampling parameters,
which are mostly defaults and travel once a request, as the fields that are not. Sending and receiving end are the same version.
"""

from __future__ import annotations

import dataclasses
from operator import attrgetter
from typing import Any

import msgspec

from vllm.sampling_params import SamplingParams
from vllm.v1.engine.messages import (
    AbortRequests,
    AddRequests,
    CallAnswer,
    CallCore,
    Command,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    SchedulerStats,
)
from vllm.v1.outputs import TokenLogprobs

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder().decode


def _row_of(kind: type) -> attrgetter:
    return attrgetter(*(f.name for f in dataclasses.fields(kind)))


_logprobs_row = _row_of(TokenLogprobs)
_stats_row = _row_of(SchedulerStats)
_answer_row = _row_of(CallAnswer)
_output_row = attrgetter(
    *("request_id", "new_token_ids", "finish_reason", "stop_reason", "num_cached_tokens", "scheduled_time")
)
_plain_row = attrgetter("finish_reason", "stop_reason", "num_cached_tokens", "scheduled_time")
_PLAIN = (None, None, 0, None)
_TEXT_FIELDS = ("stop", "bad_words")  # the front end's business; the core has bad_words_token_ids
_PARAMS = [(f.name, f.default) for f in dataclasses.fields(SamplingParams) if f.name not in _TEXT_FIELDS]


def encode_outputs(message: EngineCoreOutputs) -> bytes:
    rows: list[Any] = []
    for output in message.outputs:
        if output.new_logprobs or output.new_prompt_logprobs:
            rows.append(
                (
                    *_output_row(output),
                    list(map(_logprobs_row, output.new_logprobs)),
                    list(map(_logprobs_row, output.new_prompt_logprobs)),
                )
            )
        elif _plain_row(output) == _PLAIN:
            rows.append((output.request_id, output.new_token_ids))  # nearly every output
        else:
            rows.append(_output_row(output))
    answers = [_answer_row(answer) for answer in message.answers]
    return _encode((rows, _stats_row(message.stats), *([answers] if answers else [])))


def decode_outputs(data: bytes) -> EngineCoreOutputs:
    rows, stats, *rest = _decode(data)
    answers = [CallAnswer(*row) for row in rest[0]] if rest else []
    return EngineCoreOutputs([_output(*row) for row in rows], SchedulerStats(*stats), answers)


def _output(
    request_id: str,
    new_token_ids: list[int],
    finish_reason: str | None = None,
    stop_reason: int | str | None = None,
    num_cached_tokens: int = 0,
    scheduled_time: float | None = None,
    logprobs: list[list[Any]] = (),
    prompt_logprobs: list[list[Any]] = (),
) -> EngineCoreOutput:
    return EngineCoreOutput(
        request_id,
        new_token_ids,
        finish_reason,
        stop_reason,
        [TokenLogprobs(*row) for row in logprobs],
        [TokenLogprobs(*row) for row in prompt_logprobs],
        num_cached_tokens,
        scheduled_time,
    )


def encode_command(command: Command) -> bytes:
    """Raises ValueError for a request that holds what msgpack cannot carry, such as a number of more than 64 bits."""
    if isinstance(command, AbortRequests):
        return _encode(command.request_ids)
    if isinstance(command, CallCore):
        return _encode({"call_id": command.call_id, "method": command.method})
    rows, previous = [], None
    for request in command.requests:
        token_ids = None if request.prompt_token_ids is previous else request.prompt_token_ids
        previous = request.prompt_token_ids
        params = _changed(request.sampling_params)
        rows.append((request.request_id, token_ids, params, request.arrival_time, request.priority))
    try:
        return _encode(rows)
    except (TypeError, OverflowError, UnicodeEncodeError) as error:
        raise ValueError(f"the engine cannot take a parameter of this request: {error}") from None


def decode_command(data: bytes) -> Command:
    rows = _decode(data)
    if isinstance(rows, dict):
        return CallCore(**rows)
    if rows and isinstance(rows[0], str):
        return AbortRequests(rows)
    requests, token_ids = [], []
    for request_id, own_token_ids, params, arrival_time, priority in rows:
        token_ids = token_ids if own_token_ids is None else own_token_ids  # None: the same prompt again
        params = msgspec.convert(params, SamplingParams)
        requests.append(EngineCoreRequest(request_id, token_ids, params, arrival_time, priority))
    return AddRequests(requests)


def _changed(params: SamplingParams) -> dict[str, Any]:
    values = ((name, getattr(params, name), default) for name, default in _PARAMS)
    return {name: value for name, value, default in values if value != default}
