import pytest
import torch

from tests.kernels.attention_case import AttentionCase
from tests.kernels.common import TOLERANCE, assert_close
from vllm.model_executor.layers.ops import attention_decode as module
from vllm.model_executor.layers.ops.attention_decode import (
    MAX_SPLITS,
    attention_decode_torch,
    attention_decode_triton,
    plan_attention_decode,
)
from vllm.model_executor.layers.ops.attention_torch import Pages

FLOAT8 = torch.float8_e4m3fn


def run(form, case, pages, meta, rows):
    out = case.out()
    assert form(rows, pages, meta.block_table, meta.seq_lens, case.scale, out) is out
    return out


def check(case):
    want = run(attention_decode_torch, case, case.clean, case.clean_meta, case.clean_rows)
    # a newest key may round to its neighbour in float8, which has 4 bits
    tolerance = TOLERANCE[case.dtype] if not case.clean.float8 else 4e-2
    pages = case.poisoned_pages()
    got = run(attention_decode_triton, case, pages, case.meta, case.rows)
    assert_close(got, want, tolerance, "out")
    assert not got[case.meta.seq_lens == 0].any()
    kept = case.used | case.written
    for pool, reference in ((pages.keys, case.clean.keys), (pages.values, case.clean.values)):
        assert pool.float()[~kept].isnan().all()
        assert_close(pool.float()[kept], reference.float()[kept], 0.13 if case.clean.float8 else tolerance, "pages")


@pytest.mark.parametrize(
    "H,Hkv,D,rotary_dim",
    [(2, 2, 64, 16), (8, 1, 64, 64), (6, 2, 128, 32), (16, 2, 256, 64), (3, 1, 80, 20)],
)
@pytest.mark.parametrize("dtype,kv_dtype", [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, FLOAT8)])
def test_matches_pytorch(device, H, Hkv, D, rotary_dim, dtype, kv_dtype):
    """Lengths around page and tile borders, a sequence that starts with this token, rows of nobody between."""
    lengths = (1, 15, 16, None, 17, 31, 70, None)
    work = [item and (item, 1) for item in lengths]
    check(AttentionCase(work, H, Hkv, D, rotary_dim, dtype, kv_dtype, device=device))


@pytest.mark.parametrize("splits,least", [(1, 1), (3, 1), (16, 1), (17, 1), (40, 1), (40, 2)])
def test_every_way_of_cutting(device, monkeypatch, splits, least):
    """One piece, as many as are added at once, one more, with all pieces in use and with many empty."""
    plan = plan_attention_decode(1, 1, 2, 64, 640, 1)
    plan |= {"splits": splits, "least": least, "BN": 16}
    monkeypatch.setattr(module, "plan_attention_decode", lambda *_: plan)
    check(AttentionCase([(639, 1), (3, 1), None, (260, 1)], 2, 1, 64, 32, device=device))


@pytest.mark.parametrize("page", [4, 16, 64])
def test_page_sizes_and_no_rows(device, page):
    check(AttentionCase([(63, 1), (64, 1), (5, 1)], 4, 2, 64, 64, page=page, device=device))
    case = AttentionCase([(5, 1)], 4, 2, 64, 64, page=page, device=device)
    empty = case.clean_rows.part(0, 0)
    lengths = case.meta.seq_lens[:0]
    assert attention_decode_triton(empty, case.clean, case.meta.block_table, lengths, 1.0, case.out()[:0]).numel() == 0


def test_the_newest_token_alone(device):
    """A sequence of one token attends to nothing but itself: the output is its value times the gate."""
    case = AttentionCase([(1, 1)], 2, 1, 64, 32, device=device)
    case.meta.seq_lens.fill_(1)
    out = run(attention_decode_triton, case, case.poisoned_pages(), case.meta, case.rows)
    gates, value = case.rows.qkv[:, :256].view(2, 2, 64)[:, 1], case.rows.qkv[0, -64:]
    assert_close(out.view(2, 64), value * gates.sigmoid(), 1e-6)


def test_refuses(device):
    case = AttentionCase([(5, 1), (3, 1)], 4, 2, 64, 64, device=device)
    call = lambda rows=case.rows, pages=case.clean, meta=case.meta, out=None: attention_decode_triton(
        rows, pages, meta.block_table, meta.seq_lens, 1.0, case.out() if out is None else out
    )
    with pytest.raises(ValueError, match=r"contiguous \[2, 256\]"):
        call(out=case.out()[:, :64])
    with pytest.raises(ValueError, match="must be alike"):
        call(pages=Pages(case.clean.keys, case.clean.values.transpose(1, 2)))
    with pytest.raises(ValueError, match="not gated query heads of 64"):
        call(rows=case.rows.__class__(case.rows.qkv[:, :640], *list(vars(case.rows).values())[1:]))


@pytest.mark.parametrize("S", [1, 2, 7, 64, 256, 1024])
@pytest.mark.parametrize("heads,group,D", [(2, 8, 256), (4, 6, 256), (8, 4, 128), (1, 1, 64), (2, 16, 256)])
def test_plan(S, heads, group, D):
    plan = plan_attention_decode(S, heads, group, D, 262144, 132)
    assert 1 <= plan["splits"] <= MAX_SPLITS and S * heads * plan["splits"] >= 128
    assert plan["BG"] >= max(16, group) and plan["least"] >= 1
    # keys and values in bfloat16, beside scratch for scores
    assert (plan["num_stages"] - 1) * 2 * plan["BN"] * D * 2 <= 80 << 10
    # a table for one tile needs no pieces
    assert plan_attention_decode(S, heads, group, D, 16, 132)["splits"] == 1


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, FLOAT8], ids=str)
@pytest.mark.parametrize("lengths", [(130,), (1, 700, None, 33, 4097), (20000,), (900,) * 64], ids=len)
def test_real_sizes(lengths, kv_dtype):
    work = [item and (item, 1) for item in lengths]
    check(AttentionCase(work, 16, 2, 256, 64, torch.bfloat16, kv_dtype, device="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("S", [1, 8])
def test_a_chain_in_a_cuda_graph(S):
    """Lengths that grow on the device, rows written right before and read right after: early launches must wait for both."""
    steps, width = 40, 24
    case = AttentionCase([(300 + i, 1) for i in range(S)], 16, 2, 256, 64, torch.bfloat16, device="cuda")
    table = (torch.randperm(S * width, device="cuda").int() + 1).view(S, width)
    pools = [torch.zeros(S * width + 1, 16, 2, 256, device="cuda", dtype=torch.bfloat16) for _ in "kv"]
    inputs = torch.randn(steps, S, case.rows.qkv.shape[1], device="cuda").bfloat16()
    rest = list(vars(case.rows).values())[1:]
    qkv, step = torch.empty_like(inputs[0]), torch.zeros(1, dtype=torch.int64, device="cuda")
    lengths, out, y = torch.ones(S, dtype=torch.int32, device="cuda"), case.out(), case.out()

    def once(form, pages):
        qkv.copy_(inputs[step[0]] if form is attention_decode_torch else inputs.index_select(0, step)[0])
        form(case.rows.__class__(qkv, *rest), pages, table, lengths, case.scale, out)
        torch.mul(out, 2, out=y)
        lengths.add_(1)
        step.add_(1)

    def reset():
        lengths.fill_(1), step.zero_()

    want, pages = [], Pages(*(pool.clone() for pool in pools))
    for _ in range(steps):
        once(attention_decode_torch, pages)
        want.append(y.clone())
    reset()
    pages = Pages(*pools)
    once(attention_decode_triton, pages)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        once(attention_decode_triton, pages)
    reset()
    for i in range(steps):
        y.fill_(float("nan"))
        graph.replay()
        assert_close(y, want[i], 2 * TOLERANCE[torch.bfloat16], f"step {i}")
