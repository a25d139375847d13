import dataclasses

import pytest
import torch

from tests.kernels.attention_case import AttentionCase
from tests.kernels.common import TOLERANCE, assert_close
from vllm.model_executor.layers.ops import attention_prefill as module
from vllm.model_executor.layers.ops.attention_prefill import (
    attention_prefill_torch,
    attention_prefill_triton,
    plan_attention_prefill,
)

FLOAT8 = torch.float8_e4m3fn
WORK = {
    "prompts": [(0, 1), (0, 33), (0, 16)],
    "later chunks": [(16, 17), (70, 2), (1, 40)],
    "mixed": [(30, 1), None, (0, 21), (45, 19), (3, 2)],
}


def check(case):
    want, got = case.out(), case.out()
    attention_prefill_torch(case.clean_rows, case.clean, case.clean_meta, case.scale, want)
    pages = case.poisoned_pages()
    assert attention_prefill_triton(case.rows, pages, case.meta, case.scale, got) is got
    begin, end = case.meta.num_decodes, sum(case.meta.query_lens_cpu)
    # the PyTorch form attends to whole prompts as they were before float8
    tolerance = 0.15 if case.clean.float8 else 2 * TOLERANCE[case.dtype]
    assert_close(got[begin:end], want[begin:end], tolerance, "out")
    # decoding rows are not its business; those behind the last chunk come out as zeros, whatever they held
    assert got[:begin].isnan().all() and (got[end:] == 0).all()
    mine = case.written.clone()
    mine.view(-1)[case.meta.slot_mapping[:begin].clamp(min=0)] = False
    kept = case.used | mine
    for pool, reference in ((pages.keys, case.clean.keys), (pages.values, case.clean.values)):
        assert pool.float()[~kept].isnan().all()
        assert_close(pool.float()[kept], reference.float()[kept], 0.13 if case.clean.float8 else tolerance, "pages")


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles a sequence without long sequences, for the interpreter's sake."""
    monkeypatch.setattr(
        module, "plan_attention_prefill", lambda *_: {"BM": 16, "BN": 16, "num_warps": 4, "num_stages": 2}
    )


@pytest.mark.parametrize("work", WORK.values(), ids=WORK)
@pytest.mark.parametrize(
    "H,Hkv,D,rotary_dim,dtype,kv_dtype",
    [
        (2, 2, 64, 16, torch.float32, None),
        (8, 1, 64, 64, torch.bfloat16, None),
        (6, 2, 128, 32, torch.float32, None),
        (8, 2, 256, 64, torch.bfloat16, FLOAT8),
        (3, 1, 80, 20, torch.float32, None),
    ],
)
def test_matches_pytorch(device, small_tiles, work, H, Hkv, D, rotary_dim, dtype, kv_dtype):
    check(AttentionCase(work, H, Hkv, D, rotary_dim, dtype, kv_dtype, pad_tokens=2, device=device))


@pytest.mark.parametrize("page", [4, 32])
def test_page_sizes_and_whole_tiles(device, page):
    check(AttentionCase([(150, 1), (0, 130), (100, 40)], 4, 2, 64, 32, page=page, device=device))


def test_more_sequences_than_one_look_holds(device, small_tiles):
    """The search for a tile's sequence goes on past the first 64 starts, over empty chunks too."""
    work = [(3, i % 3 * 2) for i in range(70)]
    check(AttentionCase(work, 1, 1, 64, 32, device=device))


@pytest.mark.parametrize("pad_tokens", [1, 9, 50])
def test_rows_behind_the_last_chunk(device, small_tiles, pad_tokens):
    """Whole tiles of them, and an empty last chunk in front of them."""
    for work in ([(0, 5)], [(18, 33)], [(4, 1), (0, 7), (9, 0)]):
        check(AttentionCase(work, 6, 2, 64, 32, pad_tokens=pad_tokens, device=device))


@pytest.mark.parametrize(
    "work",
    [[(0, 1)], [(0, 16)], [(31, 7)], [(40, 40)], [(0, 9), (33, 20), (5, 3)], [(0, 12), (0, 29), (0, 0), (0, 0)]],
    ids=str,
)
def test_lengths_that_only_the_device_knows(device, small_tiles, work):
    """Behind the sequences there may be room for others."""
    case = AttentionCase(work, 4, 2, 64, 32, pad_tokens=41 - sum(now for _, now in work), device=device)
    forget = {"query_lens_cpu": None, "seq_lens_cpu": None, "max_query_len": 41, "max_seq_len": 1 << 18}
    want = case.out()
    attention_prefill_torch(case.clean_rows, case.clean, case.clean_meta, case.scale, want)
    for form, meta in ((attention_prefill_torch, case.clean_meta), (attention_prefill_triton, case.meta)):
        pages, got = case.poisoned_pages(), case.out()
        rows = case.rows if form is attention_prefill_triton else case.clean_rows
        form(rows, pages, dataclasses.replace(meta, **forget), case.scale, got)
        assert_close(got, want, 2e-5, form.__name__)


def test_no_chunks(device):
    case = AttentionCase([(5, 1)], 4, 2, 64, 64, device=device)
    out = attention_prefill_triton(case.rows, case.clean, case.meta, 1.0, case.out())
    assert out.isnan().all()


@pytest.mark.parametrize("capability,shared", [((8, 0), 163), ((9, 0), 227), ((10, 0), 227), ((12, 0), 99)])
@pytest.mark.parametrize("group", [1, 3, 6, 8, 16])
@pytest.mark.parametrize("D", [64, 80, 128, 256])
def test_plan(capability, shared, group, D):
    plan = plan_attention_prefill(group, D, capability)
    assert plan["BM"] >= group
    held = plan["BM"] * D * 2 + 2 * plan["num_stages"] * plan["BN"] * D * 2
    assert held <= shared << 10
    with pytest.raises(ValueError, match="200 query heads"):
        plan_attention_prefill(200, D, capability)


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, FLOAT8], ids=str)
@pytest.mark.parametrize(
    "work",
    [[(0, 700)], [(5000, 333), (17, 130)], [(40, 1), None, (999, 1), (0, 64), (0, 1), (250, 6), (0, 300)]],
    ids=["prompt", "chunks", "mixed"],
)
@pytest.mark.parametrize("heads", [(16, 2), (24, 4)])
def test_real_sizes(work, kv_dtype, heads):
    check(AttentionCase(work, *heads, 256, 64, torch.bfloat16, kv_dtype, pad_tokens=3, device="cuda"))
