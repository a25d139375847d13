"""Rows whose text must have a form: one bit a token says which tokens may come next. Made on the host anew for every step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

_NEG_INF = float("-inf")


class DeviceMasks:
    """The masks of some rows of a step, copied to the device in one transfer that nobody waits for.

    Args:
        words: [C, ceil(V/32)] int32: bit t % 32 of word t // 32 is 1 where token t may come.
        places: the C rows of the step's logits that they are for.
    """

    def __init__(self, words: np.ndarray, places: Sequence[int], device: torch.device) -> None:
        order = np.argsort(places)
        self._places_cpu = np.asarray(places, dtype=np.int32)[order]
        packed = torch.from_numpy(np.concatenate((self._places_cpu[:, None], words[order]), axis=1))  # [C, 1 + W]
        if device.type == "cuda":
            packed = packed.pin_memory().to(device, non_blocking=True)
        self._places = packed[:, 0].long()
        self._words = packed[:, 1:].contiguous()

    def __len__(self) -> int:
        return len(self._places_cpu)

    def part(self, start: int, end: int) -> DeviceMasks | None:
        """The masks of rows start .. end-1, counted from `start`; None if there are none."""
        first, last = np.searchsorted(self._places_cpu, (start, end))
        if first == last:
            return None
        part = object.__new__(DeviceMasks)
        part._places_cpu = self._places_cpu[first:last] - start
        part._places = self._places[first:last] - start
        part._words = self._words[first:last]
        return part

    def apply(self, logits: torch.Tensor, raw: torch.Tensor) -> None:
        """Set tokens that may not come to -inf in logits [s, V] float32, in place.

        Where everything else that edits logits has left no token that may come, those edits do not count: the raw [s, V] do.
        """
        forbidden = self._forbidden(logits.shape[1])  # [c, V]
        edited = logits[self._places].masked_fill_(forbidden, _NEG_INF)
        none_left = edited.amax(dim=-1, keepdim=True) == _NEG_INF
        unedited = raw[self._places].to(torch.float32).masked_fill_(forbidden, _NEG_INF)
        logits[self._places] = torch.where(none_left, unedited, edited)

    def _forbidden(self, vocab_size: int) -> torch.Tensor:
        shifts = torch.arange(8, dtype=torch.uint8, device=self._words.device)
        bits = (self._words.view(torch.uint8)[:, :, None] >> shifts) & 1  # [c, 4W, 8], lowest bits first
        return bits.flatten(1)[:, :vocab_size] == 0
