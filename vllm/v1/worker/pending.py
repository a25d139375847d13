"""Results that the device is still working on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm import envs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.sample.logprobs import LogprobsTensors, unpack_logprobs
from vllm.v1.sample.sampler import unpack


class HostCopy:
    """A tensor on its way to the host. The copy is queued at once and nobody waits until its value is asked for."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._event = None
        if tensor.is_cuda:
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event(blocking=envs.VLLM_SLEEP_WHEN_IDLE)
            self._event.record()
        else:
            self._tensor = tensor

    def wait(self) -> torch.Tensor:
        """The value, on the CPU."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensor


@dataclass(frozen=True)
class _Sampled:
    request_ids: Sequence[str]
    packed: HostCopy
    num_logprobs: Sequence[int | None]


@dataclass(frozen=True)
class _Scored:
    request_id: str
    packed: HostCopy
    num_logprobs: int


class PendingOutput:
    """What one step will report. Collected while its work is queued; `result` waits for the device."""

    def __init__(self) -> None:
        self._sampled: list[_Sampled] = []
        self._scored: list[_Scored] = []

    def add_sampled(self, request_ids: Sequence[str], packed: torch.Tensor, num_logprobs: Sequence[int | None]) -> None:
        """Args: packed [S, .] as `SamplerOutput.packed`, one row a request; how many log-probabilities each asked for."""
        self._sampled.append(_Sampled(request_ids, HostCopy(packed), num_logprobs))

    def add_prompt_logprobs(self, request_id: str, scores: LogprobsTensors, num_logprobs: int) -> None:
        self._scored.append(_Scored(request_id, HostCopy(scores.packed()), num_logprobs))

    def result(self) -> ModelRunnerOutput:
        """Sampled tokens and the log-probabilities asked for, by request id."""
        output = ModelRunnerOutput()
        for sampled in self._sampled:
            token_ids, logprobs = unpack(sampled.packed.wait(), sampled.num_logprobs)
            for request_id, token_id, scores in zip(sampled.request_ids, token_ids, logprobs, strict=True):
                output.sampled_token_ids[request_id] = [token_id]
                if scores is not None:
                    output.logprobs[request_id] = [scores]
        for scored in self._scored:
            packed = scored.packed.wait()
            output.prompt_logprobs[scored.request_id] = unpack_logprobs(packed, [scored.num_logprobs] * len(packed))
        return output
