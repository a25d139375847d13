"""Compile every kernel ahead of time, for GPUs this machine does not have: ``python -m tests.kernels.aot`` prints one JSON line each.

The launchers run on CPU tensors of the real models' sizes with the launch itself replaced by a recorder, so that what is compiled is what
would be launched: the same arguments, tiles and specialisations. Runs in a process of its own, without Triton's interpreter.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from vllm.model_executor.layers.fla.ops import (
    chunk,
    fused_decode,
    fused_recurrent,
    fused_sigmoid_gating,
    gating,
    l2norm,
    layernorm_guard,
    packed_decode,
)
from vllm.model_executor.layers.mamba.ops import causal_conv1d, causal_conv1d_update
from vllm.model_executor.layers.ops import silu_and_mul, skinny_gemm

TYPES = {
    torch.float32: "*fp32",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}
OPTIONS = ("num_warps", "num_stages", "num_ctas", "launch_pdl")
Recorded = tuple[JITFunction, dict[str, str], dict[str, object], dict[tuple[int], list], dict[str, int]]


def describe(fn: JITFunction, args: tuple, kwargs: dict) -> Recorded:
    """The signature, constants, divisibility attributes and options of one launch."""
    options = {name: kwargs[name] for name in OPTIONS if name in kwargs}
    values = dict(zip(fn.arg_names, args)) | {name: x for name, x in kwargs.items() if name in fn.arg_names}
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(fn.params):
        name, value = parameter.name, values[parameter.name]
        general = parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and not general):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            if value.data_ptr() % 16 == 0 and not parameter.do_not_specialize_on_alignment:
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
            if value % 16 == 0 and not general:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return fn, signature, constants, attributes, options


def launch_all(dtype: torch.dtype, state_dtype: torch.dtype, K: int, V: int, Hk: int, Hv: int, B: int, T: int) -> None:
    """Every launcher once, at one set of sizes."""
    dim, pool = 2 * Hk * K + Hv * V, B + 1
    x = torch.zeros(B, dim, dtype=dtype)
    a = torch.zeros(B, Hv, dtype=dtype)
    z = torch.zeros(B, Hv, V, dtype=dtype)
    A_log, dt_bias, norm = torch.zeros(Hv), torch.zeros(Hv, dtype=dtype), torch.zeros(V)
    state, windows = torch.zeros(pool, Hv, V, K, dtype=state_dtype), torch.zeros(pool, dim, 3, dtype=dtype)
    weight, index = torch.zeros(dim, 4, dtype=dtype), torch.arange(B, dtype=torch.int32)
    # few long sequences and many short ones take different tiles
    N = min(B, 16) if B > 8 else 2
    cu = torch.arange(N + 1, dtype=torch.int32) * (T // N)
    q, k = (torch.zeros(1, T, Hk, K, dtype=dtype) for _ in range(2))
    v, g = torch.zeros(1, T, Hv, V, dtype=dtype), torch.zeros(1, T, Hv)
    flags, sequences = torch.ones(N, dtype=torch.bool), torch.arange(N, dtype=torch.int32)
    weights = torch.zeros(dim + Hv * V + 2 * Hv, 1024, dtype=dtype)
    for rows in (1, 2, 16, 32) if dtype != torch.float32 else ():
        skinny_gemm.skinny_gemm_triton(weights[:rows], weights)
    silu_and_mul.silu_and_mul_triton(x.new_zeros(3, 2 * 12288))
    l2norm.l2norm_fwd_triton(q)
    gating.fused_gdn_gating_triton(A_log, a, a, dt_bias)
    layernorm_guard.rmsnorm_gated_triton(z, norm, z)
    causal_conv1d.causal_conv1d_fn_triton(x.new_zeros(T, dim).T, weight, None, windows, cu, sequences, flags)
    update = causal_conv1d_update.causal_conv1d_update_triton
    update(x, windows, weight, None, "silu", index)
    drafts, per_token = torch.zeros(pool, dim, 5, dtype=dtype), index[:, None].repeat(1, 3)
    update(
        x.new_zeros(3 * B, dim), drafts, weight, None, "silu", index, index, torch.arange(B + 1, dtype=torch.int32), 3
    )
    chunk.chunk_gated_delta_rule_triton(
        q, k, v, g, g, None, state, True, cu, None, None, True, ssm_state_indices=sequences, has_initial_state=flags
    )
    decode_q, decode_v, decode_g = q.new_zeros(B, 1, Hk, K), v.new_zeros(B, 1, Hv, V), torch.zeros(B, 1, Hv)
    recurrent = fused_recurrent.fused_recurrent_gated_delta_rule_triton
    recurrent(decode_q, decode_q, decode_v, decode_g, decode_g, None, state, True, None, index, None, True)
    sigmoid = fused_sigmoid_gating.fused_sigmoid_gating_delta_rule_update_triton
    sigmoid(
        A_log,
        a[:, None],
        a[:, None],
        dt_bias,
        decode_q,
        decode_q,
        decode_v,
        1.0,
        20.0,
        None,
        state,
        True,
        None,
        index,
        None,
        True,
    )
    rows = x.new_zeros(1, 3 * B, dim)
    heads = [rows[..., : Hk * K].view(1, -1, Hk, K)] * 2 + [rows[..., -Hv * V :].view(1, -1, Hv, V)]
    spec_cu, gate = torch.arange(B + 1, dtype=torch.int32), a.new_zeros(3 * B, Hv)
    sigmoid(A_log, gate, gate, dt_bias, *heads, 1.0, 20.0, None, state, True, spec_cu, per_token, index, True)
    packed_decode.fused_recurrent_gated_delta_rule_packed_decode_triton(
        x, a, a, A_log, dt_bias, None, state, None, index
    )
    fused_decode.fused_gdn_decode_triton(x, z, a, a, windows, weight, None, A_log, dt_bias, norm, 1e-6, state, index)


def record(cases: list[tuple], launch: Callable[..., None] = launch_all) -> list[Recorded]:
    """What `launch` would launch at these sizes, each distinct kernel once."""
    seen: dict[str, Recorded] = {}

    def run(self, *args, grid, warmup, **kwargs):
        entry = describe(self, args, kwargs)
        seen[repr((self.fn.__name__, *entry[1:]))] = entry

    original, JITFunction.run = JITFunction.run, run
    try:
        for sizes in cases:
            launch(*sizes)
    finally:
        JITFunction.run = original
    return list(seen.values())


CASES = {
    "bf16-128": [(torch.bfloat16, torch.float32, 128, 128, 16, 32, B, T) for B, T in ((1, 128), (64, 8192))],
    "bf16-64": [(torch.bfloat16, torch.bfloat16, 64, 64, 4, 12, 8, 1024)],
    "fp32-128": [(torch.float32, torch.float32, 128, 128, 16, 16, 8, 1024)],
}


def in_flight(ttgir: str) -> int:
    """Products that read registers and may be under way while a loop's next step fills these again."""
    if not re.search(r"warp_group_dot .*#ttg\.dot_op", ttgir):
        return 0
    return max(map(int, re.findall(r"warp_group_dot_wait .*pendings = (\d+)", ttgir)), default=0)


def usage(asm: dict) -> dict[str, int]:
    """Products in flight, and registers and spilled bytes a thread as the assembler counted them, unless cuobjdump is missing."""
    found = {"in_flight": in_flight(asm["ttgir"])}
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.is_file():
        return found
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    counted = dict(re.findall(r"\b(REG|STACK):(\d+)", text))
    return found | {"registers": int(counted.get("REG", 0)), "stack": int(counted.get("STACK", 0))}


def compile_for(arch: int, recorded: Recorded) -> dict[str, object]:
    """One kernel for one GPU: its tile, shared memory, registers and the time it took."""
    fn, signature, constants, attributes, launch = recorded
    begin = time.time()
    kernel = triton.compile(
        ASTSource(fn, signature, constants, attributes), target=GPUTarget("cuda", arch, 32), options=launch
    )
    tile = {name: x for name, x in constants.items() if name in ("BT", "BK", "BV", "BD", "BM", "BN")}
    return {
        "kernel": fn.fn.__name__,
        "arch": arch,
        **tile,
        **launch,
        "shared": kernel.metadata.shared,
        **usage(kernel.asm),
        "seconds": round(time.time() - begin, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, action="append", help="compute capability, 90 or 120; may be repeated")
    parser.add_argument("--case", choices=CASES, action="append")
    options = parser.parse_args()
    for module in (chunk, fused_decode, fused_recurrent, skinny_gemm):
        module.multiprocessors = lambda device: 132
    for module in (fused_decode, silu_and_mul, skinny_gemm):
        module.overlaps_launches = lambda device: True
    for case in options.case or CASES:
        for recorded in record(CASES[case]):
            for arch in options.arch or (90, 120):
                print(json.dumps({"case": case, **compile_for(arch, recorded)}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
