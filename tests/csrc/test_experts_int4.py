"""csrc/experts_int4.cu against PyTorch: on a GPU as it is, without one on the emulator."""

import ctypes
from ctypes import c_int, c_void_p

import pytest
import torch

from tests.csrc.emulated.library import aligned, load, pointer
from tests.kernels.experts import layer, stored
from vllm import _custom_ops as ops
from vllm.model_executor.layers.fused_moe.ops.few_tokens import moe_few_tokens_torch
from vllm.model_executor.layers.fused_moe.ops.front import front_torch
from vllm.model_executor.layers.fused_moe.ops.grouped import experts_torch
from vllm.model_executor.layers.fused_moe.ops.int4 import (
    BLOCK,
    experts_cuda,
    fits_int4,
    moe_few_tokens_cuda,
    reads,
    shared_bytes,
)
from vllm.model_executor.layers.fused_moe.ops.route import Routed, route_torch
from vllm.model_executor.layers.fused_moe.ops.weights import MoEWeights, dense
from vllm.model_executor.layers.ops.rms_norm import Unnormed
from vllm.model_executor.layers.quantization.base import KernelWeight

FORMS = ("int4", "int4 zero", "int4 128")


class Matrix(ctypes.Structure):
    _fields_ = [(name, c_void_p) for name in ("words", "scale", "zero")] + [
        (name, c_int) for name in ("rows", "columns", "groups", "shared_chunks")
    ]


class Choices(ctypes.Structure):
    _fields_ = [
        ("top_k", c_int),
        ("inverse", ctypes.c_uint),
        ("logits", c_void_p),
        ("experts", c_int),
        ("logits_row", c_int),
        *((name, c_void_p) for name in ("chosen", "order", "block_expert", "block_rows")),
    ]


class Shared(ctypes.Structure):
    _fields_ = [("w", c_void_p), ("x", c_void_p), ("columns", c_int)]


class Emulated:
    """What ops/int4.py calls, on the CPU: the same kernels, one block after the other."""

    def __init__(self, monkeypatch):
        self._library = load("experts_int4.cpp")
        for name in ("gate_up_token", "gate_up_blocks", "down_token", "down_blocks"):
            monkeypatch.setattr(ops, f"experts_{name}", getattr(self, name))

    def matrix(self, words, scale, zero):
        rows, columns, groups = words.shape[1], words.shape[2] * 8, scale.shape[2]
        chunks = max(1, columns // groups // 128)
        parts = [None if part is None else aligned(part) for part in (words, scale, zero)]
        made = Matrix(*map(pointer, parts), rows, columns, groups, chunks.bit_length() - 1)
        made.parts = parts  # kept alive
        return ctypes.byref(made)

    def call(self, name, out, x, matrix, choices, *rest, keep=False):
        result, x = aligned(out if keep else torch.full_like(out, torch.nan)), aligned(x)
        getattr(self._library, name)(pointer(result), pointer(x), matrix, ctypes.byref(choices), *rest)
        out.copy_(result)

    def gate_up_token(self, h, x, words, scale, zero, logits, chosen, top_k):
        choices = Choices(
            top_k,
            -(-(1 << 32) // top_k) & 0xFFFFFFFF,
            pointer(logits),
            words.shape[0],
            logits.stride(0),
            pointer(chosen),
        )
        self.call("gate_up_token", h, x, self.matrix(words, scale, zero), choices, x.shape[0])

    def gate_up_blocks(self, h, x, words, scale, zero, order, block_expert, block_rows, top_k):
        lists = map(pointer, (order, block_expert, block_rows))
        choices = Choices(top_k, -(-(1 << 32) // top_k) & 0xFFFFFFFF, None, 0, 0, None, *lists)
        self.call("gate_up_blocks", h, x, self.matrix(words, scale, zero), choices, block_rows.numel())

    def down_token(self, y, h, words, scale, zero, shared_x, shared_w, logits, chosen, top_k, early, add):
        if early:  # then it is not read
            chosen = None
        choices = Choices(
            top_k,
            -(-(1 << 32) // top_k) & 0xFFFFFFFF,
            pointer(logits),
            words.shape[0],
            logits.stride(0),
            pointer(chosen),
        )
        parts = [None if part is None else aligned(part) for part in (shared_w, shared_x)]
        shared = Shared(*map(pointer, parts), 0 if shared_w is None else shared_w.shape[1])
        rest = ctypes.byref(shared), y.shape[0], ctypes.c_bool(early), ctypes.c_bool(add)
        self.call("down_token", y, h, self.matrix(words, scale, zero), choices, *rest, keep=add)

    def down_blocks(self, y, h, words, scale, zero, order, block_expert, block_rows):
        choices = Choices(1, 0, None, 0, 0, None, *map(pointer, (order, block_expert, block_rows)))
        self.call("down_blocks", y, h, self.matrix(words, scale, zero), choices, block_rows.numel())


@pytest.fixture
def device(monkeypatch):
    if torch.cuda.is_available():
        if not ops.available("cuda") or torch.cuda.get_device_capability() < (9, 0):
            pytest.skip("needs csrc/ and sm_90")
        return "cuda"
    from vllm.model_executor.layers.fused_moe.ops import int4

    Emulated(monkeypatch)
    monkeypatch.setattr(int4, "front_triton", front_in_16_bits)
    return "cpu"


def front_in_16_bits(x, weights, **planes):
    logits, hs, xp = front_torch(x, weights, **planes)
    if weights.gate is None:  # the kernels' logits have a column for it all the same
        logits = torch.cat([logits, torch.full_like(logits[:, :1], torch.nan)], dim=1)
    return logits, hs.to(xp.dtype), xp


def assert_alike(got, expected):
    """Within what rounding h and the result to bfloat16 may do."""
    assert torch.isfinite(got).all()
    error = (got.float() - expected.float()).abs().max() / expected.float().abs().max()
    assert error < 8e-3, error.item()


@pytest.mark.parametrize("T", [1, 3])
def test_between_residual_and_residual(device, T):
    """Rows still to be normalised in, the result added to them in place, and rounded before it is."""
    weights = layer(8, 256, 128, 64, "int4", torch.bfloat16, device)
    residual, weight = (torch.randn(*shape, device=device).bfloat16() for shape in ((T, 256), (256,)))
    rows = Unnormed(residual, weight * 0.3, 1e-6, True)
    result = moe_few_tokens_cuda(rows, weights, 2)
    assert_alike(result, moe_few_tokens_torch(rows, weights, 2))
    want = residual + result
    assert moe_few_tokens_cuda(rows, weights, 2, residual) is None
    assert torch.equal(residual, want)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("T", [1, 3])
def test_a_few_tokens(device, form, T):
    weights = layer(8, 256, 128, 64, form, torch.bfloat16, device)
    x = torch.randn(T, 256, device=device).bfloat16()
    assert_alike(moe_few_tokens_cuda(x, weights, 2), moe_few_tokens_torch(x, weights, 2))


@pytest.mark.parametrize(
    "E,D,I,S,top_k",
    [
        (300, 128, 128, 96, 10),  # more experts than one key a lane eight times over; not a power of two
        (5, 384, 256, 0, 3),  # no shared expert
        (1, 128, 128, 32, 1),
        (3, 2048, 512, 64, 2),  # the sizes that are known at compile time
        (16, 1152, 128, 0, 16),  # more chunks than warps; every expert
    ],
)
def test_shapes(device, E, D, I, S, top_k):
    weights = layer(E, D, I, S, "int4", torch.bfloat16, device)
    x = torch.randn(2, D, device=device).bfloat16()
    assert_alike(moe_few_tokens_cuda(x, weights, top_k), moe_few_tokens_torch(x, weights, top_k))


def test_negative_logits(device):
    weights = layer(8, 128, 128, 32, "int4", torch.bfloat16, device)
    x = torch.randn(1, 128, device=device).abs().bfloat16()
    router = -torch.rand(8, 128) / 128
    router[5] = -1e-3
    weights = MoEWeights(router.to(device).bfloat16(), weights.w13, weights.w2, weights.gate, weights.s13, weights.s2)
    for top_k in (1, 3):
        assert_alike(moe_few_tokens_cuda(x, weights, top_k), moe_few_tokens_torch(x, weights, top_k))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("T", [1, 5, 20])
def test_blocks(device, form, T):
    E, D, I, top_k = 4, 256, 128, 3
    w13, w2 = (stored(shape, form, torch.bfloat16, device) for shape in ((E, 2 * I, D), (E, D, I)))
    x, logits = torch.randn(T, D, device=device).bfloat16(), torch.randn(T, E, device=device)
    routed = route_torch(logits, E, top_k, BLOCK)
    # what stands in the list past a block's rows is nobody's business
    order = torch.where(routed.order < 0, torch.full_like(routed.order, 10**8), routed.order)
    routed = Routed(BLOCK, routed.shares, order, routed.block_expert, routed.block_rows)
    assert_alike(experts_cuda(x, routed, w13, w2), experts_torch(x, routed, w13, w2))


def test_no_token_changes_another(device):
    """A row has the same bits alone, beside others, and whatever those are."""
    weights = layer(8, 256, 128, 64, "int4", torch.bfloat16, device)
    x = torch.randn(3, 256, device=device).bfloat16()
    together = moe_few_tokens_cuda(x, weights, 2)
    for t in range(3):
        assert torch.equal(moe_few_tokens_cuda(x[t : t + 1], weights, 2), together[t : t + 1])


def test_large_activations_keep_their_small_differences(device):
    """What 128 in every element adds goes away again: inputs of one sign, whose sum is far above their products with centred weights."""
    w13, w2 = (stored(shape, "int4", torch.bfloat16, device) for shape in ((2, 256, 1024), (2, 1024, 128)))
    x = (torch.rand(4, 1024, device=device) + 1).bfloat16()
    routed = route_torch(torch.randn(4, 2, device=device), 2, 1, BLOCK)
    assert_alike(experts_cuda(x, routed, w13, w2), experts_torch(x, routed, w13, w2))


def test_what_the_kernels_read():
    def weight(rows, columns, group, **changes):
        words = torch.zeros(2, rows, columns // 8, dtype=torch.int32)
        return KernelWeight(**{"kind": "int4", "values": words, "group": group} | changes)

    assert reads(weight(64, 256, 32), 32) and reads(weight(64, 512, 128), 32) and reads(weight(64, 512, 10**6), 32)
    assert not reads(weight(64, 192, 32), 32), "not of whole chunks"
    assert not reads(weight(48, 256, 32), 32), "not of whole tiles"
    assert not reads(weight(64, 256, 64), 32) and not reads(weight(64, 768, 384), 32), "groups of another size"
    assert not reads(weight(64, 256, 32, kind="int8"), 32) and not reads(weight(64, 256, 32, scale_rows=2), 32)
    cpu = layer(8, 256, 128, 64, "int4", torch.bfloat16, "cpu")
    assert not fits_int4(torch.zeros(1, 256).bfloat16(), cpu, 2), "a CPU has no csrc"


def test_shared_memory_of_the_published_shapes():
    """Of sm_90 and sm_120, in bytes: what does not fit takes the Triton kernels."""
    h200, rtx = 232448, 101376
    assert shared_bytes(8, 512, 512) <= rtx, "35B"
    assert shared_bytes(10, 512, 512) <= rtx, "Next"
    assert rtx < shared_bytes(8, 1024, 1024) <= h200, "122B"


def test_a_lost_row_is_seen():
    """The comparison can fail."""
    w = stored((2, 32, 128), "int4", torch.bfloat16, "cpu")
    expected = dense(w)[0]
    wrong = expected.clone()
    wrong[3] = 0
    with pytest.raises(AssertionError):
        assert_alike(wrong, expected)
