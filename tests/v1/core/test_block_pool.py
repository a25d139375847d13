"""Pages: every id is free or in use, never both, never neither."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm.v1.core.block_pool import BlockPool


def test_page_0_is_nobodys() -> None:
    pool = BlockPool(5, 16)
    assert (pool.num_total, pool.num_free, pool.num_used) == (4, 4, 0)
    assert sorted(pool.allocate(4)) == [1, 2, 3, 4]
    assert (pool.num_free, pool.num_used) == (0, 4)


def test_it_counts_in_pages() -> None:
    pool = BlockPool(5, 16)
    assert [pool.num_blocks_for(n) for n in (0, 1, 16, 17, 32)] == [0, 1, 1, 2, 2]
    assert pool.num_token_places == 64


def test_more_than_is_free_is_an_error_and_takes_nothing() -> None:
    pool = BlockPool(5, 16)
    pool.allocate(3)
    with pytest.raises(RuntimeError, match="asked for 2 of 1 free pages"):
        pool.allocate(2)
    assert pool.num_free == 1
    with pytest.raises(RuntimeError, match="asked for -1"):
        pool.allocate(-1)


def test_freeing_twice_is_an_error() -> None:
    pool = BlockPool(5, 16)
    (page,) = pool.allocate(1)
    pool.free([page])
    with pytest.raises(ValueError, match=f"page {page} is free already"):
        pool.free([page])
    with pytest.raises(ValueError, match="is free already"):
        pool.free(pool.allocate(1) * 2)


@pytest.mark.parametrize("page", [0, 5, -1])
def test_a_foreign_page_is_an_error(page: int) -> None:
    pool = BlockPool(5, 16)
    pool.allocate(4)
    with pytest.raises(ValueError, match=r"is not among 1\.\.4"):
        pool.free([page])


@pytest.mark.parametrize("num_blocks", [0, 1])
def test_a_pool_has_at_least_one_page_to_give(num_blocks: int) -> None:
    with pytest.raises(ValueError, match="needs page 0 for padding and at least one more"):
        BlockPool(num_blocks, 16)


def test_books_out_of_balance_are_noticed() -> None:
    pool = BlockPool(5, 16)
    pool.assert_balanced()
    pool._free.pop()
    with pytest.raises(RuntimeError, match=r"0 used \+ 3 free != 4"):
        pool.assert_balanced()


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 7)), max_size=60))
def test_against_a_pair_of_sets(moves: list[tuple[bool, int]]) -> None:
    pool, held = BlockPool(12, 4), []
    for take, count in moves:
        if take and count <= pool.num_free:
            ids = pool.allocate(count)
            assert len(set(ids)) == count and not set(ids) & set(held)
            held += ids
        elif not take:
            given_back, held = held[:count], held[count:]
            pool.free(given_back)
        pool.assert_balanced()
        assert (pool.num_used, pool.num_free) == (len(held), 11 - len(held))
        assert all(1 <= page <= 11 for page in held)
