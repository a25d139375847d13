"""One GDN decode step between its projections, 35B shape: separate kernels, packed, and fused in Triton and in CUDA C++.

    python -m benchmarks.kernels.gdn_decode [--json result.json]

States and parameters are cold, as they are in a model of many layers: calls rotate over enough of both to leave the cache. The inputs
have just been written by the projection, so all calls read the same ones. "bytes" counts the states, once read and once written.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.kernels.timing import bandwidths, interleaved_us, write_result
from vllm.model_executor.layers.fla.ops import (
    fused_recurrent_gated_delta_rule_packed_decode,
    fused_sigmoid_gating_delta_rule_update,
    rmsnorm_gated,
)
from vllm.model_executor.layers.fla.ops.fused_decode import fused_gdn_decode_torch, fused_gdn_decode_triton
from vllm.model_executor.layers.fla.ops.fused_decode_cuda import fits_fused_decode_cuda, fused_gdn_decode_cuda
from vllm.model_executor.layers.mamba.ops.causal_conv1d import causal_conv1d_update

HK, HV, K, V, TAPS = 16, 32, 128, 128, 4
DIM = 2 * HK * K + HV * V
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
COLD_BYTES = 256 * 2**20


def make_layer(batch: int, dtype: torch.dtype) -> dict:
    """One layer's parameters and pools; windows and weights have their channels side by side."""
    return {
        "conv_state": torch.randn(batch + 1, TAPS - 1, DIM, device="cuda").bfloat16().transpose(1, 2),
        "conv_weight": (torch.randn(TAPS, DIM, device="cuda") * 0.5).bfloat16().T,
        "conv_bias": None,
        "A_log": torch.rand(HV, device="cuda"),
        "dt_bias": torch.randn(HV, device="cuda"),
        "norm_weight": torch.rand(V, device="cuda") + 0.5,
        "eps": 1e-6,
        "ssm_state": torch.randn(batch + 1, HV, V, K, device="cuda").to(dtype),
        "state_indices": torch.randperm(batch + 1, device="cuda")[:batch].int(),
    }


def make_inputs(batch: int) -> dict:
    projected = torch.randn(batch, DIM + HV * V + 2 * HV, device="cuda").bfloat16()
    return dict(zip(("mixed_qkv", "z", "b", "a"), projected.split([DIM, HV * V, HV, HV], dim=1)))


def convolved(x: dict, p: dict) -> torch.Tensor:
    return causal_conv1d_update(
        x["mixed_qkv"], p["conv_state"], p["conv_weight"], None, "silu", conv_state_indices=p["state_indices"]
    )


def normed(o: torch.Tensor, x: dict, p: dict) -> torch.Tensor:
    return rmsnorm_gated(o.view(-1, HV, V), p["norm_weight"], x["z"].unflatten(1, (HV, V)), p["eps"])


def unpacked(x: dict, p: dict) -> torch.Tensor:
    """Three kernels and the copies of q, k and v."""
    q, k, v = convolved(x, p).split([HK * K, HK * K, HV * V], dim=1)
    q, k, v = (t.contiguous().unflatten(1, (-1, 128))[:, None] for t in (q, k, v))
    a, b = (x[name][:, None] for name in ("a", "b"))
    o, _ = fused_sigmoid_gating_delta_rule_update(
        p["A_log"],
        a,
        b,
        p["dt_bias"],
        q,
        k,
        v,
        initial_state=p["ssm_state"],
        inplace_final_state=True,
        ssm_state_indices=p["state_indices"],
        use_qk_l2norm_in_kernel=True,
    )
    return normed(o, x, p)


def packed(x: dict, p: dict) -> torch.Tensor:
    """Three kernels."""
    o, _ = fused_recurrent_gated_delta_rule_packed_decode(
        convolved(x, p), x["a"], x["b"], p["A_log"], p["dt_bias"], None, p["ssm_state"], None, p["state_indices"]
    )
    return normed(o, x, p)


def forms(x: dict, layer: dict) -> dict[str, Callable[[dict], torch.Tensor]]:
    vectors = (layer["A_log"], layer["dt_bias"], layer["norm_weight"])
    found = {
        "unpacked": lambda p: unpacked(x, p),
        "packed": lambda p: packed(x, p),
        "triton": lambda p: fused_gdn_decode_triton(**x, **p),
    }
    if fits_fused_decode_cuda(x["mixed_qkv"], layer["conv_state"], layer["conv_weight"], vectors, layer["ssm_state"]):
        found |= {name: lambda p: fused_gdn_decode_cuda(**x, **p) for name in ("cuda", "cuda_again")}
    return found


def check(found: dict, x: dict, layer: dict) -> None:
    """Every form gives what the PyTorch form gives, within bfloat16."""
    pools = ("conv_state", "ssm_state")
    copy = lambda: layer | {name: layer[name].clone() for name in pools}
    reference = copy()
    want = fused_gdn_decode_torch(**x, **reference)
    for name, form in found.items():
        mine = copy()
        got = form(mine)
        pairs = [(got.view_as(want), want), *((mine[pool], reference[pool]) for pool in pools)]
        errors = [((g.float() - w.float()).norm() / w.float().norm()).item() for g, w in pairs]
        if not max(errors) < 1e-2:
            raise RuntimeError(f"{name} is off by {errors}")


def measure(batch: int, dtype: torch.dtype, bandwidth: float) -> dict:
    moved = 2 * batch * HV * V * K * dtype.itemsize
    layers = [make_layer(batch, dtype) for _ in range(max(4, 2 * COLD_BYTES // moved))]
    x = make_inputs(batch)
    found = forms(x, layers[0])
    check(found, x, layers[0])
    times = interleaved_us(
        {name: [lambda f=form, p=p: f(p) for p in layers] for name, form in found.items()}, rounds=20
    )
    best = min(time for name, time in times.items() if name in ("triton", "cuda"))
    return {
        "batch": batch,
        "state": str(dtype).removeprefix("torch."),
        "bytes": moved,
        **{f"{name}_us": time for name, time in times.items()},
        "share_of_copy": moved / best * 1e6 / bandwidth,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("needs a CUDA device")
    torch.manual_seed(0)
    bandwidth = bandwidths()
    print(f"{torch.cuda.get_device_name()}: copy {bandwidth['copy'] * 1e-12:.2f} TB/s. us a step:")
    print(
        f"{'state':>9} {'batch':>5} {'unpacked':>9} {'packed':>8} {'triton':>8} {'cuda':>8} {'again':>8} {'of copy':>8}"
    )
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for batch in BATCHES:
            row = measure(batch, dtype, bandwidth["copy"])
            rows.append(row)
            cells = [row.get(f"{name}_us", 0) for name in ("unpacked", "packed", "triton", "cuda", "cuda_again")]
            widths = (9, 8, 8, 8, 8)
            line = " ".join(f"{cell:{width}.2f}" for cell, width in zip(cells, widths))
            print(f"{row['state']:>9} {batch:5} {line} {row['share_of_copy']:8.0%}", flush=True)
    write_result(args.json, "gdn_decode", bandwidth, heads=[HK, HV, K, V], rows=rows)


if __name__ == "__main__":
    main()
