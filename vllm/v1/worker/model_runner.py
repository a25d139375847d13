"""One step on the device: build the batch, run the model, sample, report.

Nothing between the input copy and the copy of the sampled tokens waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from vllm.config import VllmConfig
from vllm.forward_context import ForwardContext, set_forward_context
from vllm.v1.attention.backends.gdn_attn import build_gdn_attention_metadata
from vllm.v1.attention.backends.paged_attn import build_paged_attention_metadata
from vllm.v1.core.memory_plan import PoolSizes
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.sample.logprobs import prompt_logprobs
from vllm.v1.sample.sampler import Sampler
from vllm.v1.sample.token_masks import DeviceMasks
from vllm.v1.structured_output.masks import TokenMasks
from vllm.v1.worker.caches import bind_caches, unbind_caches
from vllm.v1.worker.input_batch import InputBatch, StepInputs

MakeMasks = Callable[[], TokenMasks | None]


class ModelRunner:
    """Runs scheduled steps of one model.

    Args:
        config: the engine's configuration.
        model: the loaded network, on its device.
    """

    def __init__(self, config: VllmConfig, model: nn.Module, device: torch.device) -> None:
        self.config = config
        self.model = model
        self.device = device
        self.sampler = Sampler()
        self.eos_token_ids = frozenset(config.model_config.hf_config.eos_token_ids)

    def bind(self, sizes: PoolSizes) -> None:
        """Allocate both pools, hand each stateful layer its part, and start with no sequence."""
        bind_caches(self.model, self.config.cache_config, sizes, self.device)
        block_size = self.config.cache_config.block_size
        max_pages = -(-self.config.model_config.max_model_len // block_size)
        vocab_size = self.config.model_config.hf_config.text.vocab_size
        self.batch = InputBatch(self.config.scheduler_config.max_num_seqs, max_pages, vocab_size, self.device)

    def unbind(self) -> None:
        """Give the pools' memory back."""
        unbind_caches(self.model)
        del self.batch

    @torch.inference_mode()
    def execute(self, scheduled: SchedulerOutput, make_masks: MakeMasks | None = None) -> ModelRunnerOutput:
        """Compute the scheduled tokens; sample where a sequence's known tokens end.

        Args:
            make_masks: gives the masks of constrained sequences. It is called while the device computes.

        Returns the sampled tokens and the log-probabilities asked for, by request id.
        """
        self.batch.update(scheduled, self.eos_token_ids)
        if not scheduled.num_scheduled_tokens:
            return ModelRunnerOutput()
        step = self.batch.build_step(scheduled)
        hidden = self._forward(step)  # [T, D]
        output = ModelRunnerOutput()
        self._sample(step, hidden, output, None if make_masks is None else make_masks())
        self._score_prompts(step, hidden, output)
        self.batch.advance(step)
        return output

    def _forward(self, step: StepInputs) -> torch.Tensor:
        batch = self.batch
        context = ForwardContext(
            attn=build_paged_attention_metadata(step, batch.block_table, self.config.cache_config.block_size),
            gdn=build_gdn_attention_metadata(step, batch.state_slot),
        )
        with set_forward_context(context):
            return self.model(step.input_ids, step.positions)

    def _sample(
        self, step: StepInputs, hidden: torch.Tensor, output: ModelRunnerOutput, masks: TokenMasks | None
    ) -> None:
        """Draw the next token of every sequence whose last known token is in this step."""
        ready = [i for i, s in enumerate(step.sequences) if step.seq_lens_cpu[i] == len(s.token_ids)]
        if not ready:
            return
        rows, last = step.rows, step.query_start_loc[1:].long() - 1  # [S]
        if len(ready) < len(step.sequences):
            index = torch.tensor(ready, device=self.device)
            rows, last = rows[index], last[index]
        logits = self.model.compute_logits(hidden[last])  # [R, vocab]
        state = self.batch.sampling
        allowed = None
        if masks is not None:
            place = {step.request_ids[i]: place for place, i in enumerate(ready)}
            allowed = DeviceMasks(masks.words, [place[request_id] for request_id in masks.request_ids], self.device)
        sampled = self.sampler(logits, state, rows, allowed)
        self.batch.last_token[rows] = sampled.token_ids
        state.append(rows, sampled.token_ids)

        num_logprobs = [state.num_logprobs.get(step.sequences[i].row) for i in ready]
        token_ids, logprobs = sampled.to_lists(num_logprobs)  # the step's one wait for the device
        for i, token_id, scores in zip(ready, token_ids, logprobs, strict=True):
            request_id = step.request_ids[i]
            step.sequences[i].token_ids.append(token_id)
            output.sampled_token_ids[request_id] = [token_id]
            if scores is not None:
                output.logprobs[request_id] = [scores]

    def _score_prompts(self, step: StepInputs, hidden: torch.Tensor, output: ModelRunnerOutput) -> None:
        """Log-probabilities of prompt tokens: position p of the prompt predicts the prompt's token p + 1."""
        offset = 0
        for request_id, sequence, n in zip(step.request_ids, step.sequences, step.query_lens_cpu, strict=True):
            k, start = sequence.sampling_params.prompt_logprobs, sequence.num_computed_tokens
            scored = min(n, sequence.num_prompt_tokens - 1 - start)
            if k is not None and scored > 0:
                targets = torch.tensor(sequence.token_ids[start + 1 : start + 1 + scored], device=self.device)
                k = k if k >= 0 else self.batch.sampling.vocab_size
                scores = prompt_logprobs(hidden[offset : offset + scored], self.model.compute_logits, targets, k)
                output.prompt_logprobs[request_id] = scores.to_lists([k] * scored)
            offset += n
