"""Whether an engine gets on: how long its step has taken by now, and whether it has worked meanwhile."""

from __future__ import annotations

import time

SECONDS_A_BEAT = 1.0
"""How often an engine in a process of its own tells the front end how it is."""
LONGEST_SILENCE = 20.0
"""A process that is stopped, or gets no time at all, sends no beats. Twenty of them are missed by no accident."""
LONGEST_STEP = 300.0
"""On a GPU. A step takes well under a second there; the first of its kind, with kernels still to be compiled, a minute."""
LONGEST_REST = 60.0
LEAST_WORK = 0.05
"""On a CPU a step with a long prompt may take any time, but it works: one that has used less than this share of a processor
over so many seconds waits for something that does not come."""


class Pulse:
    """The step under way: noted by the engine's thread, read by another."""

    def __init__(self) -> None:
        self._began: tuple[float, float] | None = None

    def step_begins(self) -> None:
        self._began = time.monotonic(), time.process_time()

    def step_ends(self) -> None:
        self._began = None

    def read(self) -> tuple[float, float]:
        """Seconds since the step under way began, and seconds of the processor's time since then; 0 and 0 between two steps."""
        began = self._began
        if began is None:
            return 0.0, 0.0
        worked = time.process_time() - began[1]  # first: its span lies inside the other one
        return time.monotonic() - began[0], worked


def why_stalled(seconds: float, worked: float, silence: float, on_gpu: bool) -> str | None:
    """What is wrong with an engine that does not get on; None of one that does.

    Args:
        seconds, worked: of its Pulse.
        silence: seconds since those were heard.
        on_gpu: its steps run on a GPU.
    """
    if silence > LONGEST_SILENCE:
        return f"the engine process has not been heard of for {silence:.0f} s"
    if on_gpu and seconds > LONGEST_STEP:
        return f"a step of the engine has taken {seconds:.0f} s so far"
    if not on_gpu and seconds > LONGEST_REST and worked < LEAST_WORK * seconds:
        return f"a step of the engine has taken {seconds:.0f} s so far, in which it worked {worked:.1f} s"
    return None
