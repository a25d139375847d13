"""The busy loop against a core that writes down what is done to it."""

import pytest

from vllm.v1.engine.core_loop import run_core_loop
from vllm.v1.engine.messages import (
    AbortRequests,
    AddRequests,
    CallAnswer,
    CallCore,
    EngineCoreOutput,
    EngineCoreRequest,
    SchedulerStats,
)


class Recorder:
    """Each request takes as many steps as its priority says."""

    def __init__(self, to_prepare=0):
        self.log = []
        self.left = {}
        self.to_prepare = to_prepare

    def add_request(self, request):
        if request.request_id == "bad":
            raise ValueError("bad")
        self.log.append(("add", request.request_id))
        self.left[request.request_id] = request.priority

    def abort_requests(self, request_ids):
        self.log.append(("abort", *request_ids))
        for request_id in request_ids:
            self.left.pop(request_id, None)

    def step(self):
        self.log.append("step")
        outputs = [EngineCoreOutput(request_id, [n]) for request_id, n in self.left.items()]
        self.left = {request_id: n - 1 for request_id, n in self.left.items() if n > 1}
        return outputs

    def take_stats(self):
        return SchedulerStats(num_running=len(self.left))

    def check_idle(self):
        assert not self.left
        self.log.append("idle")

    def prepare(self):
        self.log.append("prepare")
        self.to_prepare -= 1

    @property
    def can_prepare(self):
        return self.to_prepare > 0

    @property
    def has_unfinished_requests(self):
        return bool(self.left)


def run(*batches, to_prepare=0):
    """Run the loop on batches of commands, one for each time it looks; what was done, and what was sent."""
    core, sent, looks = Recorder(to_prepare), [], iter([*batches, [None]])

    def receive(wait):
        core.log.append("wait" if wait else "look")
        return next(looks)

    run_core_loop(core, receive, sent.append)
    return core.log, sent


def add(request_id, steps):
    return EngineCoreRequest(request_id, [1], None, 0.0, priority=steps)


def test_waits_only_when_idle():
    log, sent = run([AddRequests([add("a", 2)])], [])
    assert log == ["idle", "wait", ("add", "a"), "step", "look", "step", "idle", "wait"]
    assert [o.new_token_ids for message in sent for o in message.outputs] == [[2], [1]]


def test_prepares_while_nobody_wants_anything():
    """One thing at a time, and a request that comes meanwhile goes first."""
    log, sent = run([], [AddRequests([add("a", 2)])], [], [], [], to_prepare=3)
    assert log == (
        ["idle", "look", "prepare", "idle", "look", ("add", "a"), "step", "look", "step"]
        + ["idle", "look", "prepare", "idle", "look", "prepare", "idle", "wait"]
    )
    assert len(sent) == 2


def test_commands_come_between_any_two_steps_in_order():
    log, sent = run(
        [AddRequests([add("a", 9), add("b", 9)])],
        [AbortRequests(["a"]), AddRequests([add("a", 1)]), AddRequests([add("c", 1)])],
        [AbortRequests(["b", "nobody"])],
    )
    assert log == (
        ["idle", "wait", ("add", "a"), ("add", "b"), "step", "look", ("abort", "a"), ("add", "a"), ("add", "c"), "step"]
        + ["look", ("abort", "b", "nobody"), "idle", "wait"]
    )
    assert [sorted(o.request_id for o in message.outputs) for message in sent] == [["a", "b"], ["a", "b", "c"], []]
    assert [message.stats.num_running for message in sent] == [2, 1, 0]


def test_a_request_that_cannot_be_queued_costs_nobody_else_anything(caplog):
    log, sent = run([AddRequests([add("a", 1), add("bad", 1), add("b", 1)])])
    assert ("add", "a") in log and ("add", "b") in log
    ends = {(o.request_id, o.finish_reason, o.stop_reason) for o in sent[0].outputs}
    assert ends == {("a", None, None), ("b", None, None), ("bad", "abort", "bad")}
    assert "Request dropped: bad" in caplog.text


def test_calls_come_between_the_steps(caplog):
    Recorder.reset_prefix_cache = lambda self: self.log.append("reset") or 5
    Recorder.start_profile = lambda self: [].pop()
    try:
        log, sent = run(
            [AddRequests([add("a", 2)]), CallCore(7, "reset_prefix_cache")],
            [CallCore(8, "start_profile"), CallCore(9, "stop_profile"), CallCore(10, "check_idle")],
        )
    finally:
        del Recorder.reset_prefix_cache, Recorder.start_profile
    assert log[2:6] == [("add", "a"), "reset", "step", "look"] and log.count("step") == 2
    assert sent[0].answers == [CallAnswer(7, 5)]
    assert [answer.call_id for answer in sent[1].answers] == [8, 9, 10]
    assert [answer.error.partition(":")[0] for answer in sent[1].answers] == [
        "IndexError",
        "AttributeError",
        "there is no check_idle",
    ]


def test_the_end_comes_at_once_even_with_work_left():
    log, _ = run([AddRequests([add("a", 100)])])
    assert log.count("step") == 1 and log[-1] == "look"


def test_errors_go_through():
    with pytest.raises(StopIteration):
        core = Recorder()
        run_core_loop(core, lambda wait: next(iter([])), print)
