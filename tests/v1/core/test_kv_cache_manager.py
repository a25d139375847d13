"""Pages and a slot for each request, all or nothing."""

import pytest

from vllm.sampling_params import SamplingParams
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.request import Request


def make_request(request_id: str = "a", num_tokens: int = 5) -> Request:
    return Request(request_id, [1] * num_tokens, SamplingParams(), 0.0)


def test_the_first_pages_come_with_a_slot() -> None:
    manager, request = KVCacheManager(num_blocks=9, block_size=4, num_slots=3), make_request()
    block_ids = manager.allocate(request, 5)
    assert block_ids is not None and len(block_ids) == 2
    assert manager.block_ids(request) == block_ids
    assert manager.state_slot(request) in (1, 2)
    assert manager.usage == 2 / 8


def test_further_pages_only_where_the_last_is_full() -> None:
    manager, request = KVCacheManager(num_blocks=9, block_size=4, num_slots=3), make_request()
    first = manager.allocate(request, 5)
    request.num_computed_tokens = 5
    assert manager.allocate(request, 3) == []
    more = manager.allocate(request, 4)
    assert more is not None and len(more) == 1
    assert manager.block_ids(request) == first + more
    manager.assert_balanced()


def test_lists_handed_out_are_the_callers_own() -> None:
    """The worker appends to them."""
    manager, request = KVCacheManager(num_blocks=9, block_size=4, num_slots=3), make_request()
    manager.allocate(request, 5).append(77)
    manager.block_ids(request).append(88)
    request.num_computed_tokens = 8
    manager.allocate(request, 1).append(99)
    assert len(manager.block_ids(request)) == 3
    manager.assert_balanced()


def test_too_few_pages_change_nothing() -> None:
    manager = KVCacheManager(num_blocks=4, block_size=4, num_slots=3)
    a, b = make_request("a"), make_request("b")
    assert manager.allocate(a, 5)
    assert manager.allocate(b, 5) is None
    assert manager.allocate(a, 13) is None
    assert (manager.block_pool.num_used, manager.state_pool.num_used) == (2, 1)
    manager.assert_balanced()


def test_no_slot_no_pages() -> None:
    manager = KVCacheManager(num_blocks=9, block_size=4, num_slots=2)
    assert manager.allocate(make_request("a"), 1)
    assert manager.allocate(make_request("b"), 1) is None
    assert manager.block_pool.num_used == 1


def test_keep_free_leaves_pages_for_others() -> None:
    manager, request = KVCacheManager(num_blocks=5, block_size=4, num_slots=3), make_request()
    assert manager.allocate(request, 8, keep_free=3) is None
    assert manager.allocate(request, 8, keep_free=2) is not None
    request.num_computed_tokens = 8
    assert manager.allocate(request, 1, keep_free=2) is None


def test_free_takes_back_everything_once() -> None:
    manager, request = KVCacheManager(num_blocks=9, block_size=4, num_slots=3), make_request()
    manager.allocate(request, 20)
    manager.free(request)
    assert (manager.block_pool.num_used, manager.state_pool.num_used, manager.usage) == (0, 0, 0.0)
    manager.assert_balanced()
    with pytest.raises(KeyError):
        manager.free(request)


def test_what_can_ever_fit_does_not_depend_on_what_is_free_now() -> None:
    manager = KVCacheManager(num_blocks=5, block_size=4, num_slots=3)
    manager.allocate(make_request(), 16)
    assert manager.can_ever_fit(16) and not manager.can_ever_fit(17)


def test_a_page_in_use_that_nobody_holds_is_noticed() -> None:
    manager = KVCacheManager(num_blocks=5, block_size=4, num_slots=3)
    manager.block_pool.allocate(1)
    with pytest.raises(RuntimeError, match="0 requests hold 0 pages, but 1 pages and 0 state slots are in use"):
        manager.assert_balanced()
