"""Sequences of a batch and their slots: what the operators with a state share, in PyTorch and without host synchronisation.

Reading a length from a device tensor makes the CPU wait for the GPU. The scheduler knows every length on the host, so lengths come as
host integers; a CPU tensor counts as host, and only a device tensor given without its host twin is read back.
A negative slot index marks a padding row: it reads zeros and writes nothing. Slots of real rows must be distinct.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch

PAD_SLOT_ID = -1

HostLengths = Sequence[int] | torch.Tensor


def host_cu_seqlens(
    batch: int, length: int, cu_seqlens: torch.Tensor | None, cu_seqlens_cpu: HostLengths | None = None
) -> list[int]:
    """Cumulative sequence starts ``[N + 1]`` as Python integers.

    Without ``cu_seqlens`` the batch holds ``batch`` sequences of ``length`` tokens each. ``cu_seqlens_cpu`` (a list or a CPU tensor)
    spares the read-back of a device ``cu_seqlens``.

    Raises:
        ValueError: the starts decrease, do not begin at 0, run past the tokens, or come with more than one batch row.
    """
    if cu_seqlens is None and cu_seqlens_cpu is None:
        return [i * length for i in range(batch + 1)]
    if batch != 1:
        raise ValueError(f"variable lengths need tensors of one batch row [1, T, H, D], got {batch} rows")
    source = cu_seqlens if cu_seqlens_cpu is None else cu_seqlens_cpu
    starts = source.tolist() if isinstance(source, torch.Tensor) else list(source)
    if len(starts) < 1 or starts[0] != 0 or starts[-1] > length or any(a > b for a, b in pairwise(starts)):
        raise ValueError(f"cu_seqlens must rise from 0 to at most {length} tokens, got {starts}")
    return starts


def to_device(values: list, dtype: torch.dtype, device: torch.device | str | None) -> torch.Tensor:
    """A host list as a device tensor, copied without waiting (from pinned memory where the device is a GPU)."""
    host = torch.tensor(values, dtype=dtype)
    if device is None or torch.device(device).type == "cpu":
        return host
    return host.pin_memory().to(device, non_blocking=True)


def gather_slots(pool: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Rows ``pool[indices]`` ``[N, ...]`` as a new tensor; zeros where the index is negative."""
    rows = pool[indices.clamp(min=0).long()]
    valid = (indices >= 0).view(-1, *[1] * (pool.dim() - 1))
    return torch.where(valid, rows, torch.zeros((), dtype=pool.dtype, device=pool.device))


def scatter_slots(pool: torch.Tensor, indices: torch.Tensor, rows: torch.Tensor) -> None:
    """``pool[indices] = rows`` in place, cast to the pool's dtype; rows with a negative index are left out.

    Selecting the valid rows would need their count on the host. Instead every padding row repeats the write of the first valid row
    (the same value to the same place); with no valid row at all, slot 0 is rewritten with what it holds.
    """
    if indices.numel() == 0:
        return
    valid = indices >= 0
    order = torch.arange(indices.numel(), device=indices.device)
    source = torch.where(valid, order, valid.to(torch.int8).argmax())
    target = indices[source].clamp(min=0).long()
    any_valid = valid.any().view(*[1] * pool.dim())
    pool[target] = torch.where(any_valid, rows.to(pool.dtype)[source], pool[target])
