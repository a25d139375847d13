"""Repetition, presence and frequency penalties."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm.v1.sample.row_table import RowTable, to_device

_IN_PROMPT = 1 << 30
_COUNT = _IN_PROMPT - 1


class PenaltyTable:
    """For rows with penalties: how often each token was generated, and whether the prompt has it.

    Both live in one int32 a token: the count in the low 30 bits, the prompt's mark above them.
    """

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device) -> None:
        self.table = RowTable(num_rows, device)
        self.table.add_column("marks", (vocab_size,), torch.int32, 0)

    def add(self, row: int, prompt_token_ids: Sequence[int], output_token_ids: Sequence[int]) -> None:
        entry = self.table.take(row)
        marks = self.table["marks"][entry]  # [V]
        marks.index_fill_(0, to_device(list(prompt_token_ids), torch.int64, marks.device), _IN_PROMPT)
        if output_token_ids:
            ids = to_device(list(output_token_ids), torch.int64, marks.device)
            marks.scatter_add_(0, ids, torch.ones_like(ids, dtype=torch.int32))

    def append(self, rows: torch.Tensor, token_ids: torch.Tensor) -> None:
        """Count one generated token a row; rows without an entry add nothing to entry 0."""
        marks = self.table["marks"]  # [E, V]
        entries = self.table.entry[rows]
        marks.view(-1).scatter_add_(0, entries * marks.shape[1] + token_ids, (entries > 0).to(torch.int32))

    def marks(self, rows: torch.Tensor) -> torch.Tensor:
        """[S, V] int32 for `apply_penalties`."""
        return self.table.lookup("marks", rows)


def apply_penalties(
    logits: torch.Tensor,
    marks: torch.Tensor,
    repetition: torch.Tensor,
    frequency: torch.Tensor,
    presence: torch.Tensor,
) -> torch.Tensor:
    """Logits after the three penalties; rows whose marks are all zero come back as they were.

    Args:
        logits: [S, V] float32.
        marks: [S, V] int32 of `PenaltyTable.marks`.
        repetition, frequency, presence: [S, 1] float32.

    Returns:
        [S, V] float32.
    """
    factor = torch.where(marks != 0, repetition, 1.0)
    logits = torch.where(logits > 0, logits / factor, logits * factor)
    counts = marks & _COUNT
    return logits.sub_(frequency * counts).sub_(presence * (counts > 0))
