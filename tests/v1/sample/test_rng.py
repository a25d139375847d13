"""The hash: the same everywhere, and as good as random for what the sampler does with it."""

import math

import pytest
import torch

from vllm.v1.sample.rng import gumbel_noise, random_bits, row_keys

MASK32, MASK64 = (1 << 32) - 1, (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def mix64(z):
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    return z ^ (z >> 31)


def reference_bits(seed, position, token):
    """The same hash in Python's unbounded integers."""
    key = mix64((mix64((seed + GOLDEN) & MASK64) + position * GOLDEN) & MASK64)
    x = ((token + 1) * 0x9E3779B1 & MASK32) ^ (key & MASK32)
    for shift, multiplier in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> shift)) * multiplier) & MASK32
    x ^= key >> 32
    for shift, multiplier in ((16, 0xC2B2AE35), (13, 0x27D4EB2F)):
        x = ((x ^ (x >> shift)) * multiplier) & MASK32
    return x ^ (x >> 16)


def keys_of(seeds, positions, device="cpu"):
    return row_keys(torch.tensor(seeds, device=device), torch.tensor(positions, device=device))


def uniforms(keys, vocab_size):
    """[S, V] float64 in [0, 1)."""
    return (random_bits(keys, vocab_size).to(torch.int64) & MASK32).double() / 2.0**32


def assert_uniform(values, bins=64):
    """Chi-square: its distance from the mean in standard deviations."""
    counts = torch.bincount((values.flatten() * bins).long(), minlength=bins).double()
    expected = values.numel() / bins
    chi2 = ((counts - expected) ** 2 / expected).sum().item()
    assert abs(chi2 - (bins - 1)) / math.sqrt(2 * (bins - 1)) < 5, chi2


SEEDS = [0, 1, -1, 2**63 - 1, -(2**63), 123456789]
POSITIONS = [0, 1, 2, 1000, 262143, 7]


def test_matches_unbounded_integers():
    bits = random_bits(keys_of(SEEDS, POSITIONS), 50).to(torch.int64) & MASK32
    expected = [[reference_bits(s, p, t) for t in range(50)] for s, p in zip(SEEDS, POSITIONS)]
    assert bits.tolist() == expected


@pytest.mark.gpu
def test_gpu_gives_the_same_bits():
    cpu, gpu = (random_bits(keys_of(SEEDS, POSITIONS, device), 248320) for device in ("cpu", "cuda"))
    assert torch.equal(cpu, gpu.cpu())
    noise = [gumbel_noise(keys_of(SEEDS, POSITIONS, device), 248320).cpu() for device in ("cpu", "cuda")]
    torch.testing.assert_close(*noise, rtol=1e-5, atol=1e-5)


def test_uniform_over_the_vocabulary_over_positions_and_over_seeds():
    n = 1 << 16
    assert_uniform(uniforms(keys_of([0], [0]), n))
    assert_uniform(uniforms(keys_of([5] * n, list(range(n))), 1))
    assert_uniform(uniforms(keys_of(list(range(n)), [3] * n), 1))


@pytest.mark.parametrize("axis", ["token", "position", "seed"])
def test_neighbours_are_independent(axis):
    """Pairs of neighbouring draws fill the unit square evenly, and do not correlate."""
    n = 256
    if axis == "token":
        u = uniforms(keys_of([9] * n, list(range(n))), n)
    elif axis == "position":
        u = uniforms(keys_of([9] * n, list(range(n))), n).T
    else:
        u = uniforms(keys_of(list(range(n)), [4] * n), n).T
    a, b = u[:, :-1].flatten(), u[:, 1:].flatten()
    correlation = torch.corrcoef(torch.stack((a, b)))[0, 1].item()
    assert abs(correlation) < 5 / math.sqrt(a.numel())
    assert_uniform((torch.floor(a * 16) + b) / 16, bins=16 * 16)


def test_every_bit_of_the_inputs_matters():
    """Flipping any bit of seed or position flips each output bit about half of the time."""
    base = keys_of([77], [13])
    for keys in (
        keys_of([77 ^ (1 << i) for i in range(63)], [13] * 63),
        keys_of([77] * 31, [13 ^ (1 << i) for i in range(31)]),
    ):
        flipped = random_bits(base, 512) ^ random_bits(keys, 512)  # [inputs, 512]
        share = torch.stack([((flipped >> bit) & 1).double().mean(dim=1) for bit in range(32)])
        assert (share - 0.5).abs().max() < 0.5 * 6 / math.sqrt(512)


def test_a_row_depends_on_nothing_but_itself():
    keys = keys_of(SEEDS, POSITIONS)
    noise = gumbel_noise(keys, 300)
    for i in range(len(SEEDS)):
        assert torch.equal(gumbel_noise(keys[i : i + 1], 300)[0], noise[i])
    assert torch.equal(gumbel_noise(keys, 100), noise[:, :100])


def test_gumbel_is_finite_and_has_its_moments():
    noise = gumbel_noise(keys_of(list(range(64)), [0] * 64), 1 << 14).double()
    assert noise.isfinite().all()
    assert abs(noise.mean() - 0.5772) < 0.01 and abs(noise.var() - math.pi**2 / 6) < 0.02
    assert noise.max() > 11  # of a million draws


def test_the_extreme_hashes_stay_finite(monkeypatch):
    extremes = torch.tensor([[0, -1, 2**31 - 1, -(2**31), 2**31 - 2]], dtype=torch.int32)
    monkeypatch.setattr("vllm.v1.sample.rng.random_bits", lambda keys, vocab_size: extremes.clone())
    noise = gumbel_noise(keys_of([0], [0]), 5)
    assert noise.isfinite().all() and noise.max() > 20


def test_draws_follow_the_softmax():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -3.0, 0.5])
    n = 200_000
    noise = gumbel_noise(keys_of([11] * n, list(range(n))), 6)
    counts = torch.bincount((logits + noise).argmax(dim=1), minlength=6).double()
    expected = logits.double().softmax(0) * n
    chi2 = ((counts - expected) ** 2 / expected).sum().item()
    assert chi2 < 5 + 5 * math.sqrt(10), chi2
