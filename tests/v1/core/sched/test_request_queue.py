"""Requests in the order of the policy."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.request_queue import RANKS, RequestQueue
from vllm.v1.request import Request


def make_request(number: int, priority: int = 0, arrival_time: float = 0.0) -> Request:
    request = Request(f"r{number}", [1], SamplingParams(), arrival_time, priority)
    request.queue_number = number
    return request


def fill(policy: str, *requests: Request) -> RequestQueue:
    queue = RequestQueue(policy)
    for request in requests:
        queue.add(request)
    return queue


def test_fcfs_goes_by_the_order_of_receipt() -> None:
    late_but_urgent = make_request(2, priority=-5, arrival_time=-1.0)
    queue = fill("fcfs", make_request(1), late_but_urgent, make_request(0))
    assert [request.queue_number for request in queue] == [0, 1, 2]
    assert (queue.first.queue_number, queue.last) == (0, late_but_urgent)


def test_priority_goes_by_number_then_arrival_then_receipt() -> None:
    queue = fill(
        "priority",
        make_request(0, 1, 0.0),
        make_request(1, 0, 9.0),
        make_request(2, 0, 3.0),
        make_request(3, 0, 3.0),
    )
    assert [request.queue_number for request in queue] == [2, 3, 1, 0]


def test_removing_what_is_not_there_is_an_error() -> None:
    queue = fill("fcfs", make_request(0), make_request(2))
    for stranger in (make_request(1), make_request(2), make_request(3)):
        with pytest.raises(ValueError, match="is not in this queue"):
            queue.remove(stranger)
    assert len(queue) == 2


@pytest.mark.parametrize("policy", RANKS)
@given(
    ranks=st.lists(st.tuples(st.integers(-2, 2), st.floats(0, 3))),
    removed=st.sets(st.integers(0, 20)),
)
def test_it_is_always_sorted(policy: str, ranks: list[tuple[int, float]], removed: set[int]) -> None:
    requests = [make_request(number, *rank) for number, rank in enumerate(ranks)]
    queue = fill(policy, *requests)
    for number in removed & set(range(len(requests))):
        queue.remove(requests[number])
    left = [request for request in requests if request.queue_number not in removed]
    assert list(queue) == sorted(left, key=RANKS[policy])
    assert len(queue) == len(left) and bool(queue) == bool(left)
