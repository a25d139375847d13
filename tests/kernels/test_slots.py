import pytest
import torch

from vllm.model_executor.layers.mamba.ops.slots import gather_slots, host_cu_seqlens, scatter_slots


def test_padding_reads_zeros_and_writes_nothing():
    pool = torch.randn(5, 2, 3)
    before, index = pool.clone(), torch.tensor([-1, 4, -1, 0])
    rows = gather_slots(pool, index)
    assert rows[[0, 2]].abs().max() == 0 and torch.equal(rows[[1, 3]], pool[[4, 0]])
    new = torch.full((4, 2, 3), 7.0)
    new[[0, 2]] = float("nan")
    scatter_slots(pool, index, new)
    assert (pool[[4, 0]] == 7).all() and torch.equal(pool[1:4], before[1:4])


@pytest.mark.parametrize("count", [0, 1, 3])
def test_nothing_but_padding(count):
    pool = torch.randn(2, 3)
    before = pool.clone()
    scatter_slots(pool, torch.full((count,), -1), torch.full((count, 3), float("nan")))
    assert torch.equal(pool, before)


def test_starts():
    assert host_cu_seqlens(3, 2, None) == [0, 2, 4, 6]
    assert host_cu_seqlens(1, 9, torch.tensor([0, 4, 4, 8])) == [0, 4, 4, 8]
    assert host_cu_seqlens(1, 9, torch.tensor([5]), [0, 9]) == [0, 9]
    for bad in ([0, 5, 4], [1, 2], [0, 10]):
        with pytest.raises(ValueError, match="rise from 0"):
            host_cu_seqlens(1, 9, None, bad)
