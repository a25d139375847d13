"""What each running sequence holds on the device: pages for its attention layers, one slot for its GDN layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.state_pool import StatePool

if TYPE_CHECKING:
    from vllm.v1.request import Request


@dataclass(slots=True)
class _Holding:
    block_ids: list[int]
    state_slot: int


class KVCacheManager:
    """Hands pages and slots to requests, all or nothing, and takes them back together."""

    def __init__(self, num_blocks: int, block_size: int, num_slots: int) -> None:
        self.block_pool = BlockPool(num_blocks, block_size)
        self.state_pool = StatePool(num_slots)
        self._holdings: dict[str, _Holding] = {}

    def allocate(self, request: Request, num_new_tokens: int, keep_free: int = 0) -> list[int] | None:
        """Give a request pages for its next `num_new_tokens` tokens, and a slot if it has none.

        Args:
            keep_free: pages that must still be free afterwards.

        Returns:
            The pages added (none when the last page has room), or None, with nothing changed, when they are not to be had.
        """
        holding = self._holdings.get(request.request_id)
        num_blocks = self.block_pool.num_blocks_for(request.num_computed_tokens + num_new_tokens)
        if holding is None:
            return self._open_holding(request, num_blocks, keep_free)
        num_missing = num_blocks - len(holding.block_ids)
        if num_missing <= 0:
            return []
        if num_missing + keep_free > self.block_pool.num_free:
            return None
        new_block_ids = self.block_pool.allocate(num_missing)
        holding.block_ids += new_block_ids
        return new_block_ids

    def free(self, request: Request) -> None:
        """Take back everything a request holds; an error if it holds nothing."""
        holding = self._holdings.pop(request.request_id)
        self.block_pool.free(holding.block_ids)
        self.state_pool.free([holding.state_slot])

    def block_ids(self, request: Request) -> list[int]:
        """The pages a request holds, in the order of its tokens, in a list of the caller's own."""
        return list(self._holdings[request.request_id].block_ids)

    def holds_room_for(self, request: Request, num_tokens: int) -> bool:
        """Whether the pages of a request that holds some have room for its first `num_tokens` tokens."""
        return self.block_pool.num_blocks_for(num_tokens) <= len(self._holdings[request.request_id].block_ids)

    def state_slot(self, request: Request) -> int:
        """The slot a request holds."""
        return self._holdings[request.request_id].state_slot

    def can_ever_fit(self, num_tokens: int) -> bool:
        """Whether one sequence of this length fits when it has all pages to itself."""
        return num_tokens <= self.block_pool.num_token_places

    @property
    def usage(self) -> float:
        """Share of the pages in use, 0 to 1."""
        return self.block_pool.num_used / self.block_pool.num_total

    def assert_balanced(self) -> None:
        """Raise unless both pools are sound and what is in use is exactly what requests hold."""
        self.block_pool.assert_balanced()
        self.state_pool.assert_balanced()
        num_held = sum(len(holding.block_ids) for holding in self._holdings.values())
        if num_held != self.block_pool.num_used or len(self._holdings) != self.state_pool.num_used:
            raise RuntimeError(
                f"{len(self._holdings)} requests hold {num_held} pages, but {self.block_pool.num_used} pages and "
                f"{self.state_pool.num_used} state slots are in use"
            )

    def _open_holding(self, request: Request, num_blocks: int, keep_free: int) -> list[int] | None:
        if num_blocks + keep_free > self.block_pool.num_free or self.state_pool.num_free == 0:
            return None
        block_ids = self.block_pool.allocate(num_blocks)
        (state_slot,) = self.state_pool.allocate(1)
        self._holdings[request.request_id] = _Holding(block_ids, state_slot)
        return list(block_ids)
