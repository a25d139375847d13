"""From logits to the next tokens.

Raw logits give the log-probabilities that are reported. For the choice they pass, in this order: allowed_token_ids, bad_words,
logit_bias, min_tokens, penalties, structured_outputs, temperature, min_p, top_k, top_p, draw. Greedy rows take the largest after the penalties.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm.v1.core.memory_plan import EDITED_LOGITS
from vllm.v1.outputs import TokenLogprobs
from vllm.v1.sample.draw import draw
from vllm.v1.sample.logprobs import LogprobsTensors, token_logprobs, unpack_logprobs
from vllm.v1.sample.penalties import apply_penalties
from vllm.v1.sample.state import SamplingPlan, SamplingState
from vllm.v1.sample.token_masks import DeviceMasks


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
        # the kernels take the logits as they are; PyTorch's draw needs copies of them, and so do edits
        if not (plan.edits or masks) and (logits.is_cuda or not plan.draws):
            token_ids = draw(logits, state, rows, plan)
        else:
            step = max(1, EDITED_LOGITS // logits.shape[1])
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
    return draw(logits, state, rows, plan)
