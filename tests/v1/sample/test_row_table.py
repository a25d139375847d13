"""The growing table: entries come and go, columns widen, and nobody reads another's values."""

import random

import torch

from vllm.v1.sample.row_table import RowTable

FILL = -7


def test_random_lives_of_rows():
    """Against a dictionary, with values written at the end of each entry."""
    rng = random.Random(0)
    table = RowTable(40, torch.device("cpu"))
    table.add_column("values", (0,), torch.int64, FILL)
    expected: dict[int, list[int]] = {}
    for step in range(600):
        row = rng.randrange(40)
        if row in expected:
            del expected[row]
            table.release(row)
        else:
            expected[row] = [rng.randrange(100) for _ in range(rng.randrange(1, 2 + step // 40))]
            table.put("values", table.take(row), expected[row])
        assert len(table) == len(expected) and (row in table) == (row in expected)
        found = table.lookup("values", torch.arange(40)).tolist()
        width = len(found[0])
        assert found == [[FILL] * (width - len(expected.get(r, []))) + expected.get(r, []) for r in range(40)]
    for row in list(expected):
        table.release(row)
    assert table["values"].shape[0] == 1
    table.release(3)  # nothing to release


def test_columns_of_several_dimensions_keep_to_the_end():
    table = RowTable(3, torch.device("cpu"))
    table.add_column("words", (0, 1), torch.int64, FILL)
    table.put("words", table.take(0), [[1], [2]])
    table.put("words", table.take(2), [[3, 4, 5]])
    found = table.lookup("words", torch.tensor([0, 1, 2]))
    assert found.shape == (3, 2, 4)
    assert found[0].tolist() == [[FILL, FILL, FILL, 1], [FILL, FILL, FILL, 2]]
    assert (found[1] == FILL).all()
    assert found[2].tolist() == [[FILL] * 4, [FILL, 3, 4, 5]]


def test_a_full_table_has_an_entry_for_every_row():
    table = RowTable(9, torch.device("cpu"))
    table.add_column("x", (1,), torch.float32, 0.0)
    entries = [table.take(row) for row in range(9)]
    assert sorted(entries) == list(range(1, 10)) and table["x"].shape[0] == 10
