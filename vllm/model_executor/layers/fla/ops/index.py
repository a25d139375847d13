"""Where chunks begin: lists that the prefill kernels receive as ready-made device tensors."""

from itertools import pairwise

import torch

from vllm.model_executor.layers.mamba.ops.slots import HostLengths, to_device

CHUNK_SIZE = 64


def cdiv(a: int, b: int) -> int:
    """Ceiling of ``a / b`` for non-negative ``a`` and positive ``b``."""
    return -(-a // b)


def chunk_counts(cu_seqlens: HostLengths, chunk_size: int = CHUNK_SIZE) -> list[int]:
    """Number of chunks of each sequence, ``ceil(length / chunk_size)``."""
    starts = cu_seqlens.tolist() if isinstance(cu_seqlens, torch.Tensor) else cu_seqlens
    return [cdiv(b - a, chunk_size) for a, b in pairwise(starts)]


def prepare_chunk_indices(
    cu_seqlens: HostLengths, chunk_size: int = CHUNK_SIZE, device: torch.device | str | None = None
) -> torch.Tensor:
    """Which sequence, and which of its chunks, each program of a chunk-parallel kernel works on.

    Returns:
        int32 ``[NT, 2]``: (sequence, chunk within the sequence), sequence by sequence. ``device`` defaults to that of ``cu_seqlens``.
    """
    if device is None and isinstance(cu_seqlens, torch.Tensor):
        device = cu_seqlens.device
    pairs = [(n, c) for n, count in enumerate(chunk_counts(cu_seqlens, chunk_size)) for c in range(count)]
    return to_device(pairs, torch.int32, device).reshape(-1, 2)


def prepare_chunk_offsets(
    cu_seqlens: HostLengths, chunk_size: int = CHUNK_SIZE, device: torch.device | str | None = None
) -> torch.Tensor:
    """First chunk of each sequence in the list of all chunks: int32 ``[N + 1]``, the last entry being NT."""
    if device is None and isinstance(cu_seqlens, torch.Tensor):
        device = cu_seqlens.device
    offsets = [0]
    for count in chunk_counts(cu_seqlens, chunk_size):
        offsets.append(offsets[-1] + count)
    return to_device(offsets, torch.int32, device)


def padded_chunk_lists(
    lengths: torch.Tensor, size: int, chunk_size: int = CHUNK_SIZE
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both lists from lengths that only the device knows.

    Args:
        lengths: integers ``[N]``, ``N >= 1``, together at most ``size``.

    Returns:
        Those lists, the first as long as ``N`` sequences of ``size`` tokens together can need. Entries behind the last chunk name chunks past
        the last sequence's end, which hold no token.
    """
    N = lengths.numel()
    ends = ((lengths + chunk_size - 1) // chunk_size).cumsum(0)
    offsets = torch.cat([torch.zeros_like(ends[:1]), ends])  # [N + 1]
    chunk = torch.arange((size + N * (chunk_size - 1)) // chunk_size, device=lengths.device)
    sequence = torch.searchsorted(ends, chunk, right=True).clamp(max=N - 1)
    return torch.stack([sequence, chunk - offsets[sequence]], dim=1).int(), offsets.int()
