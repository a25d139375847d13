"""One step on the device: build the batch, run the model, sample, and leave a promise of the results.

Nothing here waits for the device, so a step can be queued while the one before it is computed. Sequences that compute one token each run
on tensors that stay in place (`DecodeBatch`), on a GPU as two CUDA graphs: the network, and the choice of the tokens. So do chunks of prompts
(`PromptBatch`), if they are not too long together. Other steps are launched kernel by kernel, all of it together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import nn

from vllm.config import VllmConfig
from vllm.forward_context import ForwardContext, set_forward_context
from vllm.model_executor.layers.ops.decode_step import commit_tokens
from vllm.v1.attention.backends.gdn_attn import build_gdn_attention_metadata
from vllm.v1.attention.backends.paged_attn import build_paged_attention_metadata
from vllm.v1.core.memory_plan import PoolSizes
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.sample.logprobs import prompt_logprobs
from vllm.v1.sample.sampler import Sampler
from vllm.v1.sample.token_masks import DeviceMasks
from vllm.v1.structured_output.masks import TokenMasks
from vllm.v1.worker.caches import bind_caches, unbind_caches
from vllm.v1.worker.cudagraph import EARLY, EARLY_TOKENS, GraphCache, capture_order, capture_sizes, padded_size
from vllm.v1.worker.decode_batch import DecodeBatch
from vllm.v1.worker.input_batch import InputBatch, Sequence, StepInputs
from vllm.v1.worker.pending import PendingOutput
from vllm.v1.worker.prompt_batch import PromptBatch

MakeMasks = Callable[[], TokenMasks | None]

MOST_PROMPTS = 64
"""Sequences whose chunks have room in one graph. Each leaves some programs of every kernel without work where it is not there."""


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
        self._gdn_layers = model.stateful_layers().gdn

    def bind(self, sizes: PoolSizes) -> None:
        """Allocate both pools, hand each stateful layer its part, and start with no sequence."""
        bind_caches(self.model, self.config.cache_config, sizes, self.device)
        block_size, max_model_len = self.config.cache_config.block_size, self.config.model_config.max_model_len
        max_num_seqs, text = self.config.scheduler_config.max_num_seqs, self.config.model_config.hf_config.text
        max_pages = -(-max_model_len // block_size)
        self.batch = InputBatch(max_num_seqs, max_pages, text.vocab_size, self.device)
        self.decode = DecodeBatch(self.batch, block_size, max_model_len)
        self._graph_sizes: tuple[int, ...] = ()
        self._graphs_to_capture: list[tuple[DecodeBatch | PromptBatch, int]] = []
        compilation, dtype = self.config.compilation_config, self.config.model_config.dtype
        if self.device.type == "cuda" and compilation.decode_graphs:
            most = min(max_num_seqs, compilation.max_capture_size or max_num_seqs)
            self._graph_sizes = capture_sizes(most, compilation.capture_sizes)
            self.graphs = GraphCache(self.device)
        # one prompt has graphs of its own, whose kernels need no room for others
        sizes, most = self.config.prompt_sizes, min(MOST_PROMPTS, max_num_seqs)
        self.prompt = PromptBatch(self.batch, block_size, max_model_len, sizes(1), 1)
        self.prompts = PromptBatch(self.batch, block_size, max_model_len, sizes(most) if most > 1 else (), most)
        self._prompts_in_graphs = False  # before `capture_graphs`
        # what the network's graph leaves for the sampler's
        self._hidden = torch.empty(max_num_seqs, text.hidden_size, dtype=getattr(torch, dtype), device=self.device)
        self._sampled = torch.empty(max_num_seqs, dtype=torch.int32, device=self.device)

    def unbind(self) -> None:
        """Give the pools' memory back, and the graphs captured over them."""
        unbind_caches(self.model)
        self.__dict__.pop("graphs", None)
        del self.batch, self.decode, self.prompt, self.prompts

    @torch.inference_mode()
    def execute(self, scheduled: SchedulerOutput, make_masks: MakeMasks | None = None) -> PendingOutput:
        """Queue the computation of the scheduled tokens, and of the next one where a sequence's known tokens end.

        Args:
            make_masks: gives the masks of constrained sequences. It is called while the device computes.
        """
        self.batch.update(scheduled, self.eos_token_ids)
        output = PendingOutput()
        if not scheduled.num_scheduled_tokens:
            return output
        sequences = {request_id: self.batch.sequences[request_id] for request_id in scheduled.num_scheduled_tokens}
        decoding = {request_id: sequence for request_id, sequence in sequences.items() if sequence.is_decoding}
        prompts = {
            request_id: n for request_id, n in scheduled.num_scheduled_tokens.items() if request_id not in decoding
        }
        batch, size = self._prompt_batch([sequences[request_id] for request_id in prompts], list(prompts.values()))
        if prompts and size is None:
            step = self.batch.build_step(scheduled)
            with self._graph_memory():
                self._compute_chunks(step, output, make_masks)
            return output
        masks = make_masks and cache(make_masks)
        if decoding:
            self._decode(tuple(decoding), list(decoding.values()), output, masks)
        if prompts:
            self._compute_prompts(prompts, batch, size, output, masks)
        return output

    # Sequences of one token each

    def _decode(
        self,
        request_ids: tuple[str, ...],
        sequences: list[Sequence],
        output: PendingOutput,
        make_masks: MakeMasks | None,
    ) -> None:
        n = len(sequences)
        size = padded_size(self._graph_sizes, n)
        self.decode.select([sequence.row for sequence in sequences], size or n)
        if size is None:
            with self._graph_memory():
                hidden = self.decode.forward(self.model, n, [s.num_computed_tokens + 1 for s in sequences])
        else:
            self._replay(self.decode, self._key("forward", size), lambda: self._graph_forward(size))
            hidden = self._hidden[:n]
        self._choose(request_ids, sequences, hidden, size, output, make_masks)
        for sequence in sequences:
            sequence.num_computed_tokens += 1

    def _choose(
        self,
        request_ids: tuple[str, ...],
        sequences: list[Sequence],
        hidden: torch.Tensor,
        size: int | None,
        output: PendingOutput,
        make_masks: MakeMasks | None,
    ) -> None:
        """Draw the next token of the sequences in the decode batch, and note it there.

        Args:
            hidden: [S, D]; the first rows of `_hidden` where there is a size.
            size: that the batch is padded to, for a graph.
        """
        n, state = len(sequences), self.batch.sampling
        masks = self._device_masks(make_masks, request_ids)
        if size is not None and masks is None and state.plan.in_graphs:
            self._replay(self.decode, ("sample", size, state.plan), lambda: self._graph_sample(size))
            packed, num_logprobs = self._sampled[:n, None], [None] * n
        else:
            rows = self.decode.rows[:n]
            with self._graph_memory():
                sampled = self.sampler(self.model.compute_logits(hidden), state, rows, masks)
                state.note(rows, sampled.token_ids)
                commit_tokens(rows, sampled.token_ids, self.batch.tables)
                packed, num_logprobs = sampled.packed(), [state.num_logprobs.get(s.row) for s in sequences]
        output.add_sampled(request_ids, packed, num_logprobs)

    def _graph_memory(self) -> AbstractContextManager:
        """For what is launched kernel by kernel: between two graphs it may use their memory (`GraphCache.memory`)."""
        return self.graphs.memory() if hasattr(self, "graphs") else nullcontext()

    def _key(self, name: str, size: int) -> tuple:
        """Of a graph of the network. Variants may change between two steps, and each has graphs of its own."""
        return (name, size, *(layer.variants for layer in self._gdn_layers[:1]))

    def _graph_forward(self, size: int) -> None:
        self._hidden[:size].copy_(self.decode.forward(self.model, size))

    def _graph_sample(self, size: int) -> None:
        rows = self.decode.rows[:size]
        sampled = self.sampler(self.model.compute_logits(self._hidden[:size]), self.batch.sampling, rows)
        commit_tokens(rows, sampled.token_ids, self.batch.tables)
        self._sampled[:size].copy_(sampled.token_ids)

    def _replay(self, batch: DecodeBatch | PromptBatch, key: tuple, run: Callable[[], None]) -> None:
        """Queue a graph over the batch, captured when it is first wanted."""
        if key not in self.graphs:
            self._capture(batch, key, run)
        self.graphs.replay(key)

    def _capture(self, batch: DecodeBatch | PromptBatch, key: tuple, run: Callable[[], None]) -> None:
        """Compile what `run` launches by running it over rows of nobody, then record it."""
        with batch.nobodys(key[1]):
            with self._graph_memory():
                run()
            self.graphs.capture(key, run)

    @torch.inference_mode()
    def capture_graphs(self) -> tuple[int, int]:
        """Capture graphs of prompts and of greedy decoding before the first request wants them, the largest first, which makes room for
        all. Prompts run in graphs from here on, so that those that warm up before compile the kernels of steps without.

        Returns how many sizes of prompts' chunks, and of batches, have them now.
        """
        self._prompts_in_graphs = True
        prompts, later_prompts = capture_order(self.prompt.sizes, EARLY_TOKENS)
        batches, later_batches = capture_order(self._graph_sizes, EARLY)
        later = (self.prompt, later_prompts), (self.prompts, self.prompts.sizes), (self.decode, later_batches)
        self._graphs_to_capture = _each_size(*later)
        for batch, size in _each_size((self.prompt, prompts), (self.decode, batches)):
            for key, run in self._graphs_of(batch, size):
                self._capture(batch, key, run)
        return len(prompts), len(batches)

    @property
    def has_graphs_to_capture(self) -> bool:
        """Whether sizes are left that `capture_graphs` has left out."""
        return bool(self._graphs_to_capture)

    @torch.inference_mode()
    def capture_next_graphs(self) -> None:
        """Capture those of one such size, unless a step has wanted them already."""
        batch, size = self._graphs_to_capture.pop(0)
        for key, run in self._graphs_of(batch, size):
            if key not in self.graphs:
                self._capture(batch, key, run)

    @torch.inference_mode()
    def rehearse_graphs(self, largest_alone: bool = False) -> None:
        """Run over rows of nobody what graphs are captured of.

        Args:
            largest_alone: of each kind, to see what room they need.
        """
        order = slice(-1, None) if largest_alone else slice(None, None, -1)
        kinds = (self.prompt, self.prompt.sizes), (self.prompts, self.prompts.sizes), (self.decode, self._graph_sizes)
        for batch, size in _each_size(*((batch, sizes[order]) for batch, sizes in kinds)):
            for _, run in self._graphs_of(batch, size):
                with batch.nobodys(size), self._graph_memory():
                    run()

    def _graphs_of(self, batch: DecodeBatch | PromptBatch, size: int) -> list[tuple[tuple, Callable[[], None]]]:
        """Their keys, and what each is captured of."""
        if isinstance(batch, PromptBatch):
            return [(self._prompt_key(batch, size), lambda: self._graph_prompt(batch, size))]
        sample = ("sample", size, self.batch.sampling.plan)
        return [
            (self._key("forward", size), lambda: self._graph_forward(size)),
            (sample, lambda: self._graph_sample(size)),
        ]

    # Chunks of prompts that are not too long

    def _prompt_batch(self, sequences: list[Sequence], lengths: list[int]) -> tuple[PromptBatch, int | None]:
        """Where chunks of these lengths go, and the size that they are padded to together; None where kernels are launched one by one: for
        long chunks, for prompts whose tokens are scored, and for variants that ask the device for lengths.
        """
        batch = self.prompt if len(lengths) == 1 else self.prompts
        asks_device = self.device.type == "cuda" and any(
            layer.variants.prefill == "torch" for layer in self._gdn_layers
        )
        scored = any(sequence.sampling_params.prompt_logprobs is not None for sequence in sequences)
        if not self._prompts_in_graphs or asks_device or scored or len(lengths) > batch.most:
            return batch, None
        return batch, padded_size(batch.sizes, sum(lengths))

    def _compute_prompts(
        self,
        lengths: dict[str, int],
        batch: PromptBatch,
        size: int,
        output: PendingOutput,
        make_masks: MakeMasks | None,
    ) -> None:
        """Args: tokens of each request's chunk; what `_prompt_batch` says of them."""
        chunks: dict[str, list[int]] = {}
        for request_id, n in lengths.items():
            sequence = self.batch.sequences[request_id]
            start, sequence.num_computed_tokens = sequence.num_computed_tokens, sequence.num_computed_tokens + n
            chunks[request_id] = sequence.token_ids[start : start + n]
        is_ready = lambda sequence: sequence.num_computed_tokens >= len(sequence.token_ids)
        # those whose next token is drawn come first, as the first rows of `_hidden`
        order = sorted(chunks, key=lambda request_id: not is_ready(self.batch.sequences[request_id]))
        sequences = [self.batch.sequences[request_id] for request_id in order]
        ready = [sequence for sequence in sequences if is_ready(sequence)]
        batch.select([sequence.row for sequence in sequences], [chunks[request_id] for request_id in order], len(ready))
        self._replay(batch, self._prompt_key(batch, size), lambda: self._graph_prompt(batch, size))
        if ready:
            # from here on they are a batch that decodes
            n = len(ready)
            batch_size = padded_size(self._graph_sizes, n)
            self.decode.select([sequence.row for sequence in ready], batch_size or n)
            self._choose(tuple(order[:n]), ready, self._hidden[:n], batch_size, output, make_masks)

    def _prompt_key(self, batch: PromptBatch, size: int) -> tuple:
        return self._key("prompt" if batch is self.prompt else "prompts", size)

    def _graph_prompt(self, batch: PromptBatch, size: int) -> None:
        self._hidden[: batch.most].copy_(batch.forward(self.model, size))

    # Chunks of prompts with all else that there is

    def _compute_chunks(self, step: StepInputs, output: PendingOutput, make_masks: MakeMasks | None) -> None:
        batch = self.batch
        context = ForwardContext(
            attn=build_paged_attention_metadata(step, batch.block_table, self.config.cache_config.block_size),
            gdn=build_gdn_attention_metadata(step, batch.state_slot),
        )
        with set_forward_context(context):
            hidden = self.model(step.input_ids, step.positions)  # [T, D]
        self._sample(step, hidden, output, make_masks)
        self._score_prompts(step, hidden, output)
        batch.advance(step)

    def _sample(
        self, step: StepInputs, hidden: torch.Tensor, output: PendingOutput, make_masks: MakeMasks | None
    ) -> None:
        """Draw the next token of every sequence whose last known token is in this step."""
        ready = step.ready
        request_ids = [step.request_ids[i] for i in ready]
        masks = self._device_masks(make_masks, request_ids)
        if not ready:
            return
        rows, last = step.rows, step.query_start_loc[1:].long() - 1  # [S]
        if len(ready) < len(step.sequences):
            (index,) = self.batch.to_device([ready])
            rows, last = rows[index], last[index]
        state = self.batch.sampling
        sampled = self.sampler(self.model.compute_logits(hidden[last]), state, rows, masks)
        self.batch.last_token[rows] = sampled.token_ids
        state.append(rows, sampled.token_ids)
        num_logprobs = [state.num_logprobs.get(step.sequences[i].row) for i in ready]
        output.add_sampled(request_ids, sampled.packed(), num_logprobs)

    def _score_prompts(self, step: StepInputs, hidden: torch.Tensor, output: PendingOutput) -> None:
        """Log-probabilities of prompt tokens: position p of the prompt predicts the prompt's token p + 1."""
        offset = 0
        for request_id, sequence, n in zip(step.request_ids, step.sequences, step.query_lens_cpu, strict=True):
            k, start = sequence.sampling_params.prompt_logprobs, sequence.num_computed_tokens
            scored = min(n, sequence.num_prompt_tokens - 1 - start)
            if k is not None and scored > 0:
                (targets,) = self.batch.to_device([sequence.token_ids[start + 1 : start + 1 + scored]])
                k = k if k >= 0 else self.batch.sampling.vocab_size
                scores = prompt_logprobs(hidden[offset : offset + scored], self.model.compute_logits, targets, k)
                output.add_prompt_logprobs(request_id, scores, k)
            offset += n

    def _device_masks(self, make_masks: MakeMasks | None, request_ids: Iterable[str]) -> DeviceMasks | None:
        """The masks of this step, for logits with one row a request of `request_ids`."""
        masks = None if make_masks is None else make_masks()
        if masks is None:
            return None
        place = {request_id: place for place, request_id in enumerate(request_ids)}
        ours = [i for i, request_id in enumerate(masks.request_ids) if request_id in place]
        if not ours:
            return None
        return DeviceMasks(masks.words[ours], [place[masks.request_ids[i]] for i in ours], self.device)


def _each_size(
    *kinds: tuple[DecodeBatch | PromptBatch, Iterable[int]],
) -> list[tuple[DecodeBatch | PromptBatch, int]]:
    return [(batch, size) for batch, sizes in kinds for size in sizes]
