"""Random numbers without a generator: a hash of (seed, index of the generated token, vocabulary id).

A generator's numbers depend on who drew before. These depend on the request alone, so its text is the same in any row, next to
any neighbours, after a preemption, and on any device. The hash uses wrapping integer arithmetic only, which PyTorch does exactly
on the CPU and on the GPU.
"""

from __future__ import annotations

import torch


def _signed32(value: int) -> int:
    return value - (1 << 32) if value >= 1 << 31 else value


def _signed64(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN32 = _signed32(0x9E3779B1)
_MULTIPLIERS32 = tuple(map(_signed32, (0x7FEB352D, 0x846CA68B, 0xC2B2AE35, 0x27D4EB2F)))
_GOLDEN64 = _signed64(0x9E3779B97F4A7C15)
_MULTIPLIERS64 = tuple(map(_signed64, (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)))


def row_keys(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Hash of each row's seed and position.

    Args:
        seeds: [S] int64.
        positions: [S] int64, the index of the token about to be generated.

    Returns:
        [S, 2] int32: 64 bits a row.
    """
    z = _mix64(_mix64(seeds + _GOLDEN64) + positions * _GOLDEN64)
    return torch.stack((z, z >> 32), dim=-1).to(torch.int32)


def _mix64(z: torch.Tensor) -> torch.Tensor:
    """A bijection of 64 bits in which every input bit reaches every output bit. `>>` keeps the sign, hence the masks."""
    for shift, multiplier in zip((30, 27), _MULTIPLIERS64):
        z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * multiplier
    return z ^ ((z >> 31) & ((1 << 33) - 1))


def random_bits(keys: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """32 random bits for each row and vocabulary id: two keyed rounds of xor-shift and multiply.

    Args:
        keys: [S, 2] int32 of `row_keys`.

    Returns:
        [S, vocab_size] int32.
    """
    ids = torch.arange(1, vocab_size + 1, dtype=torch.int32, device=keys.device) * _GOLDEN32
    x = ids ^ keys[:, :1]  # [S, V]
    shifted = torch.empty_like(x)
    m0, m1, m2, m3 = _MULTIPLIERS32
    _xor_shift(x, 16, shifted).mul_(m0)
    _xor_shift(x, 15, shifted).mul_(m1)
    x.bitwise_xor_(keys[:, 1:])
    _xor_shift(x, 16, shifted).mul_(m2)
    _xor_shift(x, 13, shifted).mul_(m3)
    return _xor_shift(x, 16, shifted)


def _xor_shift(x: torch.Tensor, shift: int, out: torch.Tensor) -> torch.Tensor:
    torch.bitwise_right_shift(x, shift, out=out)
    return x.bitwise_xor_(out.bitwise_and_((1 << (32 - shift)) - 1))


def gumbel_noise(keys: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Standard Gumbel noise: the argmax of logits plus this is a draw from their softmax.

    -log(E) of an exponential E = -log(1 - w), with w uniform in (0, 1). Small E wins, and float32 resolves a small w down to 2**-32,
    so that tokens far out in the tail keep their share. The factor on w holds it below 1, where E would be infinite.

    Args:
        keys: [S, 2] int32 of `row_keys`.

    Returns:
        [S, vocab_size] float32, all finite.
    """
    bits = random_bits(keys, vocab_size).bitwise_and_(0x7FFFFFFF)
    w = bits.to(torch.float32).add_(0.5).mul_(2.0**-31 * (1.0 - 2.0**-23))
    return w.neg_().log1p_().neg_().log_().neg_()
