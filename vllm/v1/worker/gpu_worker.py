"""One device: load the model onto it, find out how much memory is left, allocate the pools, run steps."""

from __future__ import annotations

import os
import time

import psutil
import torch

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.model_loader import load_model
from vllm.utils.cuda_context import make_small_context
from vllm.v1.core.memory_plan import GROWTH_BYTES, MemoryPlanError, PoolSizes, format_bytes, plan_pools, weight_bytes
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.model_runner import MakeMasks, ModelRunner
from vllm.v1.worker.pending import PendingOutput
from vllm.v1.worker.warm_up import compile_in_children, compile_kernels, run_largest_steps

logger = init_logger(__name__)

CONTEXT_BYTES = 640 << 20
"""The most that a CUDA context takes by itself; what is in use beyond it when we start belongs to other programs."""

CPU_POOL_BYTES = 4 << 30
"""Memory for both pools on a CPU when nothing is asked for: a machine that serves from RAM has other things in it."""


class Worker:
    """The device side of the engine.

    Args:
        config: validated configuration.
    """

    def __init__(self, config: VllmConfig) -> None:
        self.config = config
        self.device = torch.device(config.parallel_config.device)
        if self.device.type == "cuda":
            _let_segments_grow()
            self.device = torch.device("cuda", torch.cuda.current_device())
            make_small_context()
            self._free_at_start, self._total = torch.cuda.mem_get_info()

    def initialise(self) -> PoolSizes:
        """Load the model, measure, allocate. Returns the sizes of both pools."""
        self._check_weights_fit()
        start = time.perf_counter()
        model = load_model(self.config, self.device)
        self.runner = ModelRunner(self.config, model, self.device)
        logger.info("Model loaded in %.1f s", time.perf_counter() - start)
        self.sizes = sizes = self._plan(self._pool_budget())
        self.runner.bind(sizes)
        if self.device.type == "cuda":
            if self.config.cache_config.kv_cache_memory_bytes is not None:
                compile_in_children(self.runner)
                compile_kernels(self.runner)  # otherwise they ran when memory was measured
            start = time.perf_counter()
            prompts, batches = self.runner.capture_graphs()
            torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            done = "CUDA graphs for %d batch and %d prompt sizes captured in %.1f s, others when they are wanted or there is time"
            logger.info(done, batches, prompts, seconds)
        tokens = (sizes.num_blocks - 1) * self.config.cache_config.block_size
        logger.info("GDN state: %s in %d slots", format_bytes(sizes.state_bytes), sizes.num_slots)
        logger.info("KV pages:  %s in %d pages, %d tokens", format_bytes(sizes.kv_bytes), sizes.num_blocks, tokens)
        return sizes

    def execute(self, scheduled: SchedulerOutput, make_masks: MakeMasks | None = None) -> PendingOutput:
        """Queue one scheduled step, in which `make_masks` says what the constrained sequences may go on with."""
        return self.runner.execute(scheduled, make_masks)

    def _plan(self, budget: int, **limits: int | None) -> PoolSizes:
        """Sizes of both pools for the engine's limits, or for others in their place."""
        model, cache = self.config.model_config, self.config.cache_config
        asked = {
            "max_model_len": model.max_model_len,
            "max_num_seqs": self.config.scheduler_config.max_num_seqs,
            "num_gpu_blocks_override": cache.num_gpu_blocks_override,
        }
        return plan_pools(
            model.hf_config.text,
            budget,
            block_size=cache.block_size,
            kv_dtype=cache.kv_cache_dtype,
            conv_dtype=cache.mamba_cache_dtype,
            ssm_dtype=cache.mamba_ssm_cache_dtype,
            **asked | limits,
        )

    def _pool_budget(self) -> int:
        """Bytes for slots and pages together."""
        asked = self.config.cache_config.kv_cache_memory_bytes
        if asked is not None:
            return asked
        if self.device.type == "cpu":
            return min(CPU_POOL_BYTES, psutil.virtual_memory().available // 2)
        return self._measured_gpu_budget()

    def _check_weights_fit(self) -> None:
        """Say so before minutes of loading end in an allocation that fails. Raises MemoryPlanError."""
        model = self.config.model_config
        need = sum(weight_bytes(model.hf_config.text, model.dtype, self.config.quant_scheme).values())
        have = self._free_at_start if self.device.type == "cuda" else psutil.virtual_memory().available
        if need > have:
            raise MemoryPlanError(
                f"the weights take {format_bytes(need)} in {model.dtype} but {format_bytes(have)} of {self.device.type} memory "
                "are free: use a larger device, a quantised checkpoint, or --dtype bfloat16 where it is not"
            )

    def _measured_gpu_budget(self) -> int:
        """What the GPU has left beside the weights and the largest step's workspace, which is run once to be measured."""
        allowed = int(self._total * self.config.cache_config.gpu_memory_utilization)
        weights = torch.cuda.memory_allocated()
        pools = self._run_largest_steps()
        torch.cuda.synchronize()
        free, _ = torch.cuda.mem_get_info()
        peak = torch.cuda.max_memory_reserved()
        # What we hold beside torch's allocator: the CUDA context, loaded kernels, cuBLAS workspaces.
        context = min(self._total - self._free_at_start, CONTEXT_BYTES)
        beside = context + max(self._free_at_start - free - torch.cuda.memory_reserved(), 0)
        # Other programs' memory does not count against our share, but what they hold we cannot have.
        budget = min(allowed, self._free_at_start + context) - (peak - pools) - beside - GROWTH_BYTES
        logger.info(
            "GPU memory: %s of %s allowed; weights %s, largest step %s, CUDA and libraries %s; left for state and pages %s",
            *map(format_bytes, (allowed, self._total, weights, peak - pools - weights, beside, max(budget, 0))),
        )
        self.runner.unbind()
        torch.cuda.empty_cache()
        return budget

    def _run_largest_steps(self) -> int:
        """Run the steps that need most memory, on pools just large enough. Returns the bytes of those pools."""
        limits = {"max_model_len": self.config.longest_chunk, "max_num_seqs": 1, "num_gpu_blocks_override": None}
        pools = self._plan(1 << 60, **limits)
        self.runner.bind(pools)
        compile_in_children(self.runner)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run_largest_steps(self.runner)
        compile_kernels(self.runner)
        self.runner.rehearse_graphs(largest_alone=True)
        return pools.kv_bytes + pools.state_bytes


def _let_segments_grow() -> None:
    """Have PyTorch's allocator extend what it holds instead of adding to it, unless the user has set it up.

    Steps of different sizes use the same memory then: those that need most hold 0.5 GiB less on an H200 (docs/log.md).
    """
    if not any(os.environ.get(name) for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")):
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
