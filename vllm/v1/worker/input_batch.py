"""The sequences the worker knows, one row each, and the flat batch of one step.

A sequence keeps its row from its first step to its last. What a step needs of it lives on the device under that row: the newest
token, the number of tokens before it, the page table, the state slot, the sampling parameters. The host keeps what it must know to
build batches without asking the device: the tokens it was told, and how many are computed. It never waits for those that are sampled.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch

from vllm.forward_context import PAD_SLOT_ID
from vllm.model_executor.layers.ops.decode_step import DecodeTables
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.sample.state import SamplingState


@dataclass(slots=True)
class Sequence:
    """The host's side of one row."""

    row: int
    token_ids: list[int]  # those it came with: its prompt and, if it was sent back before, what it had generated
    num_prompt_tokens: int
    sampling_params: SamplingParams
    num_computed_tokens: int
    num_pages: int = 0

    @property
    def is_decoding(self) -> bool:
        """Whether its next token is one that was sampled, or the last one it came with."""
        return self.num_computed_tokens >= max(1, len(self.token_ids) - 1)


@dataclass(frozen=True)
class StepInputs:
    """One step's flat batch: T tokens of S sequences, decoding sequences first.

    Tensors are on the device; `*_cpu` are the host's copies of the same numbers.
    """

    request_ids: tuple[str, ...]  # [S]
    sequences: tuple[Sequence, ...]  # [S]
    rows: torch.Tensor  # [S] int64
    token_rows: torch.Tensor  # [T] int64: row of each token's sequence
    input_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    query_start_loc: torch.Tensor  # [S+1] int32
    seq_lens: torch.Tensor  # [S] int32: tokens of the sequence after this step
    has_state: torch.Tensor  # [S] bool: tokens were computed before this step
    query_lens_cpu: tuple[int, ...]
    seq_lens_cpu: tuple[int, ...]
    num_decodes: int

    @property
    def ready(self) -> list[int]:
        """Sequences whose next token can be sampled: all tokens before it are in this step, or were."""
        return [i for i, (s, n) in enumerate(zip(self.sequences, self.seq_lens_cpu)) if n >= len(s.token_ids)]


@dataclass
class _PageUpdates:
    """Entries of the page table that changed since the last step."""

    rows: list[int] = field(default_factory=list)
    columns: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)


class InputBatch:
    """Rows of sequences, on the host and on the device.

    Args:
        max_num_seqs: rows.
        max_pages: entries of a row's page table: pages of the longest sequence allowed.
        vocab_size: logits of a row, for the sampling state.
        device: where the step's tensors live.

    The device's tables have one row more than there can be sequences: `pad_row`, nobody's, for the padding of a batch.
    """

    def __init__(self, max_num_seqs: int, max_pages: int, vocab_size: int, device: torch.device) -> None:
        self.device = device
        self.sequences: dict[str, Sequence] = {}
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))
        self._updates = _PageUpdates()
        self.pages_changed = False  # since a decode batch last looked
        self.sampling = SamplingState(max_num_seqs, vocab_size, device)
        self.pad_row, rows = self.sampling.pad_row, self.sampling.pad_row + 1
        self.last_token, self.num_computed = torch.zeros(2, rows, dtype=torch.int64, device=device).unbind(0)
        self.block_table = torch.zeros(rows, max_pages, dtype=torch.int32, device=device)
        self.state_slot = torch.full((rows,), PAD_SLOT_ID, dtype=torch.int32, device=device)
        self.tables = DecodeTables(self.last_token, self.num_computed, self.sampling.num_generated)

    def update(self, scheduled: SchedulerOutput, eos_token_ids: frozenset[int]) -> None:
        """Bring the rows in line with the scheduler's decision: forget, add, append pages, in this order."""
        for request_id in scheduled.finished_request_ids:
            self._forget(request_id)
        for request in scheduled.new_requests:
            self._add(request, eos_token_ids)
        for request_id, block_ids in scheduled.new_block_ids.items():
            self._append_pages(self.sequences[request_id], block_ids)
        self._flush_page_updates()

    def _forget(self, request_id: str) -> None:
        # An aborted request may never have reached the worker.
        sequence = self.sequences.pop(request_id, None)
        if sequence is not None:
            self.sampling.remove(sequence.row)
            self._free_rows.append(sequence.row)

    def _add(self, request: NewRequestData, eos_token_ids: frozenset[int]) -> None:
        row = self._free_rows.pop()
        prompt, output = request.token_ids[: request.num_prompt_tokens], request.token_ids[request.num_prompt_tokens :]
        sequence = Sequence(
            row,
            list(request.token_ids),
            request.num_prompt_tokens,
            request.sampling_params,
            request.num_computed_tokens,
        )
        self.sequences[request.request_id] = sequence
        # fill_, because assigning a number to an element makes the host wait for the device
        self.last_token[row].fill_(request.token_ids[-1])
        self.num_computed[row].fill_(request.num_computed_tokens)
        self.state_slot[row].fill_(request.state_slot)
        self.sampling.add(row, request.sampling_params, prompt, output, eos_token_ids)
        self._append_pages(sequence, request.block_ids)

    def _append_pages(self, sequence: Sequence, block_ids: Iterable[int]) -> None:
        for page in block_ids:
            self._updates.rows.append(sequence.row)
            self._updates.columns.append(sequence.num_pages)
            self._updates.pages.append(page)
            sequence.num_pages += 1

    def _flush_page_updates(self) -> None:
        if not self._updates.rows:
            return
        self.pages_changed = True
        rows, columns, pages = self.to_device([self._updates.rows, self._updates.columns, self._updates.pages])
        self.block_table[rows, columns] = pages.int()
        self._updates = _PageUpdates()

    def build_step(self, scheduled: SchedulerOutput) -> StepInputs:
        """The flat batch of the scheduled tokens, with one copy from the host to the device."""
        request_ids = tuple(scheduled.num_scheduled_tokens)
        sequences = tuple(self.sequences[request_id] for request_id in request_ids)
        query_lens = tuple(scheduled.num_scheduled_tokens.values())
        starts = [sequence.num_computed_tokens for sequence in sequences]
        seq_lens = tuple(start + n for start, n in zip(starts, query_lens, strict=True))
        decoding = [start > 0 and n == 1 for start, n in zip(starts, query_lens, strict=True)]
        num_decodes = sum(decoding)
        assert all(decoding[:num_decodes]), "the scheduler puts decoding sequences first"

        # A sequence's newest token is on the device already (last_token); -1 stands for it here.
        tokens: list[int] = []
        for sequence, start, n in zip(sequences, starts, query_lens, strict=True):
            tokens.extend([-1] if sequence.is_decoding else sequence.token_ids[start : start + n])
        rows = np.array([sequence.row for sequence in sequences])
        lens = np.array(query_lens)
        query_start_loc = np.concatenate([[0], np.cumsum(lens)])
        positions = np.arange(query_start_loc[-1]) - np.repeat(query_start_loc[:-1] - np.array(starts), lens)

        device = self.to_device([rows, np.repeat(rows, lens), tokens, positions, query_start_loc, seq_lens, starts])
        rows_d, token_rows, tokens_d, positions_d, query_start_loc_d, seq_lens_d, starts_d = device
        return StepInputs(
            request_ids=request_ids,
            sequences=sequences,
            rows=rows_d,
            token_rows=token_rows,
            input_ids=torch.where(tokens_d >= 0, tokens_d, self.last_token[token_rows]),
            positions=positions_d,
            query_start_loc=query_start_loc_d.int(),
            seq_lens=seq_lens_d.int(),
            has_state=starts_d > 0,
            query_lens_cpu=query_lens,
            seq_lens_cpu=seq_lens,
            num_decodes=num_decodes,
        )

    def advance(self, step: StepInputs) -> None:
        """Note, on the host and on the device, that the step's tokens are computed."""
        self.num_computed[step.rows] = step.seq_lens.long()
        for sequence, n in zip(step.sequences, step.query_lens_cpu, strict=True):
            sequence.num_computed_tokens += n

    def to_device(self, arrays: list) -> list[torch.Tensor]:
        """Several int64 vectors in one transfer, through pinned memory where that saves a wait."""
        arrays = [np.asarray(a, dtype=np.int64) for a in arrays]
        packed = torch.from_numpy(np.concatenate(arrays))
        if self.device.type == "cuda":
            packed = packed.pin_memory().to(self.device, non_blocking=True)
        return list(packed.split([len(a) for a in arrays]))
