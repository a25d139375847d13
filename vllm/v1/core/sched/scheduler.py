"""Who runs in the next step, with which pages and which state slot; and what the step's results mean for each request.

One order rules everything: the policy's rank (request_queue.py). Waiting requests are admitted in it, running ones claim
pages in it, and whoever stands last in it gives way when pages run out. The first of the running requests is therefore
never preempted and advances in every step, so every request gets its turn.

Counts decide and token values do not matter, so a step may be scheduled before the results of the one before it are known: a
decoding sequence is given the token that is still being sampled. Whether it ends there shows too late for that step, whose
result is then dropped.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.core.sched.request_queue import RequestQueue
from vllm.v1.engine.messages import EngineCoreOutput, SchedulerStats
from vllm.v1.request import Request, RequestStatus

if TYPE_CHECKING:
    from vllm.config.scheduler import SchedulerConfig
    from vllm.v1.outputs import ModelRunnerOutput, TokenLogprobs
    from vllm.v1.structured_output.constraint import Constraint


@dataclass(slots=True)
class _Row:
    """One request's part in a step whose results are not known yet."""

    request: Request
    start: int  # tokens computed before
    num_tokens: int
    samples: bool  # it computes the last token that is known or under way
    num_preemptions: int  # of the request when it was scheduled: after another one its results mean nothing


@dataclass(slots=True)
class _Step:
    """One step in the making."""

    token_budget: int
    rows: list[tuple[Request, int]] = field(default_factory=list)  # who computes how many tokens
    new_requests: list[Request] = field(default_factory=list)
    new_block_ids: dict[str, list[int]] = field(default_factory=dict)

    def add_row(self, request: Request, num_tokens: int) -> None:
        self.rows.append((request, num_tokens))
        self.token_budget -= num_tokens


class Scheduler:
    """Continuous batching with chunked prefill, and preemption by recomputing.

    Call `schedule`, run what it returns on the worker, call `update_from_output` with each step's results in the steps' order;
    requests may be added or aborted, and further steps scheduled, between any two of these calls. Every `SchedulerOutput` must reach the worker, in order, even one without tokens: the worker
    learns only there which rows to forget.

    Args:
        num_blocks: pages of attention keys and values, the padding page 0 among them.
        num_slots: slots of GDN state, the padding slot 0 among them.
        eos_token_ids: the model's end-of-sequence tokens.
    """

    def __init__(
        self,
        scheduler_config: SchedulerConfig,
        block_size: int,
        num_blocks: int,
        num_slots: int,
        max_model_len: int,
        eos_token_ids: frozenset[int],
    ) -> None:
        self.config = scheduler_config
        self.max_model_len = max_model_len
        self.eos_token_ids = eos_token_ids
        self.kv_cache_manager = KVCacheManager(num_blocks, block_size, num_slots)
        # The last token of a sequence is never computed, so a sequence may be one token longer than the pages have places.
        # Ending it there keeps what a request gets independent of who runs beside it.
        self.max_sequence_len = min(max_model_len, self.kv_cache_manager.block_pool.num_token_places + 1)
        self.requests: dict[str, Request] = {}
        self.waiting = RequestQueue(scheduler_config.scheduling_policy)
        self.running = RequestQueue(scheduler_config.scheduling_policy)
        self.num_preemptions = 0
        self._queue_numbers = count()
        self._row_ids_to_forget: list[str] = []
        self._step_ids = count(1)
        self._under_way: dict[int, list[_Row]] = {}  # rows of the steps whose results are to come

    # What the engine asks and tells between steps.

    def can_ever_fit(self, num_tokens: int) -> bool:
        """Whether a prompt of this length could be admitted if it had the device to itself."""
        return num_tokens <= self.max_model_len and self.kv_cache_manager.can_ever_fit(num_tokens)

    def add_request(self, request: Request) -> None:
        """Queue a request. Its prompt has at least one token and passes `can_ever_fit`, and its id is not in use."""
        if request.request_id in self.requests:
            raise ValueError(f"request {request.request_id} exists already")
        if not request.prompt_token_ids:
            raise ValueError(f"request {request.request_id} has an empty prompt")
        if not self.can_ever_fit(request.num_prompt_tokens):
            raise ValueError(
                f"request {request.request_id} has {request.num_prompt_tokens} prompt tokens; at most "
                f"{min(self.max_model_len, self.kv_cache_manager.block_pool.num_token_places)} fit"
            )
        request.queue_number = next(self._queue_numbers)
        self.requests[request.request_id] = request
        self.waiting.add(request)

    def abort_requests(self, request_ids: Iterable[str]) -> list[EngineCoreOutput]:
        """End requests at once and return their last outputs; ids that are unknown or finished are passed over."""
        outputs = []
        for request_id in request_ids:
            request = self.requests.get(request_id)
            if request is not None:
                self._finish(request, RequestStatus.FINISHED_ABORTED)
                outputs.append(self._make_output(request, [], [], []))
        return outputs

    @property
    def has_unfinished_requests(self) -> bool:
        return bool(self.requests)

    @property
    def num_running(self) -> int:
        return len(self.running)

    @property
    def must_know_tokens(self) -> bool:
        """Whether some running request cannot be scheduled before its last token is known, as where its text must have a form."""
        return any(request.must_know_tokens for request in self.running)

    @property
    def num_waiting(self) -> int:
        """Requests without a place on the device, preempted ones among them."""
        return len(self.waiting)

    @property
    def kv_cache_usage(self) -> float:
        """Share of the pages in use, 0 to 1."""
        return self.kv_cache_manager.usage

    def stats(self) -> SchedulerStats:
        """Where things stand now, for the metrics."""
        return SchedulerStats(
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            kv_cache_usage=self.kv_cache_usage,
            num_preemptions=self.num_preemptions,
        )

    def assert_balanced(self) -> None:
        """Raise if a page or slot is lost. Cheap enough for every time the engine falls idle."""
        self.kv_cache_manager.assert_balanced()
        if self.kv_cache_manager.state_pool.num_used != len(self.running):
            raise RuntimeError(
                f"{self.kv_cache_manager.state_pool.num_used} state slots in use by {len(self.running)} running requests"
            )

    # One step: counts decide, token values do not matter.

    def schedule(self) -> SchedulerOutput:
        """Decide the next step: decoding sequences, then the rest of begun prompts, then new ones."""
        step = _Step(self.config.max_num_batched_tokens)
        self._claim_pages(step)
        self._continue_running(step)
        self._admit_waiting(step)
        if self.waiting and not self.running:
            raise RuntimeError(f"nothing runs, yet request {self.waiting.first.request_id} cannot be admitted")
        return self._seal(step)

    def _claim_pages(self, step: _Step) -> None:
        """Give each running request the pages for its next tokens, the first in rank first, at the cost of the last.

        Who gives way here does not come back in the same step: it needs all the pages it gave up, and one of them is taken.
        """
        for request in list(self.running):
            if request.status is not RequestStatus.RUNNING:
                continue  # it has given way to one before it
            while (block_ids := self.kv_cache_manager.allocate(request, self._num_next_tokens(request))) is None:
                victim = self.running.last
                self._preempt(victim)
                if victim is request:
                    break
            if block_ids:
                step.new_block_ids[request.request_id] = block_ids

    def _continue_running(self, step: _Step) -> None:
        """One token for every decoding sequence, then as much of a begun prompt as the budget holds.

        There is at most one begun prompt, because nobody is admitted behind one that uses up the budget; and it always
        advances, because the budget is at least max_num_seqs.
        """
        waiting_for = [(request, self._num_next_tokens(request)) for request in self.running]
        decoding = [(request, n) for request, n in waiting_for if n == 1]
        prefilling = [(request, n) for request, n in waiting_for if n > 1]
        for request, num_tokens in decoding + prefilling:
            num_tokens = min(num_tokens, step.token_budget)
            if num_tokens > 0:
                step.add_row(request, num_tokens)

    def _num_next_tokens(self, request: Request) -> int:
        """Tokens that a running request has to compute: known ones, else the one under way unless its end is certain."""
        if request.num_uncomputed_tokens > 0:
            return request.num_uncomputed_tokens
        if request.must_know_tokens:
            return 0
        max_tokens, under_way = request.sampling_params.max_tokens, request.num_under_way
        at_end = max_tokens is not None and request.num_output_tokens + under_way >= max_tokens
        return 0 if at_end or request.num_tokens + under_way >= self.max_sequence_len else 1

    def _admit_waiting(self, step: _Step) -> None:
        """Admit in rank order until tokens, rows, pages or slots run out. Nobody overtakes a request that does not fit.

        A request is admitted with pages for all of its tokens, so no prompt gets stuck half-way; and with one page to
        spare for each request that runs and may need one, because without it the very next steps would preempt what was admitted.
        """
        growing: int | None = None  # counted when it is first needed
        while self.waiting and step.token_budget > 0 and len(self.running) < self.config.max_num_seqs:
            request = self.waiting.first
            num_tokens = request.num_uncomputed_tokens
            if num_tokens > step.token_budget and not self.config.enable_chunked_prefill:
                return
            if growing is None:
                growing = sum(map(self._may_grow, self.running))
            if self.kv_cache_manager.allocate(request, num_tokens, keep_free=growing) is None:
                return
            self._start(request)
            growing += self._may_grow(request)
            step.new_requests.append(request)
            step.add_row(request, min(num_tokens, step.token_budget))

    def _may_grow(self, request: Request) -> bool:
        """Whether a running request may need more pages than it holds. Its last token is never computed."""
        longest, max_tokens = self.max_sequence_len, request.sampling_params.max_tokens
        if max_tokens is not None:
            longest = min(longest, request.num_prompt_tokens + max_tokens)
        return not self.kv_cache_manager.holds_room_for(request, longest - 1)

    def _start(self, request: Request) -> None:
        self.waiting.remove(request)
        self.running.add(request)
        request.status = RequestStatus.RUNNING
        if request.scheduled_time is None:
            request.scheduled_time = time.time()

    def _preempt(self, request: Request) -> None:
        """Send a running request back to the queue. It will be computed anew from its prompt and its output so far."""
        self._leave_running(request)
        request.status = RequestStatus.PREEMPTED
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        self.waiting.add(request)
        self.num_preemptions += 1

    def _leave_running(self, request: Request) -> None:
        self.running.remove(request)
        self.kv_cache_manager.free(request)
        self._row_ids_to_forget.append(request.request_id)

    def _seal(self, step: _Step) -> SchedulerOutput:
        """Write the step down for the worker, rows of the decode kind first, and count its tokens as computed."""
        # The last chunk of a prompt may be a single token; to the worker it is a decode row like any other.
        is_decode = [num_tokens == 1 and request.num_computed_tokens > 0 for request, num_tokens in step.rows]
        decode_rows = [row for row, decode in zip(step.rows, is_decode) if decode]
        other_rows = [row for row, decode in zip(step.rows, is_decode) if not decode]
        output = SchedulerOutput(
            num_scheduled_tokens={request.request_id: num_tokens for request, num_tokens in decode_rows + other_rows},
            new_requests=[self._describe(request) for request in step.new_requests],
            new_block_ids=step.new_block_ids,
            finished_request_ids=self._row_ids_to_forget,
            step_id=next(self._step_ids),
        )
        self._row_ids_to_forget = []
        self._under_way[output.step_id] = rows = []
        for request, num_tokens in decode_rows + other_rows:
            start = request.num_computed_tokens
            request.num_computed_tokens += num_tokens
            samples = request.num_uncomputed_tokens <= 0
            rows.append(_Row(request, start, num_tokens, samples, request.num_preemptions))
        return output

    def _describe(self, request: Request) -> NewRequestData:
        return NewRequestData(
            request_id=request.request_id,
            token_ids=request.all_token_ids,
            num_prompt_tokens=request.num_prompt_tokens,
            sampling_params=request.sampling_params,
            block_ids=self.kv_cache_manager.block_ids(request),
            state_slot=self.kv_cache_manager.state_slot(request),
            num_computed_tokens=request.num_computed_tokens,
        )

    # What came of it.

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_output: ModelRunnerOutput
    ) -> list[EngineCoreOutput]:
        """Add a step's tokens to their requests, end those that are done, and say what is new."""
        outputs = []
        for row in self._under_way.pop(scheduler_output.step_id):
            request, request_id = row.request, row.request.request_id
            # Ended or sent back since the step was scheduled. Its id may even be in use again, by another request.
            if request.status is not RequestStatus.RUNNING or request.num_preemptions != row.num_preemptions:
                continue
            prompt_logprobs = self._take_prompt_logprobs(row, model_output)
            new_token_ids = self._take_tokens(row, model_output.sampled_token_ids.get(request_id, []))
            if new_token_ids or prompt_logprobs:
                logprobs = model_output.logprobs.get(request_id, [])[: len(new_token_ids)]
                outputs.append(self._make_output(request, new_token_ids, logprobs, prompt_logprobs))
        return outputs

    def _take_tokens(self, row: _Row, token_ids: list[int]) -> list[int]:
        """Append sampled tokens up to the first that ends the request, and return those appended."""
        request = row.request
        if bool(token_ids) != row.samples:
            raise RuntimeError(
                f"the worker sampled {len(token_ids)} tokens for request {request.request_id} in a step that computed "
                f"{row.start + row.num_tokens} of its {request.num_tokens} tokens"
            )
        for num_taken, token_id in enumerate(token_ids, 1):
            request.output_token_ids.append(token_id)
            status = self._status_after(request, token_id)
            if request.constraint is not None:
                status = _status_under_constraint(request.constraint, token_id, status)
            if status is not RequestStatus.RUNNING:
                self._finish(request, status)
                return token_ids[:num_taken]
        return token_ids

    def _status_after(self, request: Request, token_id: int) -> RequestStatus:
        """Whether the token just appended ends the request. A token that both stops it and fills it up stops it."""
        params = request.sampling_params
        if request.num_output_tokens >= params.min_tokens:
            if token_id in self.eos_token_ids and not params.ignore_eos:
                return RequestStatus.FINISHED_STOPPED
            if token_id in params.stop_token_ids:
                request.stop_reason = token_id
                return RequestStatus.FINISHED_STOPPED
        if params.max_tokens is not None and request.num_output_tokens >= params.max_tokens:
            return RequestStatus.FINISHED_LENGTH_CAPPED
        if request.num_tokens >= self.max_sequence_len:
            return RequestStatus.FINISHED_LENGTH_CAPPED
        return RequestStatus.RUNNING

    def _take_prompt_logprobs(self, row: _Row, model_output: ModelRunnerOutput) -> list[TokenLogprobs]:
        """The chunk's prompt log-probabilities, less those that were delivered before the request was preempted."""
        request = row.request
        logprobs = model_output.prompt_logprobs.get(request.request_id)
        if not logprobs:
            return []
        # A chunk that starts at position s scores the tokens from s + 1 on; token 0 is never scored.
        fresh = logprobs[max(0, request.num_prompt_logprobs_delivered - row.start) :]
        request.num_prompt_logprobs_delivered += len(fresh)
        return fresh

    def _finish(self, request: Request, status: RequestStatus) -> None:
        if request.status is RequestStatus.RUNNING:
            self._leave_running(request)
        else:
            self.waiting.remove(request)
        request.status = status
        del self.requests[request.request_id]

    def _make_output(
        self,
        request: Request,
        new_token_ids: list[int],
        new_logprobs: list[TokenLogprobs],
        new_prompt_logprobs: list[TokenLogprobs],
    ) -> EngineCoreOutput:
        output = EngineCoreOutput(
            request_id=request.request_id,
            new_token_ids=new_token_ids,
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
            new_logprobs=new_logprobs,
            new_prompt_logprobs=new_prompt_logprobs,
            scheduled_time=None if request.has_output else request.scheduled_time,
        )
        request.has_output = True
        return output


def _status_under_constraint(constraint: Constraint, token_id: int, status: RequestStatus) -> RequestStatus:
    """A text that is complete has ended, also with ignore_eos or before min_tokens; one that cannot go on is aborted."""
    if not constraint.accept(token_id):
        return RequestStatus.FINISHED_ABORTED
    return RequestStatus.FINISHED_STOPPED if constraint.is_done else status
