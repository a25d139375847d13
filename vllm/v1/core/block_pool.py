"""Pages of attention keys and values: which are free, which are in use."""

from __future__ import annotations

from vllm.v1.core.id_pool import IdPool


class BlockPool(IdPool):
    """`num_blocks` pages of `block_size` tokens, page 0 among them though nobody gets it."""

    noun = "page"

    def __init__(self, num_blocks: int, block_size: int) -> None:
        super().__init__(num_blocks)
        self.block_size = block_size

    @property
    def num_token_places(self) -> int:
        """Tokens that fit when every page is in use."""
        return self.num_total * self.block_size

    def num_blocks_for(self, num_tokens: int) -> int:
        """Pages that `num_tokens` tokens of one sequence take."""
        return -(-num_tokens // self.block_size)
