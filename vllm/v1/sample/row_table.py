"""Device memory for what few rows use: a small table that grows, and an index from row to entry.

A [max_num_seqs, vocab] tensor of the real models would take a gigabyte, mostly for rows that never touch it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


def to_device(values: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Host numbers as a device tensor, without waiting for what the device is doing."""
    tensor = torch.tensor(values, dtype=dtype)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@dataclass
class _Column:
    data: torch.Tensor  # [capacity, *shape]
    fill: float


class RowTable:
    """Columns of entries for the rows that use a feature.

    Entry 0 is everyone else's: it always holds each column's fill value, which must mean "no effect". Growing replaces the column's
    tensor; releasing the last row gives the memory back.
    """

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self.entry = torch.zeros(num_rows, dtype=torch.int64, device=device)  # [num_rows]
        self._entry_of: dict[int, int] = {}
        self._free: list[int] = []
        self._capacity = 1
        self._columns: dict[str, _Column] = {}

    def add_column(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, fill: float) -> None:
        self._columns[name] = _Column(torch.full((1, *shape), fill, dtype=dtype, device=self.entry.device), fill)

    def __len__(self) -> int:
        return len(self._entry_of)

    def __contains__(self, row: int) -> bool:
        return row in self._entry_of

    def __getitem__(self, name: str) -> torch.Tensor:
        """A column: [capacity, *shape]."""
        return self._columns[name].data

    def lookup(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """A column's values for `rows` [S] int64: [S, *shape]."""
        return self._columns[name].data[self.entry[rows]]

    def take(self, row: int) -> int:
        """An entry for `row`, with every column at its fill value."""
        if row in self._entry_of:
            raise RuntimeError(f"row {row} already has an entry")
        if not self._free:
            self._grow()
        entry = self._entry_of[row] = self._free.pop()
        self.entry[row].fill_(entry)  # fill_, because assigning a number waits for the device
        for column in self._columns.values():
            column.data[entry].fill_(column.fill)
        return entry

    def release(self, row: int) -> None:
        """Forget `row`; rows without an entry are fine."""
        entry = self._entry_of.pop(row, None)
        if entry is None:
            return
        self.entry[row].zero_()
        self._free.append(entry)
        if not self._entry_of:
            self._free.clear()
            self._capacity = 1
            for column in self._columns.values():
                column.data = column.data[:1].clone()

    def put(self, name: str, entry: int, values: Sequence[Any]) -> None:
        """Write nested lists of numbers into the end of an entry, widening the column where they do not fit."""
        column = self._columns[name]
        value = to_device(values, column.data.dtype, column.data.device)
        self.widen(name, tuple(value.shape))
        column.data[entry][_last(column.data.shape[1:], value.shape)] = value

    def widen(self, name: str, shape: tuple[int, ...]) -> None:
        """Make each dimension of a column's entries at least as large as `shape`; what is there stays at the end."""
        column = self._columns[name]
        old = column.data
        wide = [max(have, _round_up(want)) if want > have else have for have, want in zip(old.shape[1:], shape)]
        if wide != list(old.shape[1:]):
            column.data = old.new_full((old.shape[0], *wide), column.fill)
            column.data[(slice(None), *_last(column.data.shape[1:], old.shape[1:]))] = old

    def _grow(self) -> None:
        capacity = min(max(4, 2 * self._capacity), self.entry.shape[0] + 1)
        for column in self._columns.values():
            grown = column.data.new_full((capacity, *column.data.shape[1:]), column.fill)
            grown[: self._capacity] = column.data
            column.data = grown
        self._free.extend(range(capacity - 1, self._capacity - 1, -1))
        self._capacity = capacity


def _last(have: Sequence[int], want: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(h - w, h) for h, w in zip(have, want))


def _round_up(n: int) -> int:
    return 1 << (n - 1).bit_length() if n > 1 else n
