"""Whatever comes and goes: nothing leaks, nobody starves, and everybody gets what they would get alone."""

import random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.v1.core.sched.fake_worker import EOS, FakeWorker, Setup, choose
from tests.v1.core.sched.harness import Harness, random_setup, storm
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput


@st.composite
def setups(draw: st.DrawFn) -> Setup:
    """The smallest device that can do anything, and up from there."""
    chunked = draw(st.booleans())
    max_model_len = draw(st.integers(2, 32))
    max_num_seqs = draw(st.integers(1, 5))
    least_budget = max_num_seqs if chunked else max(max_num_seqs, max_model_len)
    return Setup(
        policy=draw(st.sampled_from(["fcfs", "priority"])),
        chunked=chunked,
        block_size=draw(st.integers(1, 4)),
        num_blocks=draw(st.integers(2, 16)),
        num_slots=draw(st.integers(2, 6)),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=least_budget + draw(st.integers(0, 10)),
        max_model_len=max_model_len,
    )


@st.composite
def sampling_params(draw: st.DrawFn) -> SamplingParams:
    max_tokens = draw(st.none() | st.integers(1, 24))
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=draw(st.integers(0, min(6, max_tokens or 6))),
        ignore_eos=draw(st.booleans()),
        stop_token_ids=draw(st.sampled_from([[], [5], [3, *EOS]])),
        logprobs=draw(st.sampled_from([None, 0])),
        prompt_logprobs=draw(st.sampled_from([None, 0])),
    )


class EngineMachine(RuleBasedStateMachine):
    """An engine that requests enter and leave at any moment, also while a step is under way."""

    @initialize(setup=setups(), ahead=st.integers(0, 1))
    def start(self, setup: Setup, ahead: int) -> None:
        self.harness = Harness(setup, ahead=ahead, most_ahead=2)
        self.num_ids = 0

    @rule(
        seed=st.integers(0, 9),
        length=st.integers(1, 32),
        params=sampling_params(),
        priority=st.integers(0, 2),
        arrival_time=st.sampled_from([0.0, 1.0, 2.0]),
    )
    def add(self, seed: int, length: int, params: SamplingParams, priority: int, arrival_time: float) -> None:
        self._add(f"r{self.num_ids}", seed, length, params, priority, arrival_time)
        self.num_ids += 1

    @precondition(lambda self: self.harness.open)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.harness.open)), unique=True))
        self.harness.abort("nobody", *chosen)

    @precondition(lambda self: self.harness.open)
    @rule(data=st.data(), params=sampling_params(), length=st.integers(1, 8))
    def abort_and_use_the_id_again(self, data: st.DataObject, params: SamplingParams, length: int) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.harness.open)))
        self.harness.abort(request_id)
        self._add(request_id, 7, length, params, priority=1, arrival_time=1.0)

    @precondition(lambda self: len(self.harness.pending) < 2)
    @rule()
    def begin_step(self) -> None:
        self.harness.begin()

    @precondition(lambda self: self.harness.pending)
    @rule(keep=st.integers(0, 1))
    def end_step(self, keep: int) -> None:
        self.harness.end(keep)

    @rule(num_steps=st.integers(1, 10))
    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.harness.step()

    @invariant()
    def books_balance(self) -> None:
        if hasattr(self, "harness"):
            self.harness.scheduler.assert_balanced()

    def teardown(self) -> None:
        if hasattr(self, "harness"):
            self.harness.end()
            self.harness.drain()

    def _add(
        self, request_id: str, seed: int, length: int, params: SamplingParams, priority: int, arrival_time: float
    ) -> None:
        rng = random.Random(seed)
        length = min(length, self.harness.setup.max_prompt_len)
        self.harness.add(request_id, [rng.randrange(1000) for _ in range(length)], params, priority, arrival_time)


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(
    max_examples=400, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize("ahead", [0, 1], ids=["in_step", "ahead"])
@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "whole"])
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_storms(policy: str, chunked: bool, ahead: int) -> None:
    num_preemptions = num_finished = 0
    for seed in range(250):
        rng = random.Random(seed)
        harness = Harness(random_setup(rng, policy, chunked), ahead=ahead)
        storm(harness, rng, num_requests=25)
        num_preemptions += harness.scheduler.num_preemptions
        num_finished += sum(ledger.finish[0] != "abort" for ledger in harness.closed)
    # The storms are only worth something if they do get requests into each other's way, and still let them finish.
    assert num_preemptions > 300
    assert num_finished > 4000


def test_steady_arrivals_starve_nobody() -> None:
    """Newcomers at every step, more than can be served: the harness holds each request to a bound without them in it."""
    rng = random.Random(0)
    harness = Harness(Setup(num_blocks=17, num_slots=4, max_num_seqs=3, max_num_batched_tokens=6))
    for i in range(600):
        prompt = [rng.randrange(1000) for _ in range(rng.randint(1, 30))]
        harness.add(f"r{i}", prompt, SamplingParams(max_tokens=12, ignore_eos=True))
        harness.step()
    assert 50 < len(harness.closed) < 600
    harness.drain()
    assert len(harness.closed) == 600


def test_the_fake_worker_notices_a_swapped_slot_or_page() -> None:
    """The harness can only see a wrong output if the output does depend on the places a sequence was given."""

    def sample(corrupt) -> int:
        worker = FakeWorker(Setup())
        new = NewRequestData("a", [3, 1, 4, 1, 5], 5, SamplingParams(), [2, 7], 3, 0)
        worker.execute(SchedulerOutput({"a": 5}, [new]))
        corrupt(worker)
        return worker.execute(SchedulerOutput({"a": 1})).sampled_token_ids["a"][0]

    clean = sample(lambda worker: None)
    assert sample(lambda worker: worker.states.__setitem__(3, 12345)) != clean
    assert sample(lambda worker: worker.pages.__setitem__(7, [99, 99, 99, 99])) != clean
    assert choose(1, [1, 2]) != choose(1, [2, 1])
