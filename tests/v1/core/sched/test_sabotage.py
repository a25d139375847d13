"""Each check of the harness can fail: a scheduler with one deliberate fault is caught, and by the check meant for it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.v1.core.sched.harness import Harness, random_setup, storm
from vllm.sampling_params import SamplingParams
from vllm.v1.core import kv_cache_manager
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched import request_queue
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.state_pool import StatePool
from vllm.v1.request import Request, RequestStatus


class LeakyPool(BlockPool):
    def free(self, ids: list[int]) -> None:
        super().free(ids[:-1])


class SilentlyLeakyPool(BlockPool):
    """Loses a page without leaving it marked as used."""

    def free(self, ids: list[int]) -> None:
        super().free(ids)
        self._free.pop()


class GenerousPool(BlockPool):
    """Gives the same page to two."""

    def allocate(self, count: int) -> list[int]:
        ids = super().allocate(count)
        return [max(1, i - 1) for i in ids]


class PaddingPool(BlockPool):
    """Hands out page 0."""

    def allocate(self, count: int) -> list[int]:
        return [0 if i == 1 else i for i in super().allocate(count)]


class OneSlotPool(StatePool):
    """Puts everybody in slot 1, and keeps books that look right."""

    def allocate(self, count: int) -> list[int]:
        super().allocate(count)
        return [1] * count

    def free(self, ids: list[int]) -> None:
        super().free([self._in_use.rindex(1)])


class StingyManager(KVCacheManager):
    """One page too few."""

    def allocate(self, request: Request, num_new_tokens: int, keep_free: int = 0) -> list[int] | None:
        return super().allocate(request, max(0, num_new_tokens - 1), keep_free)


class SlotKeeper(KVCacheManager):
    def free(self, request: Request) -> None:
        self.block_pool.free(self._holdings.pop(request.request_id).block_ids)


class FreesTwice(KVCacheManager):
    def free(self, request: Request) -> None:
        block_ids = self.block_ids(request)
        super().free(request)
        self.block_pool.free(block_ids)


class KeepsCount(Scheduler):
    """Resumes a preempted request where it was, though its pages are gone."""

    def _preempt(self, request: Request) -> None:
        num_computed = request.num_computed_tokens
        super()._preempt(request)
        request.num_computed_tokens = num_computed


class TellsNobody(Scheduler):
    """The worker never hears that a row is gone."""

    def _leave_running(self, request: Request) -> None:
        super()._leave_running(request)
        self._row_ids_to_forget.clear()


class TellsTwice(Scheduler):
    def _leave_running(self, request: Request) -> None:
        super()._leave_running(request)
        self._row_ids_to_forget.append(request.request_id)


class PrefillsFirst(Scheduler):
    def _seal(self, step):
        output = super()._seal(step)
        output.num_scheduled_tokens = dict(reversed(output.num_scheduled_tokens.items()))
        return output


class Overspends(Scheduler):
    def _admit_waiting(self, step) -> None:
        step.token_budget += 1
        super()._admit_waiting(step)


class Overcrowds(Scheduler):
    def _admit_waiting(self, step) -> None:
        honest = self.config
        self.config = replace(honest, max_num_seqs=honest.max_num_seqs + 1, max_num_batched_tokens=1000)
        super()._admit_waiting(step)
        self.config = honest


class ForgetsOutput(Scheduler):
    """Resumes a preempted request from its prompt alone."""

    def _describe(self, request: Request):
        new = super()._describe(request)
        new.token_ids = new.token_ids[: new.num_prompt_tokens]
        return new


class RepeatsPromptLogprobs(Scheduler):
    def _take_prompt_logprobs(self, row, model_output):
        return model_output.prompt_logprobs.get(row.request.request_id, [])


class LosesPromptLogprobs(Scheduler):
    def _take_prompt_logprobs(self, row, model_output):
        return super()._take_prompt_logprobs(row, model_output)[1:]


class SkipsTheFirst(Scheduler):
    """Lets the first in rank stand still now and then."""

    def _continue_running(self, step) -> None:
        super()._continue_running(step)
        if len(step.rows) > 1:
            del step.rows[0]


class StopsTooSoon(Scheduler):
    """Does not know min_tokens."""

    def _status_after(self, request: Request, token_id: int) -> RequestStatus:
        if token_id in self.eos_token_ids and not request.sampling_params.ignore_eos:
            return RequestStatus.FINISHED_STOPPED
        return super()._status_after(request, token_id)


class RunsOn(Scheduler):
    """Generates one token more than asked for."""

    def _status_after(self, request: Request, token_id: int) -> RequestStatus:
        status = super()._status_after(request, token_id)
        at_the_end = request.num_output_tokens == request.sampling_params.max_tokens
        return RequestStatus.RUNNING if at_the_end else status


class IgnoresStopIds(Scheduler):
    def add_request(self, request: Request) -> None:
        request.sampling_params.stop_token_ids = []
        super().add_request(request)


class IgnoresAborts(Scheduler):
    """Takes a result for an id that has been aborted and used again."""

    def update_from_output(self, scheduler_output, model_output):
        for request_id in scheduler_output.num_scheduled_tokens:
            if request_id in self.requests:
                self.requests[request_id].status = RequestStatus.RUNNING
        return super().update_from_output(scheduler_output, model_output)


class SilentAboutAdmission(Scheduler):
    def _make_output(self, *args):
        output = super()._make_output(*args)
        output.scheduled_time = None
        return output


class AdmitsNobody(Scheduler):
    def _admit_waiting(self, step) -> None:
        if len(self.requests) < 3:
            super()._admit_waiting(step)


def catch(policy: str = "fcfs", kind: type[Scheduler] = Scheduler, chunked: bool = True) -> str:
    """What the harness says in a series of storms; empty when it has noticed nothing."""
    for seed in range(60):
        rng = random.Random(seed)
        setup = random_setup(rng, policy, chunked)
        try:
            storm(Harness(setup, setup.make_scheduler(kind)), rng, num_requests=25)
        except (AssertionError, RuntimeError, ValueError, KeyError, IndexError) as fault:
            return str(fault)
    return ""


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_an_honest_scheduler_is_not_caught(policy: str) -> None:
    assert catch(policy) == ""


@pytest.mark.parametrize(
    ("pool", "name", "said"),
    [
        (LeakyPool, "BlockPool", "are in use"),
        (SilentlyLeakyPool, "BlockPool", "out of balance"),
        (GenerousPool, "BlockPool", "share a page|has a page twice"),
        (PaddingPool, "BlockPool", "no such page"),
        (OneSlotPool, "StatePool", "share a slot"),
    ],
)
def test_a_faulty_pool_is_caught(monkeypatch: pytest.MonkeyPatch, pool: type, name: str, said: str) -> None:
    monkeypatch.setattr(kv_cache_manager, name, pool)
    assert any(words in catch() for words in said.split("|"))


@pytest.mark.parametrize(
    ("manager", "said"),
    [
        (StingyManager, "tokens without a page"),
        (SlotKeeper, "state slots are in use"),
        (FreesTwice, "is free already"),
    ],
)
def test_a_faulty_manager_is_caught(monkeypatch: pytest.MonkeyPatch, manager: type, said: str) -> None:
    monkeypatch.setattr("vllm.v1.core.sched.scheduler.KVCacheManager", manager)
    assert said in catch()


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (KeepsCount, "tokens that nobody computed"),
        (TellsNobody, "share a page|share a slot|too many sequences|num_running"),
        (TellsTwice, "which has no row"),
        (PrefillsFirst, "decode rows do not come first|does not advance"),
        (Overspends, "token budget exceeded"),
        (Overcrowds, "too many sequences"),
        (ForgetsOutput, "not known yet|tokens for request"),
        (RepeatsPromptLogprobs, "prompt logprobs doubled"),
        (LosesPromptLogprobs, "prompt logprobs doubled or left out"),
        (SkipsTheFirst, "does not advance"),
        (StopsTooSoon, "ended early or late|ended by"),
        (RunsOn, "other tokens than when running alone"),
        (IgnoresStopIds, "other tokens than when running alone|ended early or late"),
        (IgnoresAborts, "is not in this queue|tokens for request"),
        (SilentAboutAdmission, "scheduled_time"),
        (AdmitsNobody, "cannot be admitted"),
    ],
)
def test_a_faulty_scheduler_is_caught(kind: type[Scheduler], said: str) -> None:
    heard = catch(kind=kind)
    assert any(words in heard for words in said.split("|")), heard


def _newest_first(request: Request) -> tuple:
    return (-request.queue_number,)


def _ignore_arrival(request: Request) -> tuple:
    return (request.priority, request.queue_number)


@pytest.mark.parametrize(("policy", "rank"), [("fcfs", _newest_first), ("priority", _ignore_arrival)])
def test_a_queue_in_another_order_is_caught(
    monkeypatch: pytest.MonkeyPatch, policy: str, rank: Callable[[Request], tuple]
) -> None:
    monkeypatch.setitem(request_queue.RANKS, policy, rank)
    heard = catch(policy)
    assert "admitted" in heard or "came later" in heard or "does not advance" in heard, heard


def test_cutting_prompts_is_caught_where_it_is_not_allowed() -> None:
    class Cuts(Scheduler):
        def _admit_waiting(self, step) -> None:
            self.config = replace(self.config, enable_chunked_prefill=True)
            super()._admit_waiting(step)

    assert "is cut into chunks" in catch(kind=Cuts, chunked=False)


def test_being_late_is_caught() -> None:
    """A scheduler that lets every second step pass breaks the promise on the number of steps."""
    rng = random.Random(0)
    setup = random_setup(rng, "fcfs", chunked=True)
    harness = Harness(setup)
    ledger = harness.add("a", [1, 2], SamplingParams(max_tokens=3, ignore_eos=True))
    harness.num_steps += ledger.last_step
    with pytest.raises(AssertionError, match="later than"):
        harness.drain()
