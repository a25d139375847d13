"""The scheduler's decisions, one at a time; test_scheduler_properties.py has them all at once."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.v1.core.sched.fake_worker import EOS, Setup
from tests.v1.core.sched.harness import Harness
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput, TokenLogprobs
from vllm.v1.request import Request, RequestStatus

ENDLESS = SamplingParams(max_tokens=None, ignore_eos=True)


def add(
    scheduler: Scheduler, request_id: str, num_tokens: int, params: SamplingParams = ENDLESS, **rank: float
) -> Request:
    request = Request(
        request_id, list(range(100, 100 + num_tokens)), params, rank.get("arrival_time", 0.0), rank.get("priority", 0)
    )
    scheduler.add_request(request)
    return request


def answer(scheduler: Scheduler, step: SchedulerOutput, token: int = 50) -> list:
    """A worker that samples `token` wherever a sample is due."""
    due = [i for i in step.num_scheduled_tokens if i in scheduler.requests]
    sampled = {i: [token] for i in due if scheduler.requests[i].num_uncomputed_tokens == 0}
    return scheduler.update_from_output(step, ModelRunnerOutput(sampled))


def run_step(scheduler: Scheduler, token: int = 50) -> SchedulerOutput:
    step = scheduler.schedule()
    answer(scheduler, step, token)
    return step


# Budget and row order.


def test_a_long_prompt_is_cut_and_decoding_goes_first() -> None:
    scheduler = Setup(max_num_batched_tokens=8, max_num_seqs=4).make_scheduler()
    add(scheduler, "short", 3)
    assert run_step(scheduler).num_scheduled_tokens == {"short": 3}
    add(scheduler, "long", 17)
    assert list(run_step(scheduler).num_scheduled_tokens.items()) == [("short", 1), ("long", 7)]
    assert list(run_step(scheduler).num_scheduled_tokens.items()) == [("short", 1), ("long", 7)]
    # Three left; the budget has room for a newcomer beside them.
    add(scheduler, "new", 10)
    assert list(run_step(scheduler).num_scheduled_tokens.items()) == [("short", 1), ("long", 3), ("new", 4)]


def test_the_last_single_token_of_a_prompt_counts_as_a_decode_row() -> None:
    scheduler = Setup(max_num_batched_tokens=8).make_scheduler()
    add(scheduler, "a", 9)
    run_step(scheduler)
    add(scheduler, "b", 1)
    assert list(run_step(scheduler).num_scheduled_tokens.items()) == [("a", 1), ("b", 1)]
    add(scheduler, "c", 1)  # one token, but none computed: not a decode row
    add(scheduler, "d", 2)
    assert list(run_step(scheduler).num_scheduled_tokens) == ["a", "b", "c", "d"]


def test_without_chunks_a_prompt_waits_until_it_fits_and_nobody_overtakes_it() -> None:
    scheduler = Setup(chunked=False, max_model_len=16, max_num_batched_tokens=16).make_scheduler()
    add(scheduler, "a", 10)
    add(scheduler, "b", 7)
    add(scheduler, "c", 1)
    assert run_step(scheduler).num_scheduled_tokens == {"a": 10}
    assert run_step(scheduler).num_scheduled_tokens == {"a": 1, "b": 7, "c": 1}


def test_with_several_tokens_a_step_somebody_may_have_to_stand_back() -> None:
    scheduler = Setup(max_num_batched_tokens=3, max_num_seqs=2).make_scheduler()
    add(scheduler, "a", 1)
    add(scheduler, "b", 1)
    scheduler.update_from_output(scheduler.schedule(), ModelRunnerOutput({"a": [7, 8, 9], "b": [7, 8]}))
    assert run_step(scheduler).num_scheduled_tokens == {"a": 3}
    assert run_step(scheduler).num_scheduled_tokens == {"a": 1, "b": 2}


def test_max_num_seqs_and_slots_limit_who_runs() -> None:
    for setup in (Setup(max_num_seqs=2), Setup(num_slots=3)):
        scheduler = setup.make_scheduler()
        for i in range(4):
            add(scheduler, f"r{i}", 2)
        assert list(run_step(scheduler).num_scheduled_tokens) == ["r0", "r1"]
        assert (scheduler.num_running, scheduler.num_waiting) == (2, 2)


def test_a_step_with_nothing_to_do_is_empty() -> None:
    scheduler = Setup().make_scheduler()
    assert scheduler.schedule() == SchedulerOutput()
    assert not scheduler.has_unfinished_requests


def test_scheduling_ahead_of_the_results_goes_on_to_the_last_token_and_no_further() -> None:
    scheduler = Setup().make_scheduler()
    request = add(scheduler, "a", 3, SamplingParams(max_tokens=2, ignore_eos=True))
    steps = [scheduler.schedule() for _ in range(3)]
    assert [step.num_scheduled_tokens for step in steps] == [{"a": 3}, {"a": 1}, {}]
    assert request.num_under_way == 2
    outputs = [scheduler.update_from_output(step, ModelRunnerOutput({"a": [50]})) for step in steps[:2]]
    assert [output.new_token_ids for (output,) in outputs] == [[50], [50]]
    assert request.finish_reason == "length"


def test_what_was_computed_behind_a_stop_is_dropped() -> None:
    scheduler = Setup().make_scheduler()
    request = add(scheduler, "a", 3, SamplingParams(max_tokens=9))
    first, second = scheduler.schedule(), scheduler.schedule()
    (output,) = scheduler.update_from_output(first, ModelRunnerOutput({"a": [0]}))
    assert (output.new_token_ids, output.finish_reason) == ([0], "stop")
    again = add(scheduler, "a", 2)
    assert scheduler.schedule().finished_request_ids == ["a"]
    assert scheduler.update_from_output(second, ModelRunnerOutput({"a": [7]})) == []
    assert (request.output_token_ids, again.output_token_ids) == ([0], [])


@pytest.mark.parametrize("must_know", [True, False])
def test_a_text_whose_next_token_depends_on_the_last_is_not_scheduled_ahead(must_know: bool) -> None:
    scheduler = Setup().make_scheduler()
    request = add(scheduler, "a", 3)
    assert not scheduler.must_know_tokens
    request.constraint = SimpleNamespace(must_know_tokens=must_know)
    scheduler.schedule()
    assert scheduler.must_know_tokens == must_know
    assert scheduler.schedule().num_scheduled_tokens == ({} if must_know else {"a": 1})


# What the worker is told.


def test_a_new_request_comes_with_pages_for_its_whole_prompt() -> None:
    scheduler = Setup(block_size=4, max_num_batched_tokens=8).make_scheduler()
    add(scheduler, "a", 17)
    (new,) = run_step(scheduler).new_requests
    assert (new.request_id, new.num_prompt_tokens, new.num_computed_tokens) == ("a", 17, 0)
    assert new.token_ids == list(range(100, 117))
    assert len(new.block_ids) == 5 and new.state_slot > 0
    step = run_step(scheduler)
    assert not step.new_requests and not step.new_block_ids


def test_a_page_is_appended_when_the_last_is_full() -> None:
    scheduler = Setup(block_size=4).make_scheduler()
    add(scheduler, "a", 4)
    (new,) = run_step(scheduler).new_requests
    assert len(new.block_ids) == 1
    pages = [run_step(scheduler).new_block_ids.get("a", []) for _ in range(5)]
    assert [len(ids) for ids in pages] == [1, 0, 0, 0, 1]


def test_a_finished_row_is_forgotten_in_the_next_step() -> None:
    scheduler = Setup().make_scheduler()
    add(scheduler, "a", 2, SamplingParams(max_tokens=1))
    assert run_step(scheduler).finished_request_ids == []
    assert scheduler.schedule().finished_request_ids == ["a"]
    assert scheduler.schedule().finished_request_ids == []


# Preemption.


def crowd(policy: str = "fcfs", **rank_of_c: float) -> Scheduler:
    """Three running requests, each about to need a page, and two pages free."""
    scheduler = Setup(policy=policy, block_size=4, num_blocks=9, max_num_batched_tokens=64).make_scheduler()
    for request_id, rank in {"a": {}, "b": {}, "c": rank_of_c}.items():
        add(scheduler, request_id, 7, **rank)
    for _ in range(2):
        run_step(scheduler)
    assert (scheduler.num_running, scheduler.kv_cache_manager.block_pool.num_free) == (3, 2)
    return scheduler


def test_the_last_admitted_gives_way() -> None:
    scheduler = crowd()
    c = scheduler.requests["c"]
    step = run_step(scheduler)
    assert list(step.num_scheduled_tokens) == ["a", "b"]
    assert step.finished_request_ids == ["c"]
    assert (c.status, c.num_computed_tokens, c.num_output_tokens) == (RequestStatus.PREEMPTED, 0, 2)
    assert (scheduler.num_preemptions, scheduler.num_running, scheduler.num_waiting) == (1, 2, 1)


def test_the_least_urgent_gives_way_under_priority() -> None:
    scheduler = crowd("priority", priority=-1)
    step = run_step(scheduler)
    assert list(step.num_scheduled_tokens) == ["c", "a"]
    assert step.finished_request_ids == ["b"]


def test_among_equally_urgent_ones_the_latest_gives_way() -> None:
    scheduler = crowd("priority", arrival_time=-1.0)
    assert run_step(scheduler).finished_request_ids == ["b"]


def test_a_preempted_request_resumes_before_those_behind_it_with_all_its_tokens() -> None:
    scheduler = crowd()
    add(scheduler, "d", 1)
    scheduler.requests["c"].scheduled_time = 1.0
    run_step(scheduler)
    assert [request.request_id for request in scheduler.waiting] == ["c", "d"]
    scheduler.abort_requests(["a"])
    step = scheduler.schedule()
    resumed = step.new_requests[0]
    assert (resumed.request_id, resumed.num_computed_tokens, resumed.num_prompt_tokens) == ("c", 0, 7)
    assert resumed.token_ids == [*range(100, 107), 50, 50]
    assert step.num_scheduled_tokens["c"] == 9
    (output,) = [output for output in answer(scheduler, step, token=51) if output.request_id == "c"]
    assert output.new_token_ids == [51]  # the old two are not said again
    assert output.scheduled_time is None
    assert scheduler.requests["c"].scheduled_time == 1.0


def test_a_newcomer_leaves_a_page_for_each_running_request() -> None:
    scheduler = Setup(block_size=4, num_blocks=5, max_num_batched_tokens=64).make_scheduler()
    add(scheduler, "a", 4)
    run_step(scheduler)
    add(scheduler, "b", 8)
    assert list(run_step(scheduler).num_scheduled_tokens) == ["a"]
    # "b" would fit, but be thrown out again four steps later.
    assert scheduler.kv_cache_manager.block_pool.num_free == 2


@pytest.mark.parametrize("max_tokens,together", [(1, 4), (2, 3), (None, 3)])
def test_who_has_all_its_pages_needs_none_to_spare(max_tokens: int | None, together: int) -> None:
    """Nine pages and prompts of two. A last token is never computed, so that one more token needs no third page, and two do."""
    scheduler = Setup(block_size=4, num_blocks=10, max_num_batched_tokens=64).make_scheduler()
    for i in range(5):
        add(scheduler, str(i), 8, SamplingParams(max_tokens=max_tokens, ignore_eos=True))
    assert len(scheduler.schedule().new_requests) == together


def test_a_lone_request_that_fills_the_pool_ends_by_length() -> None:
    setup = Setup(block_size=4, num_blocks=4, max_model_len=1000, max_num_batched_tokens=64)
    harness = Harness(setup)
    ledger = harness.add("a", [1] * 10, ENDLESS)
    harness.drain()
    assert ledger.finish == ("length", None)
    # Twelve tokens have a place, and a thirteenth has none because it is never computed.
    assert len(ledger.tokens) == 3


def test_losing_pages_is_an_error_not_an_endless_wait() -> None:
    scheduler = Setup(block_size=4, num_blocks=5).make_scheduler()
    scheduler.kv_cache_manager.block_pool.allocate(3)
    add(scheduler, "a", 8)
    with pytest.raises(RuntimeError, match="nothing runs, yet request a cannot be admitted"):
        scheduler.schedule()


# The door.


def test_what_can_never_fit_is_refused() -> None:
    scheduler = Setup(block_size=4, num_blocks=5, max_model_len=100).make_scheduler()
    assert scheduler.can_ever_fit(16) and not scheduler.can_ever_fit(17)
    with pytest.raises(ValueError, match="request a has 17 prompt tokens; at most 16 fit"):
        add(scheduler, "a", 17)
    assert not Setup(max_model_len=10).make_scheduler().can_ever_fit(11)
    assert not scheduler.has_unfinished_requests


def test_an_empty_prompt_and_an_id_in_use_are_refused() -> None:
    scheduler = Setup().make_scheduler()
    with pytest.raises(ValueError, match="empty prompt"):
        add(scheduler, "a", 0)
    add(scheduler, "a", 1)
    with pytest.raises(ValueError, match="request a exists already"):
        add(scheduler, "a", 1)


# Aborts.


def test_abort_while_waiting_is_no_news_to_the_worker() -> None:
    scheduler = Setup().make_scheduler()
    request = add(scheduler, "a", 3)
    (output,) = scheduler.abort_requests(["nobody", "a", "a"])
    assert (output.request_id, output.finish_reason, output.new_token_ids) == ("a", "abort", [])
    assert request.finish_reason == "abort"
    assert scheduler.schedule() == SchedulerOutput()


def test_abort_between_schedule_and_update_drops_the_result() -> None:
    scheduler = Setup().make_scheduler()
    add(scheduler, "a", 3)
    step = scheduler.schedule()
    scheduler.abort_requests(["a"])
    scheduler.assert_balanced()
    again = add(scheduler, "a", 2)
    assert scheduler.update_from_output(step, ModelRunnerOutput({"a": [50]})) == []
    assert again.num_output_tokens == 0
    step = scheduler.schedule()
    assert step.finished_request_ids == ["a"]
    assert [new.token_ids for new in step.new_requests] == [[100, 101]]


# The end of a request, and what is said on the way.


@pytest.mark.parametrize(
    ("token", "params", "finish", "stop_reason"),
    [
        (1, SamplingParams(), "stop", None),
        (1, SamplingParams(ignore_eos=True), None, None),
        (1, SamplingParams(ignore_eos=True, stop_token_ids=[1]), "stop", 1),
        (1, SamplingParams(stop_token_ids=[1]), "stop", None),
        (5, SamplingParams(stop_token_ids=[4, 5]), "stop", 5),
        (5, SamplingParams(max_tokens=1), "length", None),
        (5, SamplingParams(max_tokens=1, stop_token_ids=[5]), "stop", 5),
        (1, SamplingParams(min_tokens=2), None, None),
        (5, SamplingParams(min_tokens=2, stop_token_ids=[5]), None, None),
        (5, SamplingParams(max_tokens=None), None, None),
    ],
)
def test_how_the_first_token_may_end_it(
    token: int, params: SamplingParams, finish: str | None, stop_reason: int | None
) -> None:
    assert 1 in EOS
    scheduler = Setup().make_scheduler()
    request = add(scheduler, "a", 3, params)
    (output,) = answer(scheduler, scheduler.schedule(), token)
    assert (output.new_token_ids, output.finish_reason, output.stop_reason) == ([token], finish, stop_reason)
    assert request.output_token_ids == [token]
    assert scheduler.has_unfinished_requests == (finish is None)


def test_min_tokens_holds_stops_back_until_it_is_reached() -> None:
    scheduler = Setup().make_scheduler()
    request = add(scheduler, "a", 3, SamplingParams(min_tokens=3))
    while scheduler.has_unfinished_requests:
        run_step(scheduler, token=1)
    assert request.num_output_tokens == 3


def test_max_model_len_ends_it() -> None:
    scheduler = Setup(max_model_len=8).make_scheduler()
    for request_id, num_tokens in {"a": 5, "b": 8}.items():
        add(scheduler, request_id, num_tokens)
    a, b = scheduler.requests["a"], scheduler.requests["b"]
    while scheduler.has_unfinished_requests:
        run_step(scheduler)
    assert (a.num_tokens, a.finish_reason) == (8, "length")
    assert (b.num_tokens, b.finish_reason) == (9, "length")  # a full prompt still gets its one token


def test_tokens_after_the_one_that_ends_it_are_dropped() -> None:
    scheduler = Setup().make_scheduler()
    add(scheduler, "a", 3, SamplingParams(logprobs=0))
    entries = [TokenLogprobs([t], [0.0], 1) for t in (7, 1, 8)]
    (output,) = scheduler.update_from_output(
        scheduler.schedule(), ModelRunnerOutput({"a": [7, 1, 8]}, logprobs={"a": entries})
    )
    assert (output.new_token_ids, output.new_logprobs, output.finish_reason) == ([7, 1], entries[:2], "stop")


def test_a_chunk_that_does_not_reach_the_end_says_nothing() -> None:
    scheduler = Setup(max_num_batched_tokens=8).make_scheduler()
    add(scheduler, "a", 17)
    assert answer(scheduler, scheduler.schedule()) == []
    assert answer(scheduler, scheduler.schedule()) == []
    (output,) = answer(scheduler, scheduler.schedule())
    assert output.scheduled_time is not None
    (output,) = answer(scheduler, scheduler.schedule())
    assert output.scheduled_time is None


@pytest.mark.parametrize("sampled", [{"a": [50]}, {}])
def test_a_worker_that_samples_at_the_wrong_time_is_an_error(sampled: dict[str, list[int]]) -> None:
    """A token in mid-prompt, or none at its end."""
    scheduler = Setup(max_num_batched_tokens=8).make_scheduler()
    add(scheduler, "a", 12 if sampled else 4)
    with pytest.raises(RuntimeError, match="for request a in a step that computed"):
        scheduler.update_from_output(scheduler.schedule(), ModelRunnerOutput(sampled))


def test_prompt_logprobs_come_with_their_chunks_and_only_once() -> None:
    setup = Setup(block_size=4, num_blocks=7, max_num_batched_tokens=8, max_model_len=40)
    harness = Harness(setup)
    old = harness.add("old", [1] * 7, ENDLESS)
    ledger = harness.add("new", [2] * 9, SamplingParams(prompt_logprobs=0, max_tokens=6, ignore_eos=True))
    for _ in range(3):
        harness.step()
    assert len(ledger.prompt_logprobs) == 8 and ledger.num_outputs >= 2
    while not harness.scheduler.num_preemptions:
        harness.step()
    assert old.finish is None and ledger.finish is None
    harness.drain()  # the harness refuses doubled or missing positions
    assert len(ledger.prompt_logprobs) == 8
