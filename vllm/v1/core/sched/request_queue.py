"""Requests in the order of the scheduling policy: who is served first, and, read from the end, who gives way first."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.request import Request

# Ranks are unique, because queue numbers are. A preempted request keeps its rank: it comes back before all who came later.
RANKS: dict[str, Callable[[Request], tuple]] = {
    "fcfs": lambda request: (request.queue_number,),
    "priority": lambda request: (request.priority, request.arrival_time, request.queue_number),
}


class RequestQueue:
    """A list of requests kept sorted by rank. Insertion moves pointers in one block: microseconds at ten thousand requests."""

    def __init__(self, policy: str) -> None:
        self._rank = RANKS[policy]
        self._requests: list[Request] = []

    def add(self, request: Request) -> None:
        """Put a request where its rank says."""
        insort(self._requests, request, key=self._rank)

    def remove(self, request: Request) -> None:
        """Take a request out, wherever it stands."""
        i = bisect_left(self._requests, self._rank(request), key=self._rank)
        if i == len(self._requests) or self._requests[i] is not request:
            raise ValueError(f"request {request.request_id} is not in this queue")
        del self._requests[i]

    @property
    def first(self) -> Request:
        """The one to serve next."""
        return self._requests[0]

    @property
    def last(self) -> Request:
        """The one to give way first."""
        return self._requests[-1]

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def __len__(self) -> int:
        return len(self._requests)
