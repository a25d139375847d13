"""Scheduler and fake worker run together, with a ledger of who asked for what and what was delivered."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

from tests.v1.core.sched.fake_worker import FakeWorker, Setup, generate_alone, require
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.messages import EngineCoreOutput, EngineCoreRequest
from vllm.v1.outputs import ModelRunnerOutput, TokenLogprobs
from vllm.v1.request import Request


@dataclass
class Ledger:
    """One submission: what it should get, and what it has got."""

    number: int
    request: Request
    expected_tokens: list[int]
    expected_finish: tuple[str, int | None]
    last_step: int = 0  # by when first come, first served must have finished it
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    num_outputs: int = 0
    finish: tuple[str, int | None] | None = None

    @property
    def total_work(self) -> int:
        return self.request.num_prompt_tokens + len(self.expected_tokens)


class Harness:
    """Drives steps and checks, at every one, order, progress, books and what is delivered.

    Args:
        ahead: how many steps `step` schedules before the results of one are known.
        most_ahead: how many a caller of `begin` may leave without results.
    """

    def __init__(
        self, setup: Setup, scheduler: Scheduler | None = None, ahead: int = 0, most_ahead: int | None = None
    ) -> None:
        self.setup = setup
        self.scheduler = scheduler or setup.make_scheduler()
        self.worker = FakeWorker(setup)
        self.open: dict[str, Ledger] = {}
        self.closed: list[Ledger] = []
        self.num_submitted = 0
        self.num_steps = 0
        self.ahead, self.most_ahead = ahead, ahead if most_ahead is None else most_ahead
        self.pending: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()

    # Requests come and go.

    def add(
        self,
        request_id: str,
        prompt: list[int],
        params: SamplingParams,
        priority: int = 0,
        arrival_time: float | None = None,
    ) -> Ledger:
        arrival_time = float(self.num_submitted) if arrival_time is None else arrival_time
        request = Request.from_engine_core_request(
            EngineCoreRequest(request_id, list(prompt), params, arrival_time, priority)
        )
        tokens, finish_reason, stop_reason = generate_alone(self.setup, prompt, params)
        ledger = Ledger(self.num_submitted, request, tokens, (finish_reason, stop_reason))
        self.scheduler.add_request(request)
        self.open[request_id] = ledger
        self.num_submitted += 1
        # The oldest computes at least one token a step and is never sent back, whoever comes later.
        ledger.last_step = self.num_steps + self._bound()
        return ledger

    def abort(self, *request_ids: str) -> None:
        alive = [request_id for request_id in request_ids if request_id in self.open]
        outputs = self.scheduler.abort_requests(request_ids)
        require([output.request_id for output in outputs] == alive, "aborted others than asked for")
        for output in outputs:
            require(output.finish_reason == "abort" and not output.new_token_ids, "an abort says something else")
            self._deliver(output)

    # Steps. `begin` and `end` are apart so that requests can come and go between them.

    def step(self) -> None:
        self.begin()
        self.end(keep=self.ahead)

    def begin(self) -> None:
        step = self.scheduler.schedule()
        self._check_progress(step)
        result = self.worker.execute(step)
        self.num_steps += 1
        self.pending.append((step, result))
        self._check_order(step)
        self._check_metrics()

    def end(self, keep: int = 0) -> None:
        """Tell the scheduler the results of all steps but the last `keep`."""
        while len(self.pending) > keep:
            self._end_one(*self.pending.popleft())

    def _end_one(self, step: SchedulerOutput, result: ModelRunnerOutput) -> None:
        for output in self.scheduler.update_from_output(step, result):
            self._deliver(output)
        self.scheduler.assert_balanced()

    def drain(self) -> None:
        """Run until everybody has finished, within the number of steps that the scheduler's promise of progress gives."""
        work = self._bound()
        # With priorities the one in front may change with each admission, at most once a request.
        bound = work if self.setup.policy == "fcfs" else work * len(self.open)
        for _ in range(bound):
            if not self.scheduler.has_unfinished_requests:
                break
            self.step()
        self.end()
        require(not self.scheduler.has_unfinished_requests, f"not finished after {bound} steps")
        require(not self.open, "the scheduler is idle but has not answered everybody")
        self.check_idle()

    def check_idle(self) -> None:
        manager = self.scheduler.kv_cache_manager
        self.scheduler.assert_balanced()
        for pool in (manager.block_pool, manager.state_pool):
            require(pool.num_free == pool.num_total, "an idle engine holds something")
            ids = pool.allocate(pool.num_total)
            require(sorted(ids) == list(range(1, pool.num_total + 1)), "a pool has lost or doubled an id")
            pool.free(ids)
        require(self.scheduler.kv_cache_usage == 0.0, "an idle engine reports usage")

    # Checks.

    def _bound(self) -> int:
        """Steps in which all that is open must be done: at each one somebody advances, or waits for results of the steps ahead."""
        return sum(ledger.total_work + self.most_ahead for ledger in self.open.values()) + self.most_ahead

    def _rank(self, ledger: Ledger) -> tuple:
        if self.setup.policy == "fcfs":
            return (ledger.number,)
        return (ledger.request.priority, ledger.request.arrival_time, ledger.number)

    def _check_progress(self, step: SchedulerOutput) -> None:
        if not self.open:
            require(not step.num_scheduled_tokens, "nobody is there, yet somebody is scheduled")
            return
        gone, new = set(step.finished_request_ids), {request.request_id for request in step.new_requests}
        rows = self.worker.rows.keys() - gone | new
        running = [ledger for request_id, ledger in self.open.items() if request_id in rows]
        require(bool(running), "requests wait and nothing runs")
        first = min(running, key=self._rank)
        # It may stand still where its last token is being sampled.
        tokens = self.worker.rows[first.request.request_id].token_ids if first.request.request_id not in new else []
        at_end = len(tokens) - first.request.num_prompt_tokens >= len(first.expected_tokens)
        at_end = at_end and first.request.num_tokens < len(tokens)
        require(at_end or first.request.request_id in step.num_scheduled_tokens, "the first in rank does not advance")

    def _check_order(self, step: SchedulerOutput) -> None:
        waiting = [self._rank(ledger) for request_id, ledger in self.open.items() if request_id not in self.worker.rows]
        admitted = [self._rank(self.open[new.request_id]) for new in step.new_requests]
        require(admitted == sorted(admitted), "admitted out of order")
        require(not admitted or not waiting or admitted[-1] < min(waiting), "admitted over the head of another")
        if self.setup.policy == "fcfs" and waiting:
            running = [self._rank(ledger) for request_id, ledger in self.open.items() if request_id in self.worker.rows]
            require(max(running) < min(waiting), "one that came later runs while one before it waits")

    def _check_metrics(self) -> None:
        scheduler = self.scheduler
        require(scheduler.num_running == len(self.worker.rows), "num_running is wrong")
        require(scheduler.num_waiting == len(self.open) - len(self.worker.rows), "num_waiting is wrong")
        usage = self.worker.num_pages_held / (self.setup.num_blocks - 1)
        require(scheduler.kv_cache_usage == usage, "kv_cache_usage is not what the worker's rows hold")
        require(usage > 0 or not self.worker.rows, "rows without pages")

    def _deliver(self, output: EngineCoreOutput) -> None:
        require(output.request_id in self.open, f"output for {output.request_id}, which is not there")
        ledger = self.open[output.request_id]
        ledger.num_outputs += 1
        ledger.tokens += output.new_token_ids
        ledger.logprobs += output.new_logprobs
        ledger.prompt_logprobs += output.new_prompt_logprobs
        was_admitted = ledger.request.scheduled_time is not None
        require((output.scheduled_time is not None) == (ledger.num_outputs == 1 and was_admitted), "scheduled_time")
        self._check_delivered(ledger)
        if output.finish_reason is not None:
            ledger.finish = (output.finish_reason, output.stop_reason)
            require(ledger.request.finish_reason == output.finish_reason, "request and output differ about the end")
            self.closed.append(self.open.pop(output.request_id))
            self._check_closed(ledger)

    def _check_delivered(self, ledger: Ledger) -> None:
        """Never anything but the next piece of what the request gets when it runs alone."""
        num_prompt, num_tokens = ledger.request.num_prompt_tokens, len(ledger.tokens)
        require(ledger.tokens == ledger.expected_tokens[:num_tokens], "other tokens than when running alone")
        require(ledger.tokens == ledger.request.output_token_ids, "request and deliveries differ")
        scored = [int(entry.logprobs[0]) for entry in ledger.prompt_logprobs]
        require(scored == list(range(1, len(scored) + 1)), "prompt logprobs doubled or left out")
        if ledger.request.sampling_params.logprobs is not None:
            positions = [int(entry.logprobs[0]) for entry in ledger.logprobs]
            require(positions == list(range(num_prompt, num_prompt + num_tokens)), "logprobs do not match the tokens")

    def _check_closed(self, ledger: Ledger) -> None:
        if ledger.finish == ("abort", None):
            return
        in_time = self.setup.policy != "fcfs" or self.num_steps <= ledger.last_step
        require(in_time, f"finished in step {self.num_steps}, later than {ledger.last_step}")
        require(ledger.tokens == ledger.expected_tokens, "ended early or late")
        require(ledger.finish == ledger.expected_finish, f"ended by {ledger.finish}, not {ledger.expected_finish}")
        if ledger.request.sampling_params.prompt_logprobs is not None:
            require(len(ledger.prompt_logprobs) == ledger.request.num_prompt_tokens - 1, "prompt logprobs are missing")


def random_prompt(rng: random.Random, setup: Setup) -> list[int]:
    """Of any length the setup can hold, short ones more often."""
    length = rng.randint(1, rng.choice([min(8, setup.max_prompt_len), setup.max_prompt_len]))
    return [rng.randrange(1000) for _ in range(length)]


def random_params(rng: random.Random) -> SamplingParams:
    max_tokens = rng.choice([None, 1, rng.randint(1, 40)])
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=rng.choice([0, 0, rng.randint(0, max_tokens or 10)]),
        ignore_eos=rng.random() < 0.6,
        stop_token_ids=rng.choice([[], [], [5, 1, 9]]),
        logprobs=rng.choice([None, 0]),
        prompt_logprobs=rng.choice([None, 0]),
    )


def random_setup(rng: random.Random, policy: str, chunked: bool) -> Setup:
    """Small pools, so that requests get into each other's way."""
    max_model_len = rng.randint(6, 48)
    max_num_seqs = rng.randint(1, 6)
    least_budget = max_num_seqs if chunked else max(max_num_seqs, max_model_len)
    return Setup(
        policy=policy,
        chunked=chunked,
        block_size=rng.randint(1, 4),
        num_blocks=1 + rng.randint(2, 24),
        num_slots=1 + rng.randint(1, 7),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=least_budget + rng.randint(0, 12),
        max_model_len=max_model_len,
    )


def storm(harness: Harness, rng: random.Random, num_requests: int) -> None:
    """Requests arrive in bursts, some are aborted before, between and after steps, some ids come back at once."""
    made = 0
    while made < num_requests or harness.open:
        for _ in range(rng.choice([0, 0, 1, 3])):
            if made < num_requests:
                _submit(harness, rng, f"r{made}")
                made += 1
        _maybe_abort(harness, rng)
        harness.begin()
        _maybe_abort(harness, rng)
        harness.end(keep=harness.ahead)
        if made == num_requests and rng.random() < 0.1:
            break
    harness.drain()


def _submit(harness: Harness, rng: random.Random, request_id: str) -> None:
    prompt, params = random_prompt(rng, harness.setup), random_params(rng)
    harness.add(request_id, prompt, params, priority=rng.randint(0, 2), arrival_time=float(rng.randint(0, 5)))


def _maybe_abort(harness: Harness, rng: random.Random) -> None:
    if harness.open and rng.random() < 0.1:
        request_id = rng.choice(list(harness.open))
        harness.abort(request_id, "nobody")
        if rng.random() < 0.5:
            _submit(harness, rng, request_id)
