"""Numbered places on the device, handed out and taken back. Number 0 is nobody's."""

from __future__ import annotations


class IdPool:
    """Ids 1 to `num_ids - 1`, each free or in use. Giving back what is not in use is an error, never ignored.

    Id 0 is never handed out: kernels send the reads and writes of padding rows there.
    """

    noun = "id"

    def __init__(self, num_ids: int) -> None:
        if num_ids < 2:
            raise ValueError(f"a pool needs {self.noun} 0 for padding and at least one more; got {num_ids}")
        self.num_total = num_ids - 1
        # Last in, first out: what was just given back is the likeliest to be in the device's cache still.
        self._free = list(range(num_ids - 1, 0, -1))
        self._in_use = bytearray(num_ids)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_total - len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` ids. The caller has looked at `num_free`; asking for more than that is an error."""
        if not 0 <= count <= len(self._free):
            raise RuntimeError(f"asked for {count} of {len(self._free)} free {self.noun}s")
        taken = [self._free.pop() for _ in range(count)]
        for i in taken:
            self._in_use[i] = 1
        return taken

    def free(self, ids: list[int]) -> None:
        """Give ids back."""
        for i in ids:
            if not 0 < i <= self.num_total:
                raise ValueError(f"{self.noun} {i} is not among 1..{self.num_total}")
            if not self._in_use[i]:
                raise ValueError(f"{self.noun} {i} is free already")
            self._in_use[i] = 0
            self._free.append(i)

    def assert_balanced(self) -> None:
        """Raise unless the free list and the in-use marks, kept apart, tell the same story."""
        num_marked = self._in_use.count(1)
        if num_marked + len(self._free) != self.num_total:
            raise RuntimeError(
                f"{self.noun}s out of balance: {num_marked} used + {len(self._free)} free != {self.num_total}"
            )
