"""From logits to the next tokens.

Raw logits give the log-probabilities that are reported. For the choice they pass, in this order: allowed_token_ids, bad_words,
logit_bias, min_tokens, penalties, structured_outputs, temperature, min_p, top_k, top_p, draw. Greedy rows take the largest after the penalties.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm.v1.outputs import TokenLogprobs
from vllm.v1.sample.logprobs import LogprobsTensors, token_logprobs, unpack_logprobs
from vllm.v1.sample.penalties import apply_penalties
from vllm.v1.sample.rng import gumbel_noise, row_keys
from vllm.v1.sample.state import SamplingPlan, SamplingState
from vllm.v1.sample.token_masks import DeviceMasks

_PIECE = 1 << 24  # logits in work at once: bounds the temporaries, whatever the batch and the vocabulary


@dataclass
class SamplerOutput:
    """One step's choices, still on the device."""

    token_ids: torch.Tensor  # [S] int64
    logprobs: LogprobsTensors | None  # of all S rows, where any row of the state reports some

    def packed(self) -> torch.Tensor:
        """[S, 1] or [S, 1+3+2k] int32: everything, for one copy to the host."""
        ids = self.token_ids[:, None].to(torch.int32)
        return ids if self.logprobs is None else torch.cat((ids, self.logprobs.packed()), dim=1)

    def to_lists(self, num_logprobs: Sequence[int | None]) -> tuple[list[int], list[TokenLogprobs | None]]:
        """One device-to-host copy, then `unpack`."""
        return unpack(self.packed().cpu(), num_logprobs)


def unpack(packed: torch.Tensor, num_logprobs: Sequence[int | None]) -> tuple[list[int], list[TokenLogprobs | None]]:
    """Host form of `SamplerOutput.packed`.

    Args:
        packed: on the CPU.
        num_logprobs: for each of S rows how many log-probabilities it reports, None for none at all
            (`SamplingState.num_logprobs.get(row)`).
    """
    token_ids = packed[:, 0].tolist()
    if packed.shape[1] == 1:
        return token_ids, [None] * len(token_ids)
    return token_ids, unpack_logprobs(packed[:, 1:], num_logprobs)


class Sampler:
    """Stateless: everything about a sequence is in `SamplingState`."""

    def __call__(
        self, logits: torch.Tensor, state: SamplingState, rows: torch.Tensor, masks: DeviceMasks | None = None
    ) -> SamplerOutput:
        """Choose one token a row. Does not wait for the device.

        Args:
            logits: [S, V], any floating dtype; left as they are.
            state: of the running sequences.
            rows: [S] int64 on the device, the state's row of each.
            masks: of those of the S rows whose text must have a form.
        """
        plan = state.plan
        if not (plan.draws or plan.edits or masks):
            token_ids = logits.argmax(dim=-1)
        else:
            step = max(1, _PIECE // logits.shape[1])
            pieces = []
            for start in range(0, max(1, logits.shape[0]), step):
                part = logits[start : start + step]
                allowed = None if masks is None else masks.part(start, start + step)
                pieces.append(_choose(part, state, rows[start : start + step], plan, allowed))
            token_ids = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        logprobs = None if plan.num_logprobs is None else token_logprobs(logits, token_ids, plan.num_logprobs)
        return SamplerOutput(token_ids, logprobs)


def _choose(
    raw: torch.Tensor, state: SamplingState, rows: torch.Tensor, plan: SamplingPlan, masks: DeviceMasks | None
) -> torch.Tensor:
    """raw [s, V], any floating dtype; rows [s] int64 -> [s] int64."""
    logits = raw.to(torch.float32, copy=True)
    if plan.allow_lists:
        state.allow_lists.apply(logits, rows)
    if plan.bad_words:
        state.bad_words.apply(logits, rows)
    if plan.logit_bias:
        state.logit_bias.apply(logits, rows)
    if plan.stop_bans:
        state.stop_bans.apply(logits, rows, state.num_generated[rows])
    if plan.penalties:
        strengths = (state.repetition, state.frequency, state.presence)
        logits = apply_penalties(logits, state.penalties.marks(rows), *(value[rows, None] for value in strengths))
    if masks is not None:
        masks.apply(logits, raw)
    if not plan.draws:
        return logits.argmax(dim=-1)

    logits.div_(state.temperature[rows, None])
    if plan.min_p or plan.num_sorted:
        lowest = lowest_kept(logits, state.log_min_p[rows], state.top_k[rows], state.top_p[rows], plan)
        logits.masked_fill_(logits < lowest[:, None], float("-inf"))
    noise = gumbel_noise(row_keys(state.seeds[rows], state.num_generated[rows]), logits.shape[1])
    return logits.addcmul_(noise, state.noise[rows, None]).argmax(dim=-1)


def lowest_kept(
    logits: torch.Tensor, log_min_p: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, plan: SamplingPlan
) -> torch.Tensor:
    """The smallest logit that min_p, then top_k, then top_p leave standing.

    Each of the three keeps the largest logits, so a value says all, and tokens that tie with the last one kept stay too: who
    survives never depends on the order in which a sort happens to leave equals.

    Args:
        logits: [s, V] float32, after the temperature.
        log_min_p, top_p: [s] float32; top_k: [s] int64, 0 for all.

    Returns:
        [s] float32.
    """
    largest = logits.amax(dim=-1)
    lowest = largest + log_min_p
    if plan.num_sorted == 0:
        return lowest

    if plan.num_sorted < logits.shape[1]:
        ordered = logits.topk(plan.num_sorted, dim=-1).values  # [s, num_sorted], largest first
    else:
        ordered = logits.sort(dim=-1, descending=True).values
    kth = ordered.gather(1, (top_k[:, None] - 1).clamp(min=0)).squeeze(1)
    lowest = torch.maximum(lowest, kth.masked_fill(top_k == 0, float("-inf")))
    if not plan.top_p:
        return lowest

    # What is kept so far need not end within `ordered` (ties), so its total weight comes from the whole row. Sums of 248,320
    # float32 weights would be off by more than the tail's share.
    weights = (logits - largest[:, None]).exp_().masked_fill_(logits < lowest[:, None], 0.0)
    total = weights.sum(dim=-1, dtype=torch.float64)
    ordered_weights = (ordered - largest[:, None]).exp_().masked_fill_(ordered < lowest[:, None], 0.0).to(torch.float64)
    before = ordered_weights.cumsum(dim=-1) - ordered_weights
    kept = before < top_p[:, None] * total[:, None]
    smallest = ordered.masked_fill(~kept, float("inf")).amin(dim=-1)
    return torch.maximum(lowest, smallest.masked_fill(top_p >= 1.0, float("-inf")))
