"""A runner small enough to read: pages and slots dealt out in a shuffled order, forward contexts built by hand."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from vllm.forward_context import (
    PAD_SLOT_ID,
    ForwardContext,
    GDNAttentionMetadata,
    PagedAttentionMetadata,
    set_forward_context,
)
from vllm.v1.attention.backends.gdn_attn import prefill_chunks


@dataclass
class Seq:
    """One sequence: its tokens, how many are computed, where its state lives."""

    tokens: list[int]
    slot: int
    pages: list[int] = field(default_factory=list)
    computed: int = 0


class Driver:
    """Args: the model; tokens of a page; pages and slots of the pools; dtype of the recurrent state."""

    def __init__(self, model, block_size=16, num_blocks=64, num_slots=12, ssm_dtype=torch.float32, seed=0):
        self.model, self.block_size = model, block_size
        weight = model.norm.weight
        self.device, self.dtype = weight.device, weight.dtype
        layers = model.stateful_layers()
        for layer in layers.attention:
            shape = layer.kv_shape(num_blocks, block_size)
            layer.kv_cache = tuple(torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2))
        for layer in layers.gdn:
            # slots start out as garbage: a sequence's first chunk must not look
            layer.conv_state = layer.make_state("conv_state", num_slots, self.dtype, self.device).fill_(7.0)
            layer.ssm_state = layer.make_state("ssm_state", num_slots, ssm_dtype, self.device).fill_(-3.0)
        dealer = random.Random(seed)
        self.free_pages = dealer.sample(range(1, num_blocks), num_blocks - 1)
        self.free_slots = dealer.sample(range(1, num_slots), num_slots - 1)

    def add(self, tokens: list[int]) -> Seq:
        return Seq(list(tokens), self.free_slots.pop())

    def finish(self, seq: Seq) -> None:
        self.free_pages[:0], self.free_slots[:0] = seq.pages, [seq.slot]

    def context(
        self, work: list[tuple[Seq, int]], pad_decodes: int = 0, pad_tokens: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor, ForwardContext]:
        """Input ids, positions and context of a step that computes `n` tokens of each sequence, decoding ones first.

        `pad_decodes` rows of nobody follow the decoding rows, `pad_tokens` more the last chunk.
        """
        decodes = [(s, n) for s, n in work if s.computed and n == 1]
        prefills = [(s, n) for s, n in work if not (s.computed and n == 1)]
        rows: list[tuple[Seq | None, int]] = [*decodes, *[(None, 1)] * pad_decodes, *prefills]
        ids, positions, slot_mapping, tables = [], [], [], []
        for seq, n in rows:
            if seq is None:
                ids, positions, slot_mapping = ids + [0], positions + [0], slot_mapping + [PAD_SLOT_ID]
                tables.append([])
                continue
            while len(seq.pages) * self.block_size < seq.computed + n:
                seq.pages.append(self.free_pages.pop())
            for p in range(seq.computed, seq.computed + n):
                ids.append(seq.tokens[p])
                positions.append(p)
                slot_mapping.append(seq.pages[p // self.block_size] * self.block_size + p % self.block_size)
            tables.append(seq.pages)
        ids, positions = ids + [0] * pad_tokens, positions + [0] * pad_tokens
        slot_mapping += [PAD_SLOT_ID] * pad_tokens
        width = max(len(t) for t in tables) + 1
        lens = [n for _, n in rows]
        starts = torch.tensor([0, *lens]).cumsum(0).int()
        seq_lens = [s.computed + n if s else 0 for s, n in rows]
        num_decodes = len(decodes) + pad_decodes
        to = {"device": self.device}
        attn = PagedAttentionMetadata(
            num_decodes=num_decodes,
            num_prefills=len(prefills),
            query_start_loc=starts.to(**to),
            seq_lens=torch.tensor(seq_lens, dtype=torch.int32, **to),
            block_table=torch.tensor([t + [0] * (width - len(t)) for t in tables], dtype=torch.int32, **to),
            slot_mapping=torch.tensor(slot_mapping, dtype=torch.int64, **to),
            query_lens_cpu=tuple(lens),
            seq_lens_cpu=tuple(seq_lens),
            max_query_len=max(lens),
            max_seq_len=max(seq_lens),
        )
        gdn = GDNAttentionMetadata(
            num_decodes=num_decodes,
            num_prefills=len(prefills),
            num_prefill_tokens=sum(n for _, n in prefills),
            state_indices=torch.tensor([s.slot if s else PAD_SLOT_ID for s, _ in rows], dtype=torch.int32, **to),
            prefill_query_start_loc=(starts[num_decodes:] - starts[num_decodes]).to(**to),
            prefill_query_lens_cpu=tuple(n for _, n in prefills),
            prefill_has_initial_state=torch.tensor([s.computed > 0 for s, _ in prefills], dtype=torch.bool, **to),
            **prefill_chunks([n for _, n in prefills], self.device),
        )
        ids, positions = torch.tensor(ids, **to), torch.tensor(positions, **to)
        return ids, positions, ForwardContext(attn=attn, gdn=gdn)

    @torch.inference_mode()
    def step(self, work: list[tuple[Seq, int]], pad_decodes: int = 0, pad_tokens: int = 0) -> list[torch.Tensor]:
        """Logits [n, vocab] of each piece of work, in the order given."""
        ids, positions, context = self.context(work, pad_decodes, pad_tokens)
        with set_forward_context(context):
            hidden = self.model(ids, positions)
        assert hidden.isfinite().all(), "a padding row came out infinite"
        logits = self.model.compute_logits(hidden).float()
        decoding = [s.computed > 0 and n == 1 for s, n in work]
        begins, at, prefill_at = [], 0, sum(decoding) + pad_decodes
        for (_, n), is_decode in zip(work, decoding):
            begins.append(at if is_decode else prefill_at)
            at, prefill_at = (at + 1, prefill_at) if is_decode else (at, prefill_at + n)
        for seq, n in work:
            seq.computed += n
        return [logits[begin : begin + n] for begin, (_, n) in zip(begins, work)]

    def prefill(self, seq: Seq, cuts: tuple[int, ...] = ()) -> torch.Tensor:
        """Compute all known tokens of one sequence, cut at `cuts`; logits of all of them."""
        bounds = [0, *cuts, len(seq.tokens)]
        return torch.cat([self.step([(seq, b - a)])[0] for a, b in pairwise(bounds)])

    def greedy(self, seq: Seq, count: int) -> list[int]:
        """`count` further tokens of a sequence whose tokens are all known but the next."""
        logits = self.prefill(seq)[-1]
        for i in range(count):
            seq.tokens.append(int(logits.argmax()))
            if i + 1 < count:
                logits = self.step([(seq, 1)])[0][-1]
        return seq.tokens[-count:]
