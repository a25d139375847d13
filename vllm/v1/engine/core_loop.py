"""The busy loop of an engine that serves: steps while there is work, sleep while there is none, requests at any time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from vllm.logger import init_logger
from vllm.v1.engine.messages import (
    CORE_METHODS,
    AbortRequests,
    AddRequests,
    CallAnswer,
    CallCore,
    Command,
    EngineCoreInfo,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    SchedulerStats,
)
from vllm.v1.engine.pulse import Pulse

logger = init_logger(__name__)


class Core(Protocol):
    """What the loop needs of an engine core; one that is asked to may also have CORE_METHODS, which take nothing."""

    info: EngineCoreInfo

    def add_request(self, request: EngineCoreRequest) -> None: ...
    def abort_requests(self, request_ids: list[str]) -> None: ...
    def step(self) -> list[EngineCoreOutput]: ...
    def take_stats(self) -> SchedulerStats: ...
    def check_idle(self) -> None: ...
    def prepare(self) -> None: ...
    @property
    def can_prepare(self) -> bool: ...
    @property
    def has_unfinished_requests(self) -> bool: ...


def run_core_loop(
    core: Core,
    receive: Callable[[bool], Sequence[Command | None]],
    send: Callable[[EngineCoreOutputs], None],
    pulse: Pulse | None = None,
) -> None:
    """Run steps while there is work, prepare for more and then wait for commands while there is none, until the command None.

    Args:
        receive: every command that has come since the last call; when called with True, it waits for the first of them.
        send: hands the outputs of a step to the front end, and must not wait for it.
        pulse: is told when steps begin and end.
    """
    pulse = pulse or Pulse()
    while True:
        busy = core.has_unfinished_requests
        if not busy:
            core.check_idle()
        commands = receive(not busy and not core.can_prepare)
        if not busy and not commands:
            pulse.step_begins()
            core.prepare()
            pulse.step_ends()
            continue
        refused: list[EngineCoreOutput] = []
        answers: list[CallAnswer] = []
        for command in commands:
            if command is None:
                return
            if isinstance(command, AddRequests):
                refused += _add(core, command.requests)
            elif isinstance(command, AbortRequests):
                core.abort_requests(command.request_ids)
            else:
                answers.append(_call(core, command))
        pulse.step_begins()
        outputs = core.step() if core.has_unfinished_requests else []
        pulse.step_ends()
        send(EngineCoreOutputs(refused + outputs, core.take_stats(), answers))


def _add(core: Core, requests: list[EngineCoreRequest]) -> list[EngineCoreOutput]:
    """Queue requests. The front end has checked them; one that cannot be queued all the same costs nobody else anything."""
    refused = []
    for request in requests:
        try:
            core.add_request(request)
        except ValueError as error:
            logger.error("Request dropped: %s", error)
            refused.append(EngineCoreOutput(request.request_id, [], "abort", str(error)))
    return refused


def _call(core: Core, command: CallCore) -> CallAnswer:
    """Call a method of the core's. What goes wrong there is the caller's to hear: the requests have no part in it."""
    try:
        if command.method not in CORE_METHODS:
            raise ValueError(f"there is no {command.method}")
        return CallAnswer(command.call_id, getattr(core, command.method)())
    except ValueError as error:
        return CallAnswer(command.call_id, error=str(error))
    except Exception as error:
        logger.exception("%s", command.method)
        return CallAnswer(command.call_id, error=f"{type(error).__name__}: {error}")
