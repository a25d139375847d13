"""An engine core without a model: every running sequence gets a token a step, at a set pace. For tests and measurements of
everything around the core."""

from __future__ import annotations

import time

from vllm.config import VllmConfig
from vllm.v1.engine.messages import EngineCoreInfo, EngineCoreOutput, EngineCoreRequest, SchedulerStats


class StubCore:
    """Answers every prompt with token ids that count up from the prompt's last one, `max_tokens` of them."""

    seconds_a_step = 0.0

    def __init__(self, config: VllmConfig) -> None:
        self.info = EngineCoreInfo(num_blocks=1 << 20, block_size=16, num_slots=1025)
        self._max_num_seqs = config.scheduler_config.max_num_seqs
        self._vocab_size = config.model_config.hf_config.text.vocab_size
        self._counts: dict[str, int] = {}
        self._requests: dict[str, EngineCoreRequest] = {}

    def add_request(self, request: EngineCoreRequest) -> None:
        self._requests[request.request_id] = request
        self._counts[request.request_id] = 0

    def abort_requests(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self._requests.pop(request_id, None)
            self._counts.pop(request_id, None)

    def step(self) -> list[EngineCoreOutput]:
        self._wait()
        outputs = []
        for request_id, request in list(self._requests.items())[: self._max_num_seqs]:
            count = self._counts[request_id] = self._counts[request_id] + 1
            token = (request.prompt_token_ids[-1] + count) % self._vocab_size
            outputs.append(EngineCoreOutput(request_id, [token]))
            if count == 1:
                outputs[-1].scheduled_time = time.time()
            if count >= request.sampling_params.max_tokens:
                outputs[-1].finish_reason = "length"
                self.abort_requests([request_id])
        return outputs

    def take_stats(self) -> SchedulerStats:
        running = min(len(self._requests), self._max_num_seqs)
        waiting = len(self._requests) - running
        return SchedulerStats(running, waiting, kv_cache_usage=running / self._max_num_seqs, num_step_tokens=running)

    def check_idle(self) -> None:
        """There are no books to balance."""

    can_prepare = False

    def prepare(self) -> None:
        """Nothing is to be prepared."""

    @property
    def has_unfinished_requests(self) -> bool:
        return bool(self._requests)

    def _wait(self) -> None:
        """Sleep until the step is over. A step that starts late ends late: nothing is caught up."""
        if self.seconds_a_step:
            time.sleep(self.seconds_a_step)


class PacedStubCore(StubCore):
    """A token every two milliseconds."""

    seconds_a_step = 0.002


class SlowStubCore(StubCore):
    """A token every twenty milliseconds, as large models give them."""

    seconds_a_step = 0.02


class ScheduledStubCore(StubCore):
    """A token every twenty milliseconds by the clock: a step that ends late takes nothing from the next one's time.

    So `n` tokens take `n` steps' time, and whatever they take longer than that is the way behind the core.
    """

    seconds_a_step = 0.02

    def __init__(self, config: VllmConfig) -> None:
        super().__init__(config)
        self._due: float | None = None

    def check_idle(self) -> None:
        self._due = None

    def _wait(self) -> None:
        now = time.monotonic()
        self._due = (now if self._due is None else self._due) + self.seconds_a_step
        time.sleep(max(0.0, self._due - now))
