"""Linear layers: parts in order, shares of ranks, and sums of shares."""

import pytest
import torch
import torch.nn.functional as F

from vllm.distributed import parallel_state
from vllm.distributed.parallel_state import TensorParallelGroup, use_group
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, TiedLMHead, VocabParallelEmbedding


def fill(layer, tensors):
    """Fill a layer from checkpoint tensors through its own slots."""
    for slot in layer.checkpoint_slots():
        tensor = tensors[slot.name]
        assert tuple(tensor.shape) == slot.shape
        slot.param[slot.region].copy_(tensor if slot.transform is None else slot.transform(tensor))
    return layer


def on_ranks(size, build, tensors):
    layers = []
    for rank in range(size):
        with use_group(TensorParallelGroup(rank, size)):
            layers.append(fill(build(), tensors))
    return layers


@pytest.fixture
def one_process(monkeypatch):
    """Ranks of a test live in one process: it adds and joins their results itself."""
    monkeypatch.setattr(parallel_state, "_require_one", lambda operation: None)


def test_merged(seed):
    tensors = {"m.gate_proj.weight": torch.randn(6, 4), "m.up_proj.weight": torch.randn(10, 4)}
    layer = fill(MergedColumnParallelLinear(4, {"gate_proj": 6, "up_proj": 10}, prefix="m"), tensors)
    x = torch.randn(3, 4)
    want = torch.cat([F.linear(x, w) for w in tensors.values()], dim=1)
    torch.testing.assert_close(layer(x), want)
    assert layer.rows == {"gate_proj": slice(0, 6), "up_proj": slice(6, 16)}
    torch.testing.assert_close(layer(x, layer.rows["up_proj"]), want[:, 6:])


@pytest.mark.parametrize("size", [1, 2])
def test_merged_parts_are_cut_one_by_one(size, seed):
    tensors = {"m.a.weight": torch.randn(6, 4), "m.b.weight": torch.randn(10, 4)}
    layers = on_ranks(size, lambda: MergedColumnParallelLinear(4, {"a": 6, "b": 10}, prefix="m"), tensors)
    x = torch.randn(3, 4)
    for part, weight in zip("ab", tensors.values()):
        got = torch.cat([layer(x, layer.rows[part]) for layer in layers], dim=1)
        torch.testing.assert_close(got, F.linear(x, weight))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_row_parallel_sums_to_the_whole(size, seed, one_process):
    tensors = {"m.weight": torch.randn(6, 8)}
    layers = on_ranks(size, lambda: RowParallelLinear(8, 6, prefix="m"), tensors)
    x = torch.randn(3, 8)
    got = sum(layer(share) for layer, share in zip(layers, x.chunk(size, dim=1)))
    torch.testing.assert_close(got, F.linear(x, tensors["m.weight"]))


@pytest.mark.parametrize(("size", "kv_heads"), [(1, 2), (2, 2), (4, 2)])
def test_qkv_heads_of_ranks(size, kv_heads, seed):
    """Four query heads with a gate each; with more ranks than key/value heads, neighbours share one."""
    heads, width = 4, 6
    names = {"q": 2 * width * heads, "k": width * 2, "v": width * 2}
    tensors = {f"m.{n}_proj.weight": torch.randn(rows, 5) for n, rows in names.items()}
    tensors |= {f"m.{n}_proj.bias": torch.randn(rows) for n, rows in names.items()}
    build = lambda: QKVParallelLinear(5, width, heads, 2, prefix="m", query_size=2 * width, bias=True)
    layers = on_ranks(size, build, tensors)
    x = torch.randn(3, 5)
    full = {n: F.linear(x, tensors[f"m.{n}_proj.weight"], tensors[f"m.{n}_proj.bias"]) for n in "qkv"}
    q = torch.cat([layer(x)[:, layer.rows["q"]] for layer in layers], dim=1)
    torch.testing.assert_close(q, full["q"])
    for rank, layer in enumerate(layers):
        assert (layer.num_heads, layer.num_kv_heads) == (heads // size, max(1, 2 // size))
        first = rank * 2 // size * width
        for n in "kv":
            want = full[n][:, first : first + layer.num_kv_heads * width]
            torch.testing.assert_close(layer(x)[:, layer.rows[n]], want)


def test_uneven_shares_are_refused():
    with use_group(TensorParallelGroup(0, 4)):
        with pytest.raises(ValueError, match="m: 6 cannot be shared evenly by 4 ranks"):
            RowParallelLinear(6, 8, prefix="m")
        with pytest.raises(ValueError, match="b: 10 cannot"):
            MergedColumnParallelLinear(4, {"a": 8, "b": 10}, prefix="m")
        with pytest.raises(ValueError, match="3 key/value heads cannot"):
            QKVParallelLinear(5, 6, 12, 3, prefix="m")


def test_more_ranks_do_not_run_here(seed):
    with use_group(TensorParallelGroup(0, 2)), pytest.raises(RuntimeError, match="all_reduce over 2 ranks"):
        RowParallelLinear(4, 2, prefix="m")(torch.zeros(1, 2))


@pytest.mark.parametrize("size", [1, 2])
def test_vocabulary(size, seed, one_process):
    tensors = {"e.weight": torch.randn(12, 5), "h.weight": torch.randn(12, 5)}
    ids, hidden = torch.tensor([0, 5, 6, 11, 3]), torch.randn(4, 5)
    embeddings = on_ranks(size, lambda: VocabParallelEmbedding(12, 5, prefix="e"), tensors)
    torch.testing.assert_close(sum(e(ids) for e in embeddings), tensors["e.weight"][ids])
    heads = on_ranks(size, lambda: ParallelLMHead(5, 12, prefix="h"), tensors)
    torch.testing.assert_close(torch.cat([h(hidden) for h in heads], 1), F.linear(hidden, tensors["h.weight"]))
    tied = torch.cat([TiedLMHead(e)(hidden) for e in embeddings], 1)
    torch.testing.assert_close(tied, F.linear(hidden, tensors["e.weight"]))


def test_replicated_and_column(seed):
    tensors = {"a.m.weight": torch.randn(6, 4), "a.m.bias": torch.randn(6)}
    x = torch.randn(2, 4)
    want = F.linear(x, *tensors.values())
    for layer in on_ranks(2, lambda: ReplicatedLinear(4, 6, prefix="a.m", bias=True), tensors):
        torch.testing.assert_close(layer(x), want)
    layers = on_ranks(2, lambda: ColumnParallelLinear(4, 6, prefix="a.m", bias=True), tensors)
    torch.testing.assert_close(torch.cat([layer(x) for layer in layers], 1), want)
