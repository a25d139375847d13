"""Inputs and comparisons that the kernel tests share."""

from itertools import accumulate

import torch

# Share of the largest reference value. bfloat16 carries 8 bits, a chain of products rounds several times, and the interpreter
# truncates where hardware rounds to nearest.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def assert_close(got: torch.Tensor, want: torch.Tensor, tolerance: float, name: str = "") -> None:
    """Largest difference at most ``tolerance`` times the largest wanted value (at least 1), and nothing left as NaN."""
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)} instead of {tuple(want.shape)}"
    got, want = got.detach().double(), want.detach().double()
    assert not want.isnan().any(), f"{name}: the reference holds NaN"
    assert not got.isnan().any(), f"{name}: {got.isnan().sum()} of {got.numel()} values are NaN"
    if got.numel():
        error, size = (got - want).abs().max().item(), max(1.0, want.abs().max().item())
        assert error <= tolerance * size, f"{name}: off by {error:.3g} where values reach {size:.3g}"


def starts(lengths: list[int], device: str) -> torch.Tensor:
    """Cumulative starts of sequences."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def slots(count: int, pool: int, device: str, padding: tuple[int, ...] = ()) -> torch.Tensor:
    """``count`` distinct slots of a pool in random order, -1 at the rows in ``padding``."""
    indices = torch.randperm(pool)[:count].to(torch.int32)
    indices[list(padding)] = -1
    return indices.to(device)


def delta_inputs(
    B: int, T: int, Hk: int, Hv: int, K: int, V: int, dtype: torch.dtype, device: str
) -> dict[str, torch.Tensor]:
    """q, k, v, g, beta as a layer produces them: correlated keys, decays from almost none to almost all."""
    q, k = (torch.randn(B, T, Hk, K) + 0.5 for _ in range(2))
    tensors = {
        "q": q.to(dtype),
        "k": k.to(dtype),
        "v": torch.randn(B, T, Hv, V).to(dtype),
        "g": -torch.rand(B, T, Hv).pow(4) * 5,
        "beta": torch.rand(B, T, Hv),
    }
    return {name: x.to(device) for name, x in tensors.items()}
