"""What one step of the model gives back to the scheduler."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class TokenLogprobs:
    """Log-probabilities at one position: the token that stands there first, then the most likely ones.

    `token_ids[0]` is the sampled (or prompt) token with its rank in `rank` (1 is the most likely); `token_ids[1:]` are the top-k.
    """

    token_ids: list[int]
    logprobs: list[float]
    rank: int


@dataclass(slots=True)
class ModelRunnerOutput:
    """Results of one step, by request id. Sequences whose prompt is not finished have no sampled token."""

    sampled_token_ids: dict[str, list[int]] = field(default_factory=dict)
    logprobs: dict[str, list[TokenLogprobs]] = field(default_factory=dict)  # one entry a sampled token
    prompt_logprobs: dict[str, list[TokenLogprobs]] = field(
        default_factory=dict
    )  # positions of this chunk, from prompt token 1 on
