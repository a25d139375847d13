"""The PTX that takes elements out of words in pairs, which Triton's interpreter leaves out, run by a few lines of Python."""

import itertools
import re

import pytest
import torch

from vllm.model_executor.layers.ops.stored_weight import _pair, dense
from vllm.model_executor.layers.quantization.base import KernelWeight

ALL = 0xFFFFFFFF


def floats(bits: int, dtype: torch.dtype) -> torch.Tensor:
    """The two lanes of a register."""
    return torch.tensor([bits & 0xFFFF, bits >> 16]).to(torch.uint16).view(dtype)


def register(pair: torch.Tensor) -> int:
    low, high = pair.view(torch.uint16).tolist()
    return low | high << 16


def lop3(a: int, b: int, c: int, table: int) -> int:
    rows = [(x & (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)) for i, x in enumerate([ALL] * 8)]
    return sum(row for i, row in enumerate(rows) if table >> i & 1)


def execute(ptx: str, half: int, s: int, z: int, dtype: torch.dtype) -> torch.Tensor:
    """What ends up in $0 of ``{ .reg .b32 t, u; ...; }``; $1, $2 and $3 are the other arguments."""
    values = {"$1": half, "$2": s, "$3": z}
    of = lambda name: values[name] if name in values else int(name, 0)
    steps = {
        "shr.u32": lambda a, n: a >> n,
        "shl.b32": lambda a, n: a << n & ALL,
        "and.b32": lambda a, b: a & b,
        "lop3.b32": lop3,
        "mov.b32": lambda a: a,
        "sub.rn": lambda a, b: register(floats(a, dtype) - floats(b, dtype)),
        "mul.rn": lambda a, b: register(floats(a, dtype) * floats(b, dtype)),
    }
    for statement in ptx.strip("{} ").split(";"):
        name, _, operands = statement.strip().partition(" ")
        if name and name != ".reg":
            target, *sources = [operand.strip() for operand in operands.split(",")]
            step = re.sub(r"\.b?f16x2$", "", name)
            assert step == name or ("bf16" in name) == (dtype == torch.bfloat16)
            values[target] = steps[step](*map(of, sources))
    return floats(values["$0"], dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["int4", "int8", "fp4"])
def test_pairs_of_elements(kind, dtype):
    """Every byte in every place of a word, beside another word that has all its bits or none."""
    bits = 8 if kind == "int8" else 4
    unit = (128.0 if dtype == torch.bfloat16 else 1024.0) + 2.0 ** (bits - 1)  # what `load_words` has as zero
    s, z = (register(torch.tensor([x, x], dtype=dtype)) for x in (0.75, unit))
    for byte, other, place in itertools.product(range(256), (0, ALL), range(4)):
        words = [byte << 8 * place, other]
        values = torch.tensor(words).to(torch.uint32).view(torch.int32)[:, None]
        stored = values.view(torch.uint8) if kind == "fp4" else values
        want = dense(KernelWeight(kind, stored)) - (0 if kind == "fp4" else 2 ** (bits - 1))
        for i in range(32 // bits):
            half = sum((word >> 16 * (i >= 16 // bits) & 0xFFFF) << 16 * lane for lane, word in enumerate(words))
            for scaled in (False, True):
                got = execute(_pair(i, kind, scaled, dtype == torch.bfloat16), half, s, z, dtype)
                assert torch.equal(got, (want[:, i] * (0.75 if scaled else 1)).to(dtype)), (byte, other, i)
