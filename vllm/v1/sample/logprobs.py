"""Log-probabilities of chosen and likeliest tokens, from the raw logits: before masks, penalties and temperature."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from vllm.v1.outputs import TokenLogprobs

_PIECE = 256  # rows of [rows, vocab] float32 in work at once: 250 MB with a vocabulary of 248,320


@dataclass
class LogprobsTensors:
    """Device results for P positions; column 0 is the token that stands there, the rest the k likeliest, best first."""

    token_ids: torch.Tensor  # [P, 1+k] int32
    logprobs: torch.Tensor  # [P, 1+k] float32
    ranks: torch.Tensor  # [P] int32: 1 + how many tokens are likelier than the one that stands there

    def packed(self) -> torch.Tensor:
        """[P, 3+2k] int32: ranks, ids, and the bits of the log-probabilities, so that one copy brings all."""
        return torch.cat((self.ranks[:, None], self.token_ids, self.logprobs.view(torch.int32)), dim=1)

    def to_lists(self, num_logprobs: Sequence[int | None]) -> list[TokenLogprobs | None]:
        """One device-to-host copy, then `unpack_logprobs`."""
        return unpack_logprobs(self.packed().cpu(), num_logprobs)


def unpack_logprobs(packed: torch.Tensor, num_logprobs: Sequence[int | None]) -> list[TokenLogprobs | None]:
    """Host form of `LogprobsTensors.packed`.

    Args:
        packed: [P, 3+2k] int32 on the CPU.
        num_logprobs: for each of P positions how many of the likeliest tokens it wants, None for no entry at all.
    """
    width = (packed.shape[1] - 1) // 2
    ranks = packed[:, 0].tolist()
    token_ids = packed[:, 1 : 1 + width].tolist()
    logprobs = packed[:, 1 + width :].contiguous().view(torch.float32).tolist()
    return [
        None if k is None else TokenLogprobs(ids[: 1 + k], values[: 1 + k], rank)
        for k, ids, values, rank in zip(num_logprobs, token_ids, logprobs, ranks)
    ]


def token_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, k: int) -> LogprobsTensors:
    """Log-probabilities of `token_ids` and of the k likeliest tokens.

    Args:
        logits: [P, V], any floating dtype; left as they are.
        token_ids: [P] int64.
        k: how many of the likeliest; more than V means V.
    """
    pieces = [
        _piece(logits[start : start + _PIECE], token_ids[start : start + _PIECE], k)
        for start in range(0, max(1, logits.shape[0]), _PIECE)
    ]
    return _joined(pieces)


def prompt_logprobs(
    hidden: torch.Tensor,
    compute_logits: Callable[[torch.Tensor], torch.Tensor],
    token_ids: torch.Tensor,
    k: int,
    piece: int = _PIECE,
) -> LogprobsTensors:
    """Log-probabilities of a chunk of a prompt, computing the logits of `piece` positions at a time.

    Args:
        hidden: [P, D], what the model made of P positions.
        compute_logits: [p, D] -> [p, V].
        token_ids: [P] int64, the token that follows each position.
        k: how many of the likeliest tokens at each position.
        piece: rows of logits that exist at once.
    """
    pieces = [
        _piece(compute_logits(hidden[start : start + piece]), token_ids[start : start + piece], k)
        for start in range(0, max(1, hidden.shape[0]), piece)
    ]
    return _joined(pieces)


def _piece(logits: torch.Tensor, token_ids: torch.Tensor, k: int) -> LogprobsTensors:
    logits = logits.to(torch.float32)
    chosen = logits.gather(1, token_ids[:, None])  # [p, 1]
    ranks = (logits > chosen).sum(dim=1, dtype=torch.int32) + 1
    top = logits.topk(min(k, logits.shape[1]), dim=1)
    values = torch.cat((chosen, top.values), dim=1) - logits.logsumexp(dim=1, keepdim=True)
    ids = torch.cat((token_ids[:, None], top.indices), dim=1).to(torch.int32)
    return LogprobsTensors(ids, values, ranks)


def _joined(pieces: list[LogprobsTensors]) -> LogprobsTensors:
    if len(pieces) == 1:
        return pieces[0]
    return LogprobsTensors(
        torch.cat([p.token_ids for p in pieces]),
        torch.cat([p.logprobs for p in pieces]),
        torch.cat([p.ranks for p in pieces]),
    )
