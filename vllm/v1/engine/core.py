"""The engine's inner loop: schedule, execute, learn the results.

On a GPU the next step is queued before the results of this one are known, so that the device never waits for the host.
"""

from __future__ import annotations

from collections import deque
from functools import partial

from vllm.config import VllmConfig
from vllm.model_executor.layers.mamba.gdn_linear_attn import Variants, set_gdn_variants
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.messages import EngineCoreInfo, EngineCoreOutput, EngineCoreRequest, SchedulerStats
from vllm.v1.engine.profiler import Profiler
from vllm.v1.engine.vocabulary import load_vocabulary
from vllm.v1.request import Request
from vllm.v1.structured_output.manager import GrammarManager
from vllm.v1.worker.gpu_worker import Worker
from vllm.v1.worker.pending import PendingOutput

SECONDS_FOR_GRAMMARS = 0.005
"""How long a step that has nothing else to do waits for a grammar before it looks for new requests again."""


class EngineCore:
    """Owns the scheduler and the worker; knows tokens, not text.

    Args:
        config: validated configuration. Building the engine loads the model and allocates both pools.
    """

    def __init__(self, config: VllmConfig) -> None:
        self.config = config
        self.worker = Worker(config)
        sizes = self.worker.initialise()
        block_size = config.cache_config.block_size
        self.info = EngineCoreInfo(num_blocks=sizes.num_blocks, block_size=block_size, num_slots=sizes.num_slots)
        self.scheduler = Scheduler(
            config.scheduler_config,
            block_size=block_size,
            num_blocks=sizes.num_blocks,
            num_slots=sizes.num_slots,
            max_model_len=config.model_config.max_model_len,
            eos_token_ids=frozenset(config.model_config.hf_config.eos_token_ids),
        )
        self.grammars = GrammarManager(partial(load_vocabulary, config), config.model_config.hf_config.text.vocab_size)
        self._num_step_tokens = 0
        self._ahead = int(config.scheduler_config.async_scheduling)
        self._under_way: deque[tuple[SchedulerOutput, PendingOutput]] = deque()
        self._profiler = Profiler()

    def check_fits(self, num_prompt_tokens: int) -> None:
        """Raise ValueError when a prompt of this length could never be run, however idle the engine."""
        self.info.check_fits(num_prompt_tokens)

    def add_request(self, request: EngineCoreRequest) -> None:
        """Queue a request that passes `check_fits`. Where its text must have a form, it first waits for its grammar."""
        params, record = request.sampling_params, Request.from_engine_core_request(request)
        if params.structured_outputs is not None:
            return self.grammars.submit(record)
        self.scheduler.add_request(record)
        if params.thinking_token_budget is not None:
            self.grammars.hold(record)

    def abort_requests(self, request_ids: list[str]) -> None:
        """Drop requests wherever they are; unknown ids are ignored, since a request may just have finished."""
        self.grammars.abort(request_ids)
        self.scheduler.abort_requests(request_ids)
        if not self.scheduler.has_unfinished_requests:
            self._learn(keep=0)  # what is still under way is nobody's

    def step(self) -> list[EngineCoreOutput]:
        """Queue one step, and learn the results of this one or of the one before; outputs of the sequences that got tokens or ended."""
        outputs = self._admit_constrained() if self.grammars.num_waiting else []
        if self._under_way and self.scheduler.must_know_tokens:
            outputs += self._learn(keep=0)
        scheduled = self.scheduler.schedule()
        self._num_step_tokens = scheduled.total_num_scheduled_tokens
        pending = self.worker.execute(scheduled, partial(self.grammars.masks, scheduled.num_scheduled_tokens))
        self._under_way.append((scheduled, pending))
        # A step without tokens has nothing to be learnt while it is computed.
        return outputs + self._learn(keep=self._ahead if scheduled.num_scheduled_tokens else 0)

    def _learn(self, keep: int) -> list[EngineCoreOutput]:
        """Wait for the results of all steps under way but the last `keep`."""
        outputs = []
        while len(self._under_way) > keep:
            scheduled, pending = self._under_way.popleft()
            outputs += self.scheduler.update_from_output(scheduled, pending.result())
        return outputs

    def _admit_constrained(self) -> list[EngineCoreOutput]:
        """Queue the requests whose grammars are compiled by now; the ends of those whose grammars cannot be."""
        idle = not self.scheduler.has_unfinished_requests
        ready, failed = self.grammars.take_ready(timeout=SECONDS_FOR_GRAMMARS if idle else 0.0)
        for request in ready:
            self.scheduler.add_request(request)
        reason = "its structured output cannot be compiled"
        return [EngineCoreOutput(request.request_id, [], "abort", reason) for request in failed]

    def take_stats(self) -> SchedulerStats:
        """Where things stand, with the tokens of the last step if that has not been told yet."""
        stats = self.scheduler.stats()
        stats.num_waiting += self.grammars.num_waiting
        stats.num_step_tokens, self._num_step_tokens = self._num_step_tokens, 0
        return stats

    def set_gdn_variants(self, in_proj: str | None, decode: str | None, prefill: str | None) -> Variants | None:
        """`vllm.model_executor.layers.mamba.gdn_linear_attn.set_gdn_variants` of the loaded model, between two steps."""
        return set_gdn_variants(self.worker.runner.model, in_proj, decode, prefill)

    def reset_prefix_cache(self) -> bool:
        """Forget what is cached of prompts. Whether nothing is cached now: always, since no prompt outlives its request."""
        return True

    def start_profile(self) -> None:
        """See Profiler.start."""
        self._profiler.start()

    def stop_profile(self) -> str:
        """See Profiler.stop."""
        return self._profiler.stop()

    def check_idle(self) -> None:
        """Raise if anything is lost. Called whenever there is nothing left to do."""
        self.scheduler.assert_balanced()

    def prepare(self) -> None:
        """Do some tens of milliseconds of what a later step would have to wait for."""
        self.worker.runner.capture_next_graphs()

    @property
    def can_prepare(self) -> bool:
        """Whether there is anything to prepare."""
        return self.worker.runner.has_graphs_to_capture

    @property
    def has_unfinished_requests(self) -> bool:
        return self.scheduler.has_unfinished_requests or self.grammars.num_waiting > 0 or bool(self._under_way)
