"""csrc/experts_w4.cu against PyTorch: on a GPU as it is, without one on the emulator."""

import ctypes
import dataclasses
from ctypes import c_bool, c_int, c_void_p

import pytest
import torch

from tests.csrc.emulated.library import aligned, load, pointer
from tests.kernels.experts import layer
from tools.tiny_formats import nvfp4, packed
from vllm import _custom_ops as ops
from vllm.config.quantization import parse_quantization
from vllm.model_executor.layers.fused_moe.layer import FusedMoE
from vllm.model_executor.layers.fused_moe.ops import w4
from vllm.model_executor.layers.fused_moe.ops.few_tokens import moe_few_tokens_torch
from vllm.model_executor.layers.fused_moe.ops.front import front_torch
from vllm.model_executor.layers.fused_moe.ops.w4 import (
    MOST_TOKENS,
    W4Plan,
    moe_w4_cuda,
    most_lists,
    plan_w4,
    reads,
    reads_shared,
    shared_bytes,
    slots_of,
    w4_tokens,
)
from vllm.model_executor.layers.fused_moe.ops.weights import PLANES, MoEWeights
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.ops.rms_norm import Unnormed
from vllm.model_executor.layers.quantization.base import KernelWeight
from vllm.model_executor.layers.quantization.plan import ConfigPlan

FORMS = ("int4", "int4 zero", "int4 128", "fp4 nv")
H200, RTX = 232448, 101376
PLAN = W4Plan(4, 8, 4)


class Stack(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("w", "scale", "zero", "row_scale")),
        *((name, c_int) for name in ("rows", "row_bytes", "groups", "shared_chunks")),
        ("floats", c_bool),
    ]


class Routing(ctypes.Structure):
    _fields_ = [("logits", c_void_p)] + [(name, c_int) for name in ("row", "tokens", "experts", "top_k", "most_lists")]


class Shared(ctypes.Structure):
    _fields_ = [*((name, c_void_p) for name in ("w", "x", "scale", "row_scale")), ("columns", c_int)]


def stack(words, scale, zero, row_scale):
    floats = words.dtype == torch.uint8
    rows, columns = words.shape[1], words.shape[2] * PLANES["fp4" if floats else "int4"]
    groups = columns // 32 if floats else scale.shape[2]
    parts = [None if part is None else aligned(part) for part in (words, scale, zero, row_scale)]
    shared = max(1, columns // groups // 128)
    made = Stack(*map(pointer, parts), rows, columns // 2, groups, (shared - 1).bit_length(), floats)
    made.parts = parts  # kept alive
    return made


def routing(logits, h_rows, experts, top_k):
    return Routing(pointer(logits), logits.stride(0), logits.shape[0], experts, top_k, h_rows // 8)


class Emulated:
    """What ops/w4.py calls, on the CPU: the same kernels, one block after the other."""

    BLOCKS = 3

    def __init__(self, monkeypatch):
        self._library = load("experts_w4.cpp")
        for name in ("gate_up", "down"):
            monkeypatch.setattr(ops, f"experts_w4_{name}", getattr(self, name))

    def gate_up(self, h, x, words, scale, zero, row_scale, logits, top_k, stages):
        result, x, w = aligned(torch.full_like(h, torch.nan)), aligned(x), stack(words, scale, zero, row_scale)
        r = routing(logits, h.shape[0], words.shape[0], top_k)
        self._library.gate_up(pointer(result), pointer(x), ctypes.byref(w), ctypes.byref(r), self.BLOCKS, stages)
        h.copy_(result)

    def down(
        self, y, h, words, scale, zero, row_scale, x, shared_w, shared_scale, factors, logits, top_k, add, warps, stages
    ):
        result, h = aligned(y if add else torch.full_like(y, torch.nan)), aligned(h)
        w = stack(words, scale, zero, row_scale)
        r = routing(logits, h.shape[0], words.shape[0], top_k)
        parts = [None if part is None else aligned(part) for part in (shared_w, x, shared_scale, factors)]
        shared = Shared(*map(pointer, parts), 0 if x is None else x.shape[1])
        how = ctypes.byref(w), ctypes.byref(r), ctypes.byref(shared), c_bool(add), warps, stages
        self._library.down(pointer(result), pointer(h), *how)
        y.copy_(result)


@pytest.fixture
def device(monkeypatch):
    if torch.cuda.is_available():
        if not ops.available("cuda") or torch.cuda.get_device_capability() < (9, 0):
            pytest.skip("needs csrc/ and sm_90")
        return "cuda"
    Emulated(monkeypatch)
    monkeypatch.setattr(w4, "front_triton", front_in_16_bits)
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


def case(device, T, E, D, I, S, top_k, form="int4", shared="plain"):
    return torch.randn(T, D, device=device).bfloat16(), layer(E, D, I, S, form, torch.bfloat16, device, shared), top_k


def check(device, plan=PLAN, **sizes):
    x, weights, top_k = case(device, **sizes)
    assert_alike(moe_w4_cuda(x, weights, top_k, plan=plan), moe_few_tokens_torch(x, weights, top_k))


@pytest.mark.parametrize("plan", [PLAN, W4Plan(3, 16, 3)], ids=["four stages", "three"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("T", [1, 3])
def test_a_few_tokens(device, form, T, plan):
    check(device, plan, T=T, E=8, D=256, I=128, S=64, top_k=2, form=form)


@pytest.mark.parametrize(
    "T,E,D,I,S,top_k",
    [
        (2, 300, 128, 128, 96, 10),  # more experts than one key a lane eight times over; not a power of two
        (2, 5, 384, 256, 0, 3),  # no shared expert
        (1, 1, 128, 128, 32, 1),
        (2, 3, 2048, 512, 64, 2),  # of the 35B model
        (2, 4, 2176, 128, 512, 4),  # too wide for x to stay in registers; every expert
        (40, 4, 128, 128, 32, 2),  # more tokens an expert than a list has, and more than 32
        (64, 33, 128, 128, 32, 5),
    ],
)
@pytest.mark.parametrize("form", ["int4", "fp4 nv"])
def test_shapes(device, T, E, D, I, S, top_k, form):
    check(device, T=T, E=E, D=D, I=I, S=S, top_k=top_k, form=form)


@pytest.mark.parametrize("T,S", [(1, 64), (3, 512), (20, 96)])
def test_a_shared_expert_of_fp4(device, T, S):
    check(device, T=T, E=8, D=256, I=128, S=S, top_k=2, form="fp4 nv", shared="fp4 nv")


def test_fp4_without_factors_of_rows(device):
    x, w, top_k = case(device, T=2, E=4, D=128, I=128, S=64, top_k=2, form="fp4 nv", shared="fp4 nv")
    w = dataclasses.replace(
        w, **{name: dataclasses.replace(getattr(w, name), row_scale=None) for name in ("w13", "w2", "s2")}
    )
    assert_alike(moe_w4_cuda(x / 64, w, top_k, plan=PLAN), moe_few_tokens_torch(x / 64, w, top_k))


def test_fp4_at_the_ends_of_its_range(device):
    """The largest elements and scales beside the smallest: bfloat16 holds what they are turned into."""
    x, w, _ = case(device, T=2, E=2, D=128, I=128, S=64, top_k=1, form="fp4 nv", shared="fp4 nv")
    for part in (w.w13, w.w2, w.s2):
        part.values[..., ::2] = 0x7F  # 6 and -6 (0xF)
        part.scale.view(torch.uint8)[..., ::2] = 0x7E  # 448
        part.scale.view(torch.uint8)[..., 1::2] = 0x01  # 2^-9
    w.w13.row_scale.mul_(1e-4)
    assert_alike(moe_w4_cuda(x, w, 1, plan=PLAN), moe_few_tokens_torch(x, w, 1))


@pytest.mark.parametrize("group,columns", [(256, 768), (384, 384)])
def test_wide_groups(device, group, columns):
    """A scale for several chunks of a row, and one for all of it."""
    check(device, T=2, E=4, D=columns, I=columns, S=0, top_k=2, form=f"int4 {group}")


@pytest.mark.parametrize("T", [1, 3])
def test_between_residual_and_residual(device, T):
    """Rows still to be normalised in, the result added to them in place, and rounded before it is."""
    residual, weights, top_k = case(device, T=T, E=8, D=256, I=128, S=64, top_k=2)
    rows = Unnormed(residual, torch.randn(256, device=device).bfloat16() * 0.3, 1e-6, True)
    result = moe_w4_cuda(rows, weights, top_k, plan=PLAN)
    assert_alike(result, moe_few_tokens_torch(rows, weights, top_k))
    want = residual + result
    assert moe_w4_cuda(rows, weights, top_k, residual, PLAN) is None
    assert torch.equal(residual, want)


def test_negative_logits(device):
    x, w, _ = case(device, T=1, E=8, D=128, I=128, S=32, top_k=1)
    router = -torch.rand(8, 128) / 128
    router[5] = -1e-3
    w = MoEWeights(router.to(device).bfloat16(), w.w13, w.w2, w.gate, w.s13, w.s2)
    for top_k in (1, 3):
        assert_alike(moe_w4_cuda(x.abs(), w, top_k, plan=PLAN), moe_few_tokens_torch(x.abs(), w, top_k))


def test_equal_tokens_share_lists(device):
    """Rows of padding are all alike and choose the same few experts."""
    x, weights, top_k = case(device, T=20, E=8, D=128, I=128, S=32, top_k=2)
    x[1:] = x[1]
    y = moe_w4_cuda(x, weights, top_k, plan=PLAN)
    assert_alike(y, moe_few_tokens_torch(x, weights, top_k))
    assert torch.equal(y[1:], y[1:2].expand(19, -1))


def test_a_token_is_the_same_beside_any_other(device):
    """Bit for bit, as long as there are as many: it may have another column, and experts of its own another list."""
    x, weights, top_k = case(device, T=4, E=8, D=256, I=128, S=64, top_k=2)
    y = moe_w4_cuda(x, weights, top_k, plan=PLAN)
    assert torch.equal(moe_w4_cuda(x, weights, top_k, plan=PLAN), y)
    order = torch.tensor([2, 0, 3, 1], device=device)
    assert torch.equal(moe_w4_cuda(x[order], weights, top_k, plan=PLAN), y[order])


def test_large_activations_keep_their_small_differences(device):
    """What 128 in every element adds goes away again: inputs of one sign, whose sum is far above their products with centred weights."""
    x, weights, top_k = case(device, T=4, E=2, D=1024, I=128, S=0, top_k=1)
    x = (torch.rand(4, 1024, device=device) + 1).bfloat16()
    assert_alike(moe_w4_cuda(x, weights, top_k, plan=PLAN), moe_few_tokens_torch(x, weights, top_k))


def test_what_the_kernels_read():
    def weight(rows, columns, group, **changes):
        words, scale = torch.zeros(2, rows, columns // 8, dtype=torch.int32), torch.zeros(1, dtype=torch.bfloat16)
        return KernelWeight(**{"kind": "int4", "values": words, "scale": scale, "group": group} | changes)

    assert reads(weight(64, 256, 32), 32) and reads(weight(64, 512, 128), 32) and reads(weight(64, 512, 10**6), 32)
    assert reads(weight(64, 384, 384), 32), "one group a row, of any number of chunks"
    assert not reads(weight(64, 192, 32), 32), "not of whole chunks"
    assert not reads(weight(48, 256, 32), 32), "not of whole tiles"
    assert not reads(weight(64, 256, 64), 32) and not reads(weight(64, 768, 384), 32), "groups of another size"
    assert not reads(weight(64, 256, 32, kind="int8"), 32) and not reads(weight(64, 256, 32, scale_rows=2), 32)
    assert not reads(weight(64, 256, 32, scale=torch.zeros(1)), 32), "scales in float32"
    nv, fp4 = (layer(8, 256, 128, 64, form, torch.bfloat16, "cpu", form) for form in ("fp4 nv", "fp4"))
    assert reads(nv.w13, 32) and reads(nv.w2, 16) and reads_shared(nv.s2, nv.w2)
    assert not reads(fp4.w13, 32) and not reads_shared(fp4.s2, nv.w2), "scales in float32"
    assert not reads(dataclasses.replace(nv.w13, group=32), 32)
    cpu = layer(8, 256, 128, 64, "int4", torch.bfloat16, "cpu")
    assert not reads_shared(nv.s2, cpu.w2) and reads_shared(cpu.s2, cpu.w2) and reads_shared(cpu.s2, nv.w2)
    assert w4_tokens(cpu.router, cpu, 2) == 0, "a CPU has no csrc"


@pytest.mark.parametrize(
    "form,E,D,I,top_k",
    [
        ("int4", 256, 2048, 512, 8),
        ("int4 zero", 512, 2048, 512, 10),
        ("int4 128", 256, 3072, 1024, 8),
        ("fp4 nv", 256, 2048, 512, 8),
    ],
)
def test_plans_of_the_published_shapes(form, E, D, I, top_k):
    """sm_90 and sm_120 have room for all tokens."""
    w = layer(2, D, I, 0, form, torch.bfloat16, "cpu")
    slots = slots_of(w.w13), slots_of(w.w2)
    for memory in (H200, RTX):
        plans = [plan_w4(memory, T, E, top_k, *slots) for T in range(1, MOST_TOKENS + 1)]
        assert all(plans)
        assert plans[7].down_warps == 16
    little = [plan_w4(90_000, T, E, top_k, *slots) for T in range(1, MOST_TOKENS + 1)]
    assert [plan is None for plan in little] == sorted(plan is None for plan in little), "more tokens need more"
    assert plan_w4(0, 1, E, top_k, *slots) is None


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("T,E,top_k", [(1, 256, 8), (8, 256, 8), (64, 512, 10), (3, 7, 2)])
def test_python_knows_what_the_kernels_take(form, T, E, top_k):
    library, w = load("experts_w4.cpp"), layer(2, 256, 128, 0, form, torch.bfloat16, "cpu")
    lists = most_lists(T, E, top_k)
    r, found = Routing(None, 0, T, E, top_k, lists), (c_int * 3)()
    w13, w2 = (stack(part.values, part.scale, part.zero, part.row_scale) for part in (w.w13, w.w2))
    for warps, stages in ((8, 3), (16, 4)):
        library.sizes(ctypes.byref(w13), ctypes.byref(w2), ctypes.byref(r), warps, stages, found)
        slots = slots_of(w.w13)
        assert found[0] == shared_bytes(T, lists, stages, 8, slots, 32)
        assert found[1] == shared_bytes(T, lists, stages, warps, slots, 16)
        assert found[2] == lists


@pytest.mark.parametrize("form", [packed(4, 32, True), packed(4, 128, False), nvfp4()], ids=["g32", "g128 zero", "fp4"])
def test_layers_of_published_formats_are_read(form):
    """As they are stored once they are loaded; fp4's shared expert too."""
    plan = ConfigPlan(parse_quantization(form.config([]), "a test"), torch.bfloat16)
    experts = FusedMoE(4, 2, 256, 128, prefix="m.experts", plan=plan)
    shared = ReplicatedLinear(128, 256, prefix="m.shared", plan=plan)
    for part in (experts, shared):
        part.fill_dummy(torch.Generator().manual_seed(0))
        part.process_weights_after_loading()
    w13, w2 = (getattr(experts, f"scheme{i}").kernel_weight(experts, f"w{i}_") for i in (13, 2))
    assert reads(w13, 32) and reads(w2, 16)
    assert reads_shared(shared.scheme.kernel_weight(shared), w2) == (w2.kind == "fp4")
