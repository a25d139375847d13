"""Which kernel multiplies a few rows of x with a weight: a pure function of the GPU, the sizes and the weight's format.

What is fastest was measured shape by shape (benchmarks/kernels/skinny_gemm.py writes assets/skinny_gemm.json). A shape that was not
measured takes the plan of the most alike that was: as many columns, and a number of rows as near as can be.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

TABLE = Path(__file__).resolve().parents[3] / "assets/skinny_gemm.json"
MAX_ROWS = 32
"""Rows of x up to which any kernel here is worth a look."""


@dataclass(frozen=True)
class Plan:
    """One way to multiply.

    form: "vector" and "rows" are Triton kernels for one and for several rows of x, "ring" is csrc/skinny_gemm.cu, "quantised"
        csrc/quantised_gemm.cu, and "dense" cuBLAS, after dequantisation where the weight is quantised.
    ring, late: of csrc's kernels: kilobytes of shared memory a block may take, and stages it has still to ask for when the next kernel
        may start.
    """

    form: str
    ring: int = 110
    late: int = 0


DENSE = Plan("dense")


def ring_fits(M: int, K: int, kind: str, group: int = 0) -> bool:
    """Whether csrc/skinny_gemm.cu has code for M rows of x with K columns.

    Args:
        kind, group: as in :class:`~vllm.model_executor.layers.quantization.base.KernelWeight`.
    """
    bits = {"plain": 16, "int8": 8, "fp8": 8, "int4": 4, "fp4": 4}.get(kind)
    if bits is None or not 1 <= M <= (MAX_ROWS if K <= 2048 else 16) or K not in (512, 2048, 4096):
        return False
    if kind == "plain":
        return True
    if K == 512 and bits == 4:
        return False
    if group >= K:
        return bits == 8
    least = 32 if kind == "int4" else 16
    return least <= group <= 512 and group & (group - 1) == 0


def quantised_fits(M: int, K: int, kind: str, group: int) -> bool:
    """Whether csrc/quantised_gemm.cu has code for M rows of x with K columns; arguments as in :func:`ring_fits`."""
    step = {"int4": 32, "int8": 16, "fp8": 16, "fp4": 32}.get(kind)
    if step is None or not 1 <= M <= MAX_ROWS or K % (4 * step):
        return False
    if kind == "fp4":
        return group == 16
    if group >= K or group == {"int4": step, "int8": 2 * step}.get(kind):
        return True
    chunks = group // (4 * step)
    return group % (4 * step) == 0 and chunks & (chunks - 1) == 0


def plan_skinny_gemm(
    gpu: str,
    M: int,
    N: int,
    K: int,
    kind: str = "plain",
    group: int = 0,
    csrc: bool = True,
    *,
    behind_norm: bool = False,
) -> Plan:
    """The fastest way for M rows of x [M, K] and a weight [N, K].

    Args:
        gpu: its name. One that was not measured is taken for one that was.
        csrc: whether csrc's kernels can be used there.
        behind_norm: whether x is still to be normalised. The ring does that on the way, and may take a little longer for it.
    """
    if not 1 <= M <= MAX_ROWS:
        return DENSE
    plan, otherwise, near = _measured(gpu, M, N, K, kind)
    if behind_norm and csrc and near is not None:
        plan = near
    fits = {"ring": ring_fits, "quantised": quantised_fits}.get(plan.form)
    return plan if fits is None or (csrc and fits(M, K, kind, group)) else otherwise


@lru_cache
def _table() -> dict[str, dict[str, dict[str, dict[str, dict]]]]:
    """GPU -> kind -> "NxK" -> rows of x -> fields of a Plan, the best form "otherwise" where that is csrc's, and the ring's Plan
    "behind_norm" where it is not the fastest by less than a norm's kernel takes."""
    return json.loads(TABLE.read_text())


@lru_cache(maxsize=4096)
def _measured(gpu: str, M: int, N: int, K: int, kind: str) -> tuple[Plan, Plan, Plan | None]:
    table = _table()
    shapes = table.get(gpu, next(iter(table.values()))).get(kind, {})
    alike = [(abs(math.log(int(n) / N)), int(n)) for n, k in (shape.split("x") for shape in shapes) if int(k) == K]
    rows = shapes[f"{min(alike)[1]}x{K}"] if alike else {}
    measured = [int(m) for m in rows if int(m) >= M]
    if not measured:
        plan = _unmeasured(M, N, K) if kind == "plain" else Plan("quantised")
        return plan, DENSE if plan.form == "quantised" else plan, None
    entry = dict(rows[str(min(measured))])
    otherwise, near = Plan(entry.pop("otherwise", "dense")), entry.pop("behind_norm", None)
    return Plan(**entry), otherwise, near and Plan(**near)


def _unmeasured(M: int, N: int, K: int) -> Plan:
    """A K unlike all in the table. On an H200 the Triton kernel for several rows is slower than cuBLAS where N is small."""
    if K % 64 or (M > 1 and N < 12000):
        return DENSE
    return Plan("vector" if M == 1 else "rows")


@dataclass(frozen=True)
class Product:
    """A projection behind a norm, or one whose result is added to a residual (`layers/folding.py`).

    kind: how the weight [N, K] is stored, as in KernelWeight; None: in another way.
    adds: which of the two.
    """

    kind: str | None
    N: int
    K: int
    bias: bool = False
    adds: bool = False

    def folds(self, rows: int, gpu: str) -> bool:
        """Where a kernel that does both is the fastest: elsewhere another one, with the norm or the add beside it, may take less time."""
        if self.kind != "plain" or self.bias:
            return False
        plan = plan_skinny_gemm(gpu, rows, self.N, self.K, behind_norm=not self.adds)
        return plan.form == "ring" or (self.adds and plan.form == "vector")
