"""Looking up and noting tokens around a decode step, against the PyTorch form."""

import pytest
import torch

from vllm.model_executor.layers.ops.decode_step import (
    DecodeInputs,
    DecodeTables,
    commit_tokens_torch,
    commit_tokens_triton,
    prepare_decode_torch,
    prepare_decode_triton,
)

ROWS, PAGES, BLOCK = 300, 9, 16


def make(S: int, padding: int, device: str):
    """S sequences in shuffled rows, the last `padding` of them nobody's."""
    tables = DecodeTables(*(torch.randint(0, PAGES * BLOCK - 1, (ROWS + 1,), device=device) for _ in range(3)))
    rows = torch.randperm(ROWS, device=device)[:S]
    rows[S - padding :] = ROWS
    block_table = torch.randint(1, 1000, (S, PAGES), dtype=torch.int32, device=device)
    return tables, rows, block_table


def outputs(S: int, device: str) -> DecodeInputs:
    dtypes = (torch.int64, torch.int64, torch.int32, torch.int64)
    return DecodeInputs(*(torch.full((S,), 12345, dtype=dtype, device=device) for dtype in dtypes))


@pytest.mark.parametrize(("S", "padding"), [(1, 0), (1, 1), (5, 2), (128, 0), (131, 1), (256, 100)])
def test_prepare(device, S, padding):
    tables, rows, block_table = make(S, padding, device)
    expected, out = outputs(S, device), outputs(S, device)
    prepare_decode_torch(rows, tables, block_table, BLOCK, expected)
    prepare_decode_triton(rows, tables, block_table, BLOCK, out)
    for a, b in zip(out, expected):
        assert torch.equal(a, b)
    real = rows != ROWS
    positions = tables.num_computed[rows[real]]
    assert torch.equal(out.positions[real], positions) and torch.equal(out.seq_lens[real].long(), positions + 1)
    pages = block_table[real].gather(1, (positions // BLOCK)[:, None])[:, 0]
    assert torch.equal(out.slot_mapping[real], pages.long() * BLOCK + positions % BLOCK)
    assert (out.seq_lens[~real] == 0).all() and (out.slot_mapping[~real] == -1).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("S", "padding"), [(1, 0), (5, 2), (131, 1)])
def test_commit(device, S, padding, dtype):
    tables, rows, _ = make(S, padding, device)
    before = [table.clone() for table in tables]
    copies = [DecodeTables(*(table.clone() for table in tables)) for _ in range(2)]
    sampled = torch.randint(0, 1000, (S,), dtype=dtype, device=device)
    commit_tokens_torch(rows, sampled, copies[0])
    commit_tokens_triton(rows, sampled, copies[1])
    for a, b in zip(*copies):
        assert torch.equal(a, b)
    real = rows[rows != ROWS]
    assert torch.equal(copies[1].last_token[real], sampled[rows != ROWS].long())
    assert torch.equal(copies[1].num_computed[real], before[1][real] + 1)
    assert torch.equal(copies[1].num_generated[real], before[2][real] + 1)
    untouched = torch.ones(ROWS + 1, dtype=torch.bool, device=device)
    untouched[real] = False
    assert all(torch.equal(a[untouched], b[untouched]) for a, b in zip(copies[1], before))
