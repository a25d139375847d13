"""How a quantised weight is multiplied with many rows of x: a pure function of the GPU, the sizes and the weight's format.

Dequantising in registers costs every program of BM rows the conversion of its tile of W anew, and writes nothing. A dense copy is
converted once, then read as any 16-bit weight: the more rows, the smaller its share. Products of 8-bit floats beat both.
"""

from __future__ import annotations

from dataclasses import dataclass

BK = 128
"""Columns of x and W a step. Groups of 128 meet a step's sums, and a row of 16-bit x the widest pieces that are copied."""

GROUPED = 8
"""Tiles along x that run side by side over all of W: a round of programs then reads about as much of either."""

FP8_CAPABILITY, REGISTERS_CAPABILITY = (8, 9), (9, 0)
"""Of GPUs that multiply 8-bit floats, and of those that do arithmetic on pairs of bfloat16."""

MOST_IN_REGISTERS = {True: 128, False: 1024}
"""Rows of x up to which W is dequantised in registers, on GPUs with 227 KiB of shared memory a block (measured on an H200, where a copy
takes as long at 256 rows and less from there on) and on others (not measured: they multiply more slowly beside what they copy)."""

LEAST_FP8_ROWS = 129
"""Rows of x from which it is quantised, where that is asked for: fewer wait for W either way, and are more exact in 16 bits."""

MOST_FP8_ROWS = {True: 1024, False: None}
"""Rows of x up to which it is, where a weight has a scale for every block: on an H200, sums that are scaled every 128 columns keep its
tensor cores from more than half their rate in 8 bits, and lose to a copy."""


LEAST_LIBRARY_ROWS = 257
"""Rows of x from which cuBLAS multiplies 8-bit floats with one scale a row, on GPUs of the former kind."""


@dataclass(frozen=True)
class Gpu:
    capability: tuple[int, int]
    multiprocessors: int


@dataclass(frozen=True)
class Tile:
    """Of one program: BM rows of x by BN rows of W. speed: of its inner loop beside the fastest tile's."""

    BM: int
    BN: int
    num_warps: int
    num_stages: int
    speed: float

    @property
    def launch(self) -> dict[str, int]:
        return {"BM": self.BM, "BN": self.BN, "num_warps": self.num_warps, "num_stages": self.num_stages}


TILES = {
    "registers": {
        True: (
            Tile(128, 128, 8, 4, 0.86),
            Tile(64, 128, 4, 3, 0.87),
            Tile(64, 64, 4, 4, 0.8),
        ),
        False: (Tile(128, 64, 4, 3, 1.0), Tile(64, 64, 4, 4, 0.7)),
    },
    "fp8": {
        True: (Tile(128, 128, 8, 4, 0.89), Tile(64, 128, 4, 4, 1.0), Tile(64, 64, 4, 4, 0.85)),
        False: (Tile(128, 128, 8, 3, 1.0), Tile(64, 128, 4, 3, 0.9), Tile(64, 64, 4, 4, 0.6)),
    },
}
"""Of each way: those for 227 KiB of shared memory a block (sm_90, sm_100), and for the 99 KiB of consumer GPUs. Speeds of the
former are measured, those of the latter guessed."""


@dataclass(frozen=True)
class ManyRows:
    """form: "registers" (W dequantised there), "fp8" (products of 8-bit floats), "library" (those by cuBLAS), "copy" (a dense copy made
    by one kernel, then cuBLAS)."""

    form: str
    tile: Tile | None = None


def plan_quantised_gemm(gpu: Gpu, M: int, N: int, K: int, fp8_group: int = 0, library: bool = False) -> ManyRows | None:
    """The fastest way for M rows of x [M, K] and a weight [N, K], or None where no kernel runs: a GPU that lacks the instructions, or
    a K that no step divides.

    Args:
        fp8_group: columns of a row of x that share a scale where x may be quantised to 8-bit floats; 0: it may not.
        library: whether cuBLAS takes such products, of one scale a row.
    """
    large = gpu.capability[0] in (9, 10)
    most_fp8 = None if fp8_group == K else MOST_FP8_ROWS[large]
    form = "fp8" if fp8_group and LEAST_FP8_ROWS <= M <= (most_fp8 or M) else "registers"
    if K % BK or gpu.capability < (FP8_CAPABILITY if form == "fp8" else REGISTERS_CAPABILITY):
        return None
    if form == "fp8" and library and large and M >= LEAST_LIBRARY_ROWS:
        return ManyRows("library")
    # sizes of prompts in a few classes, so that the warm-up meets every tile
    rows = min(1024, 1 << max(0, M - 1).bit_length())
    if form == "registers" and MOST_IN_REGISTERS[large] < M:
        return ManyRows("copy")
    return ManyRows(form, min(TILES[form][large], key=lambda tile: _time(tile, gpu, rows, N)))


def _time(tile: Tile, gpu: Gpu, M: int, N: int) -> float:
    """Of one product, in arbitrary units: rounds of programs, one a multiprocessor, by what one takes."""
    programs = -(-M // tile.BM) * -(-N // tile.BN)
    return -(-programs // gpu.multiprocessors) * tile.BM * tile.BN / tile.speed
