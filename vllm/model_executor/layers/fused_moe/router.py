"""Which experts a token goes to, and how much each counts."""

from __future__ import annotations

import torch


def topk_softmax(logits: torch.Tensor, top_k: int, renormalise: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """The top_k most likely experts of each token, after a float32 softmax over all of them.

    Args:
        logits: [T, E].
        renormalise: divide the chosen probabilities by their sum.

    Returns:
        weights [T, top_k] in the logits' dtype, experts [T, top_k] int64.
    """
    weights, experts = torch.topk(logits.float().softmax(dim=-1), top_k, dim=-1)
    if renormalise:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights.to(logits.dtype), experts
