"""Paged attention against softmax(q kᵀ) v written out, over every mix of rows."""

import pytest
import torch

from vllm.forward_context import PAD_SLOT_ID, ForwardContext, PagedAttentionMetadata, set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.ops import attention_torch

BLOCK, BLOCKS = 4, 40


def formula(q, k, v, scale):
    """q [L, H, D] are the last L of the C tokens of k, v [C, Hkv, D]."""
    L, H, _ = q.shape
    C, Hkv, _ = k.shape
    out = torch.zeros_like(q)
    for t in range(L):
        seen = C - L + t + 1
        for h in range(H):
            kv = h // (H // Hkv)
            weights = (k[:seen, kv] @ q[t, h] * scale).softmax(0)
            out[t, h] = weights @ v[:seen, kv]
    return out


class Case:
    """Sequences of given (tokens before, tokens now), the decoding ones first; None is a padding row."""

    def __init__(self, work, pad_tokens=0, H=4, Hkv=2, D=8, seed=0, device="cpu", dtype=torch.float32):
        g = torch.Generator().manual_seed(seed)
        make = lambda *shape: torch.randn(*shape, generator=g)
        self.H, self.Hkv, self.D, self.pad_tokens = H, Hkv, D, pad_tokens
        self.layer = Attention(H, D, Hkv)
        pools = [torch.zeros(self.layer.kv_shape(BLOCKS, BLOCK)) for _ in range(2)]
        pages = (torch.randperm(BLOCKS - 1, generator=g) + 1).tolist()
        rows, tables, mapping, self.want = [], [], [], []
        for item in work:
            before, now = item or (0, 1)
            q, k, v = make(now, H, D), make(before + now, Hkv, D), make(before + now, Hkv, D)
            table = [pages.pop() for _ in range(-(-(before + now) // BLOCK))] if item else []
            slots = [table[p // BLOCK] * BLOCK + p % BLOCK for p in range(before + now)] if item else [PAD_SLOT_ID]
            for pool, x in zip(pools, (k, v)):
                for p in range(before if item else 0):
                    pool.view(-1, Hkv, D)[slots[p]] = x[p]
            if not item:
                q, k, v = (torch.full_like(x, float("nan")) for x in (q, k, v))  # must reach nobody
            rows.append((q, k[before:], v[before:]))
            mapping += slots[before:] if item else slots
            tables.append(table)
            self.want.append(formula(q, k, v, D**-0.5) if item else None)
        rows += [(make(1, H, D), make(1, Hkv, D), make(1, Hkv, D))] * pad_tokens
        mapping += [PAD_SLOT_ID] * pad_tokens
        self.q, self.k, self.v = (torch.cat(x).to(device, dtype) for x in zip(*rows))
        self.layer.kv_cache = tuple(pool.to(device, dtype) for pool in pools)
        width = max(map(len, tables)) + 2
        lens = [item[1] if item else 1 for item in work]
        seq_lens = [sum(item) if item else 0 for item in work]
        decodes = sum(item is None or (item[0] > 0 and item[1] == 1) for item in work)
        self.lens = lens
        to = {"device": device, "dtype": torch.int32}
        self.meta = PagedAttentionMetadata(
            num_decodes=decodes,
            num_prefills=len(work) - decodes,
            query_start_loc=torch.tensor([0, *lens]).cumsum(0).to(**to),
            seq_lens=torch.tensor(seq_lens, **to),
            block_table=torch.tensor([t + [0] * (width - len(t)) for t in tables], **to),
            slot_mapping=torch.tensor(mapping, device=device),
            query_lens_cpu=tuple(lens),
            seq_lens_cpu=tuple(seq_lens),
            max_query_len=max(lens),
            max_seq_len=max(seq_lens),
        )

    def run(self):
        with set_forward_context(ForwardContext(attn=self.meta, gdn=None)):
            return self.layer(self.q, self.k, self.v)

    def check(self, **tolerance):
        out, begin = self.run().float().cpu(), 0
        for n, want in zip(self.lens, self.want):
            if want is not None:
                torch.testing.assert_close(out[begin : begin + n], want, **tolerance)
            begin += n
        if self.pad_tokens:
            assert torch.equal(out[begin:], torch.zeros_like(out[begin:]))


WORK = {
    "decode": [(1, 1), (3, 1), (4, 1), (17, 1)],
    "decode with padding": [(5, 1), None, (9, 1), None],
    "prompts": [(0, 1), (0, 7), (0, 8)],
    "later chunks": [(3, 6), (8, 2), (1, 15)],
    "mixed": [(12, 1), (7, 1), None, (0, 9), (6, 5)],
}


@pytest.mark.parametrize("work", WORK.values(), ids=WORK)
@pytest.mark.parametrize("heads", [(4, 2), (4, 4), (6, 1)])
def test_formula(work, heads):
    Case(work, H=heads[0], Hkv=heads[1]).check()


def test_padding_tokens_after_the_last_chunk():
    Case(WORK["mixed"], pad_tokens=3).check()


@pytest.mark.parametrize("budget", [1, 1000, 5000])
def test_pieces_do_not_change_the_result(budget, monkeypatch):
    monkeypatch.setattr(attention_torch, "MAX_BYTES", budget)
    for work in WORK.values():
        Case(work).check()


def test_padding_writes_only_to_page_zero():
    case = Case([(5, 1), None, (0, 6)], pad_tokens=2)
    before = [pool.clone() for pool in case.layer.kv_cache]
    out = case.run()
    assert out[[0, *range(2, 8)]].isfinite().all()
    written = case.meta.slot_mapping[case.meta.slot_mapping >= 0]
    for pool, old, x in zip(case.layer.kv_cache, before, (case.k, case.v)):
        flat, old = pool.view(-1, 2, 8), old.view(-1, 2, 8)
        assert torch.equal(flat[written], x[case.meta.slot_mapping >= 0])
        others = torch.ones(len(flat), dtype=torch.bool)
        others[written] = False
        assert torch.equal(flat[others], old[others]) and torch.equal(flat[:BLOCK], torch.zeros_like(flat[:BLOCK]))


def test_without_a_forward_context():
    with pytest.raises(RuntimeError, match="no forward pass is running"):
        Attention(2, 4, 2)(*(torch.zeros(1, 2, 4) for _ in range(3)))


@pytest.mark.gpu
@pytest.mark.parametrize("work", WORK.values(), ids=WORK)
@pytest.mark.parametrize("head_size", [64, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gpu(work, head_size, dtype):
    case = Case(work, H=8, Hkv=2, D=head_size, pad_tokens=2, device="cuda", dtype=dtype)
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-4
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    case.check(atol=tolerance, rtol=tolerance)
