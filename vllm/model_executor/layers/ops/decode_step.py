"""What a decode step does around the network: look up each sequence's token and position, and note the token it got.

Both run inside CUDA graphs, on tables with one row a sequence; `rows` says which of them are in the batch, in the batch's order. A batch
padded to a fixed size names the tables' last row for its padding: nobody's, greedy, and not to be read by the layers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

PAD_SLOT = -1

_BLOCK = 128


class DecodeTables(NamedTuple):
    """Where sequences stand, [rows] each, the last row nobody's."""

    last_token: torch.Tensor  # int64: the newest token, not computed yet
    num_computed: torch.Tensor  # int64: tokens before it
    num_generated: torch.Tensor  # int64: index of the next token among those generated


class DecodeInputs(NamedTuple):
    """One token a sequence, [S] each."""

    input_ids: torch.Tensor  # int64
    positions: torch.Tensor  # int64
    seq_lens: torch.Tensor  # int32: tokens of the sequence after this step; 0 for padding
    slot_mapping: torch.Tensor  # int64: page * block_size + offset; -1 for padding


@triton.jit
def _prepare_kernel(
    rows,
    last_token,
    num_computed,
    block_table,
    input_ids,
    positions,
    seq_lens,
    slot_mapping,
    S,
    pad_row,
    stride_table,
    block_size,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < S
    row = tl.load(rows + i, mask=inside, other=0)
    real = inside & (row != pad_row)
    position = tl.load(num_computed + row, mask=real, other=0)
    page = tl.load(block_table + i.to(tl.int64) * stride_table + position // block_size, mask=real, other=0)
    slot = page.to(tl.int64) * block_size + position % block_size
    tl.store(input_ids + i, tl.load(last_token + row, mask=real, other=0), mask=inside)
    tl.store(positions + i, position, mask=inside)
    tl.store(seq_lens + i, tl.where(real, position + 1, 0).to(tl.int32), mask=inside)
    tl.store(slot_mapping + i, tl.where(real, slot, -1), mask=inside)


@triton.jit
def _commit_kernel(rows, sampled, last_token, num_computed, num_generated, S, pad_row, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows + i, mask=i < S, other=0)
    real = (i < S) & (row != pad_row)
    tl.store(last_token + row, tl.load(sampled + i, mask=real, other=0).to(tl.int64), mask=real)
    tl.store(num_computed + row, tl.load(num_computed + row, mask=real, other=0) + 1, mask=real)
    tl.store(num_generated + row, tl.load(num_generated + row, mask=real, other=0) + 1, mask=real)


def prepare_decode_triton(
    rows: torch.Tensor, tables: DecodeTables, block_table: torch.Tensor, block_size: int, out: DecodeInputs
) -> None:
    """Triton form of :func:`prepare_decode`."""
    S, pad_row = rows.shape[0], tables.last_token.shape[0] - 1
    _prepare_kernel[(triton.cdiv(S, _BLOCK),)](
        rows,
        tables.last_token,
        tables.num_computed,
        block_table,
        *out,
        S,
        pad_row,
        block_table.stride(0),
        block_size,
        BLOCK=_BLOCK,
    )


def prepare_decode_torch(
    rows: torch.Tensor, tables: DecodeTables, block_table: torch.Tensor, block_size: int, out: DecodeInputs
) -> None:
    """PyTorch form of :func:`prepare_decode`."""
    padding = rows == tables.last_token.shape[0] - 1
    position = tables.num_computed[rows].masked_fill(padding, 0)
    page = block_table.gather(1, (position // block_size)[:, None])[:, 0].long()
    out.input_ids.copy_(tables.last_token[rows].masked_fill(padding, 0))
    out.positions.copy_(position)
    out.seq_lens.copy_((position + 1).masked_fill(padding, 0))
    out.slot_mapping.copy_((page * block_size + position % block_size).masked_fill(padding, PAD_SLOT))


def prepare_decode(
    rows: torch.Tensor, tables: DecodeTables, block_table: torch.Tensor, block_size: int, out: DecodeInputs
) -> None:
    """Fill `out` with the token that each sequence computes next, and with the places that belong to it.

    Args:
        rows: int64 [S], rows of the tables.
        block_table: int32 [S, pages], in the batch's order.
        block_size: tokens in a page.
    """
    form = prepare_decode_triton if rows.is_cuda else prepare_decode_torch
    form(rows, tables, block_table, block_size, out)


def commit_tokens_triton(rows: torch.Tensor, sampled: torch.Tensor, tables: DecodeTables) -> None:
    """Triton form of :func:`commit_tokens`."""
    S, pad_row = rows.shape[0], tables.last_token.shape[0] - 1
    _commit_kernel[(triton.cdiv(S, _BLOCK),)](rows, sampled, *tables, S, pad_row, BLOCK=_BLOCK)


def commit_tokens_torch(rows: torch.Tensor, sampled: torch.Tensor, tables: DecodeTables) -> None:
    """PyTorch form of :func:`commit_tokens`."""
    real = rows != tables.last_token.shape[0] - 1
    rows, sampled = rows[real], sampled[real]
    tables.last_token[rows] = sampled.long()
    tables.num_computed[rows] += 1
    tables.num_generated[rows] += 1


def commit_tokens(rows: torch.Tensor, sampled: torch.Tensor, tables: DecodeTables) -> None:
    """Note that each sequence's token is computed and that `sampled` [S], an integer, follows it. Rows are distinct but for padding."""
    form = commit_tokens_triton if rows.is_cuda else commit_tokens_torch
    form(rows, sampled, tables)
