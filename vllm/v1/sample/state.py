"""Sampling parameters of the running sequences, on the device, one row a sequence.

A sequence keeps its row until it is removed, so rows in use are sparse. Parameters that every sequence has are columns of two
small tensors; what few sequences use (penalty counts, allow-lists, biases, bad words, stop bans) lives in tables that grow with
their number. Nothing here waits for the device: the host knows which features are in use because it was told in `add`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from vllm.sampling_params import SamplingParams
from vllm.v1.sample.constraints import AllowLists, BadWords, LogitBias, StopBans
from vllm.v1.sample.penalties import PenaltyTable
from vllm.v1.sample.row_table import to_device

WIDEST_TOP_K = 1024
"""The largest top_k found with a partial selection; beyond it the whole row is sorted."""


@dataclass(frozen=True)
class SamplingPlan:
    """What the rows in the state need, taken together. Equal plans run the same operations, so a plan can key a CUDA graph."""

    draws: bool = False  # some row has a temperature
    penalties: bool = False
    allow_lists: bool = False
    bad_words: bool = False
    logit_bias: bool = False
    stop_bans: bool = False
    min_p: bool = False
    top_p: bool = False
    num_sorted: int = 0  # how many of the largest logits top_k and top_p must see in order
    num_logprobs: int | None = None

    @property
    def in_graphs(self) -> bool:
        """Whether all that the choice needs lies in tensors that stay in place, so that a CUDA graph can make it."""
        return not self.edits and self.num_logprobs is None

    @property
    def edits(self) -> bool:
        """Whether some row's logits change before the choice, other than by a temperature."""
        return self.penalties or self.allow_lists or self.bad_words or self.logit_bias or self.stop_bans


class SamplingState:
    """Device state of up to `max_num_seqs` sequences, in rows 0 .. max_num_seqs-1.

    One more row, `pad_row`, belongs to nobody: it is greedy, and a batch padded to a fixed size may name it any number of times.

    Attributes, each [max_num_seqs+1]:
        seeds, num_generated, top_k: int64. num_generated is the index of the token to be drawn next.
        temperature (1 for greedy rows), noise (0 for greedy rows, else 1), top_p, log_min_p, repetition, frequency, presence: float32.
    """

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device | str) -> None:
        self.max_num_seqs = self.pad_row = max_num_seqs
        self.vocab_size = vocab_size
        self.device = device = torch.device(device)
        num_rows = max_num_seqs + 1

        self._ints = torch.zeros(3, num_rows, dtype=torch.int64, device=device)
        self.seeds, self.num_generated, self.top_k = self._ints
        self._floats = torch.zeros(7, num_rows, dtype=torch.float32, device=device)
        self.temperature, self.noise, self.top_p, self.log_min_p = self._floats[:4]
        self.repetition, self.frequency, self.presence = self._floats[4:]
        self._write(self.pad_row, SamplingParams(temperature=0.0), 0)

        self.penalties = PenaltyTable(num_rows, vocab_size, device)
        self.allow_lists = AllowLists(num_rows, vocab_size, device)
        self.bad_words = BadWords(num_rows, device)
        self.logit_bias = LogitBias(num_rows, device)
        self.stop_bans = StopBans(num_rows, device)
        self._tables = [
            part.table for part in (self.penalties, self.allow_lists, self.bad_words, self.logit_bias, self.stop_bans)
        ]
        self._params: dict[int, SamplingParams] = {}
        self.num_logprobs: dict[int, int] = {}  # row -> how many, for rows that report any
        self._plan: SamplingPlan | None = None

    def __len__(self) -> int:
        return len(self._params)

    def add(
        self,
        row: int,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        output_token_ids: Sequence[int],
        eos_token_ids: Iterable[int],
    ) -> None:
        """Give `row` to a sequence.

        Args:
            row: 0 .. max_num_seqs-1, not in use.
            params: as the input processor made them: a seed (with the token's index it decides every draw; 0 without one),
                ids within the vocabulary, bad words as token ids.
            output_token_ids: what a resumed sequence has generated already.
            eos_token_ids: end-of-sequence tokens, which min_tokens holds back.
        """
        if not 0 <= row < self.max_num_seqs:
            raise ValueError(f"row {row} is outside 0 .. {self.max_num_seqs - 1}")
        if row in self._params:
            raise ValueError(f"row {row} is in use")
        self._params[row] = params
        self._plan = None
        self._write(row, params, len(output_token_ids))
        if params.has_penalties:
            self.penalties.add(row, prompt_token_ids, output_token_ids)
        if params.allowed_token_ids:
            self.allow_lists.add(row, params.allowed_token_ids)
        if params.bad_words_token_ids:
            self.bad_words.add(row, params.bad_words_token_ids, output_token_ids)
        if params.logit_bias:
            self.logit_bias.add(row, params.logit_bias)
        stops = {*eos_token_ids, *(params.stop_token_ids or ())}
        if stops and params.min_tokens > len(output_token_ids):
            self.stop_bans.add(row, params.min_tokens, stops)
        if params.logprobs is not None:
            self.num_logprobs[row] = self.vocab_size if params.logprobs < 0 else min(params.logprobs, self.vocab_size)

    def remove(self, row: int) -> None:
        """Take `row` back; what it held in the tables is free at once."""
        del self._params[row]
        self._plan = None
        self.num_logprobs.pop(row, None)
        for table in self._tables:
            table.release(row)

    def append(self, rows: torch.Tensor, token_ids: torch.Tensor) -> None:
        """Note that each row generated a token.

        Args:
            rows: [S] int64, each row at most once except `pad_row`.
            token_ids: [S] integer.
        """
        self.num_generated.index_add_(0, rows, torch.ones_like(rows))
        self.note(rows, token_ids)

    def note(self, rows: torch.Tensor, token_ids: torch.Tensor) -> None:
        """The part of `append` that is more than counting, for a caller that counts."""
        token_ids = token_ids.to(torch.int64)
        plan = self.plan
        if plan.penalties:
            self.penalties.append(rows, token_ids)
        if plan.bad_words:
            self.bad_words.append(rows, token_ids)

    @property
    def plan(self) -> SamplingPlan:
        """The features in use by any row, kept until a row comes or goes."""
        if self._plan is None:
            self._plan = self._make_plan()
        return self._plan

    def _make_plan(self) -> SamplingPlan:
        drawn = [params for params in self._params.values() if not params.greedy]
        top_k = [params.top_k for params in drawn if 0 < params.top_k < self.vocab_size]
        sort_all = any(params.top_p < 1.0 and not 0 < params.top_k < self.vocab_size for params in drawn)
        num_sorted = 0
        if sort_all or max(top_k, default=0) > WIDEST_TOP_K:
            num_sorted = self.vocab_size
        elif top_k:
            num_sorted = min(self.vocab_size, 1 << (max(top_k) - 1).bit_length())
        return SamplingPlan(
            draws=bool(drawn),
            penalties=len(self.penalties.table) > 0,
            allow_lists=len(self.allow_lists.table) > 0,
            bad_words=len(self.bad_words.table) > 0,
            logit_bias=len(self.logit_bias.table) > 0,
            stop_bans=len(self.stop_bans.table) > 0,
            min_p=any(params.min_p > 0.0 for params in drawn),
            top_p=any(params.top_p < 1.0 for params in drawn),
            num_sorted=num_sorted,
            num_logprobs=max(self.num_logprobs.values(), default=None),
        )

    def _write(self, row: int, params: SamplingParams, num_generated: int) -> None:
        """A greedy row's values leave its largest logit the largest, so that mixed batches need no second path."""
        top_k, draw = 0, [1.0, 0.0, 1.0, -math.inf]
        if not params.greedy:
            top_k = params.top_k if params.top_k < self.vocab_size else 0
            log_min_p = math.log(params.min_p) if params.min_p > 0.0 else -math.inf
            draw = [params.temperature, 1.0, params.top_p, log_min_p]
        penalties = [params.repetition_penalty, params.frequency_penalty, params.presence_penalty]
        self._ints[:, row] = to_device([params.seed or 0, num_generated, top_k], torch.int64, self.device)
        self._floats[:, row] = to_device(draw + penalties, torch.float32, self.device)
