"""The token embedding and the output head, rows of the vocabulary cut over ranks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from vllm.distributed.parallel_state import (
    get_tensor_parallel_group,
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.linear import ColumnParallelLinear, plain_plan
from vllm.model_executor.layers.ops.skinny_gemm import skinny_gemm
from vllm.model_executor.layers.quantization.plan import WeightPlan
from vllm.model_executor.parameter import Slot, empty_parameter


class VocabParallelEmbedding(nn.Module):
    """Token ids -> vectors. `prefix` is the checkpoint module.

    Raises:
        ValueError: the vocabulary cannot be shared evenly by the ranks.
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, *, prefix: str = "", plan: WeightPlan | None = None
    ) -> None:
        super().__init__()
        self.prefix, self.num_embeddings = prefix, num_embeddings
        group = get_tensor_parallel_group()
        share = group.share(num_embeddings, f"{prefix}: vocabulary")
        self.first, self.last = group.rank * share, (group.rank + 1) * share
        self.weight = empty_parameter(share, embedding_dim, dtype=(plan or plain_plan()).dtype)

    def checkpoint_slots(self) -> Iterator[Slot]:
        shape = (self.num_embeddings, self.weight.shape[1])
        yield Slot(f"{self.prefix}.weight", shape, self.weight, transform=lambda w: w[self.first : self.last])

    def fill_dummy(self, generator: torch.Generator) -> None:
        self.weight.normal_(0.0, 1.0, generator=generator)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """input_ids [T] -> [T, embedding_dim]."""
        if self.last - self.first == self.num_embeddings:
            return F.embedding(input_ids, self.weight)
        mine = (input_ids >= self.first) & (input_ids < self.last)
        x = F.embedding(torch.where(mine, input_ids - self.first, 0), self.weight)
        return tensor_model_parallel_all_reduce(torch.where(mine[:, None], x, 0))


class ParallelLMHead(ColumnParallelLinear):
    """Hidden states -> logits. A matrix of its own; see `TiedLMHead` for the embedding's."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [N, D] -> logits [N, vocab], the whole vocabulary on every rank."""
        return tensor_model_parallel_all_gather(super().forward(hidden))


class TiedLMHead(nn.Module):
    """The output head that reads the embedding's own weight. Checkpoints may store it again; that copy is dropped."""

    def __init__(self, embedding: VocabParallelEmbedding, *, prefix: str = "lm_head") -> None:
        super().__init__()
        self._embedding = [embedding]  # in a list: not a submodule, the weight belongs to the embedding
        self.prefix = prefix

    def checkpoint_slots(self) -> Iterator[Slot]:
        embedding = self._embedding[0]
        yield Slot(f"{self.prefix}.weight", (embedding.num_embeddings, embedding.weight.shape[1]), None)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [N, D] -> logits [N, vocab]."""
        return tensor_model_parallel_all_gather(skinny_gemm(hidden, self._embedding[0].weight))
