"""Slots of recurrent state."""

import pytest

from vllm.v1.core.state_pool import StatePool


def test_slot_0_is_nobodys() -> None:
    pool = StatePool(3)
    assert sorted(pool.allocate(2)) == [1, 2]
    assert pool.num_free == 0
    with pytest.raises(RuntimeError, match="asked for 1 of 0 free state slots"):
        pool.allocate(1)


def test_a_slot_comes_back_once() -> None:
    pool = StatePool(3)
    (slot,) = pool.allocate(1)
    pool.free([slot])
    assert pool.num_used == 0
    with pytest.raises(ValueError, match=f"state slot {slot} is free already"):
        pool.free([slot])
    with pytest.raises(ValueError, match="state slot 0 is not among"):
        pool.free([0])
    pool.assert_balanced()
