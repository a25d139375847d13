"""One start of the engine, timed from inside: what `vllm bench startup` runs in a fresh process.

Phases do not overlap: time in an inner one is not counted in the outer one. Kernels and graphs are recognised by what torch and Triton report
of them, so that nothing in the engine needs to know that it is timed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

IMPORT, TOKENIZER, WEIGHTS, COMPILED, LOADED = "import", "tokenizer", "weights", "kernels compiled", "kernels loaded"
GRAPHS, REST, FIRST = "graphs", "everything else", "first token"
PHASES = (IMPORT, TOKENIZER, WEIGHTS, COMPILED, LOADED, GRAPHS, REST, FIRST)


class Timeline:
    """Seconds by phase. A phase that is entered inside another interrupts it."""

    def __init__(self, start: float) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.compiled = self.loaded = 0
        self._stack = [REST]
        self._since = start

    def switch(self, now: float) -> None:
        """Give the time since the last switch to the innermost phase."""
        self.seconds[self._stack[-1]] += now - self._since
        self._since = now

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def enter(self, name: str) -> None:
        self.switch(time.time())
        self._stack.append(name)

    def leave(self) -> None:
        self.switch(time.time())
        self._stack.pop()

    def inside(self, name: str, seconds: float) -> None:
        """What just ended took this long: it belongs to `name` and not to the phase that is open."""
        self.switch(time.time())
        taken = min(seconds, self.seconds[self._stack[-1]])
        self.seconds[self._stack[-1]] -= taken
        self.seconds[name] += taken


def watch(timeline: Timeline) -> None:
    """Let Triton, torch and the engine's loader report to the timeline."""
    import torch
    import triton

    from vllm.v1.engine import llm_engine
    from vllm.v1.worker import gpu_worker

    def compiled(*, times: Any, cache_hit: bool, **_: Any) -> None:
        timeline.inside(LOADED if cache_hit else COMPILED, times.total / 1e6)
        if cache_hit:
            timeline.loaded += 1
        else:
            timeline.compiled += 1

    triton.knobs.compilation.listener = compiled
    triton.knobs.runtime.kernel_load_start_hook.add(lambda *_: timeline.enter(LOADED))
    triton.knobs.runtime.kernel_load_end_hook.add(lambda *_: timeline.leave())
    wrap(timeline, TOKENIZER, llm_engine, "load_tokenizer")
    wrap(timeline, WEIGHTS, gpu_worker, "load_model")
    if torch.cuda.is_available():
        begin, end = torch.cuda.CUDAGraph.capture_begin, torch.cuda.CUDAGraph.capture_end

        def capture_begin(self: Any, *args: Any, **kwargs: Any) -> None:
            timeline.enter(GRAPHS)
            begin(self, *args, **kwargs)

        def capture_end(self: Any) -> None:
            try:
                end(self)
            finally:
                timeline.leave()

        torch.cuda.CUDAGraph.capture_begin, torch.cuda.CUDAGraph.capture_end = capture_begin, capture_end


def wrap(timeline: Timeline, phase: str, owner: Any, name: str) -> None:
    """Calls of owner.name are the phase from now on."""
    inner = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        with timeline.phase(phase):
            return inner(*args, **kwargs)

    setattr(owner, name, timed)


def run_job(spec: dict[str, Any]) -> dict[str, Any]:
    """Start an engine and generate one token: {"phases": seconds, "total", "compiled", "loaded"}."""
    timeline = Timeline(spec["started"])
    # Starting Python and reading this file is part of what a user waits for.
    timeline.enter(IMPORT)
    timeline.seconds[IMPORT], timeline.seconds[REST] = timeline.seconds[REST], 0.0
    from vllm.entrypoints.llm import LLM
    from vllm.sampling_params import SamplingParams

    timeline.leave()
    watch(timeline)
    llm = LLM(**spec["engine"])
    with timeline.phase(FIRST):
        prompt = {"prompt_token_ids": [1] * spec["input_len"]}
        llm.generate([prompt], SamplingParams(temperature=0.0, max_tokens=1, detokenize=False), use_tqdm=False)
    return {
        "phases": timeline.seconds,
        "total": sum(timeline.seconds.values()),
        "compiled": timeline.compiled,
        "loaded": timeline.loaded,
    }
