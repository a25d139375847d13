"""csrc/skinny_gemm.cuh on the emulator: plain weights, alone, behind a norm, and adding to what is there."""

from ctypes import c_bool, c_float, c_int

import pytest
import torch

from tests.csrc.emulated.library import aligned, load, pointer

EPS = 1e-6

pytestmark = pytest.mark.usefixtures("seed")


def gemm(x, w, norm=None, plus_one=True, add_to=None, stages=3, blocks=2):
    """y [M, N] of the kernel on the CPU; what it does not write stays NaN."""
    (M, K), N = x.shape, w.shape[0]
    y = aligned(torch.full((M, N), torch.nan).bfloat16() if add_to is None else add_to)
    x, w, norm = aligned(x), aligned(w), None if norm is None else aligned(norm)
    load("skinny_gemm.cpp").skinny_gemm(
        *map(pointer, (y, x, w)),
        *map(c_int, (M, N, K)),
        pointer(norm),
        c_float(EPS),
        c_float(1.0 if plus_one else 0.0),
        c_bool(add_to is not None),
        c_int(stages),
        c_int(blocks),
    )
    return y


def inputs(M, N, K):
    return (torch.randn(M, K) * 3).bfloat16(), (torch.randn(N, K) * K**-0.5).bfloat16()


def normed(x, weight, plus_one=True):
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
    return (wide * (weight.float() + (1.0 if plus_one else 0.0))).bfloat16()


def assert_rounded(got, want, slack=1e-5):
    """Within one rounding to bfloat16 of float32 sums, whose order differs; `want` is exact. slack: share of the largest value."""
    error = (got.double() - want).abs()
    assert torch.isfinite(got).all() and (error <= 2**-8 * want.abs() + slack * want.abs().max()).all()


SIZES = [(M, K) for K in (512, 2048, 4096) for M in (1, 3, 8, 16, 20, 32) if K <= 2048 or M <= 16]


@pytest.mark.parametrize("M,K", SIZES)
def test_alone(M, K):
    x, w = inputs(M, 29, K)
    assert_rounded(gemm(x, w), x.double() @ w.double().T)


@pytest.mark.parametrize("M,K", SIZES)
def test_behind_a_norm(M, K):
    """As a norm by itself, rounded, and then the product. Their sums of squares may differ in the last bit, which rarely shows."""
    x, w = inputs(M, 29, K)
    weight = (torch.randn(K) * 0.3).bfloat16()
    y = gemm(x, w, weight)
    rows = normed(x, weight)
    assert_rounded(y, rows.double() @ w.double().T, slack=1e-3)
    assert (y != gemm(rows, w)).double().mean() <= 0.01


@pytest.mark.parametrize("M,K", SIZES)
def test_adding(M, K):
    """The product is rounded before it is added, as where the two are steps of their own."""
    x, w = inputs(M, 29, K)
    before = torch.randn(M, 29).bfloat16()
    assert torch.equal(gemm(x, w, add_to=before), gemm(x, w) + before)


@pytest.mark.parametrize("stages,blocks,N", [(2, 1, 45), (5, 1, 70), (3, 4, 8), (2, 3, 7), (7, 2, 129)])
def test_rings_and_tiles(stages, blocks, N):
    """Few and many stages, blocks with no tile, one tile and many, and a last tile that is cut."""
    x, w = inputs(3, N, 512)
    weight, before = torch.rand(512).bfloat16(), torch.randn(3, N).bfloat16()
    ring = {"stages": stages, "blocks": blocks}
    y = gemm(x, w, **ring)
    assert_rounded(y, x.double() @ w.double().T)
    assert torch.equal(gemm(x, w, add_to=before, **ring), y + before)
    assert torch.equal(gemm(x, w, weight, plus_one=False, **ring), gemm(normed(x, weight, plus_one=False), w, **ring))


def test_a_row_of_zeros_and_a_long_one():
    """eps keeps the first finite, and float32 holds the other's squares."""
    x, w = inputs(3, 16, 512)
    x[0], x[1] = 0, x[1] * 1e15
    weight = torch.rand(512).bfloat16()
    y = gemm(x, w, weight)
    assert not y[0].any() and torch.equal(y, gemm(normed(x, weight), w))


def test_a_row_does_not_depend_on_its_neighbours():
    x, w = inputs(8, 16, 512)
    weight = torch.rand(512).bfloat16()
    together = gemm(x, w, weight)
    for m in (0, 5):
        assert torch.equal(gemm(x[m : m + 1], w, weight)[0], together[m])


def test_a_lost_column_is_seen():
    """The comparison can fail."""
    x, w = inputs(2, 16, 512)
    want = x.double() @ w.double().T
    with pytest.raises(AssertionError):
        assert_rounded(gemm(x[:, torch.arange(512) ^ 1], w), want)
