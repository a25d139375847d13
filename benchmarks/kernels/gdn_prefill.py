"""The core of one GDN layer over a prompt, 35B shape: convolution, gating, chunked delta rule and gated norm, stage by stage.

    python -m benchmarks.kernels.gdn_prefill [--json result.json] [--lengths 4096,32768]

Where the package flash-linear-attention is installed, its Triton kernels are timed beside ours on the same inputs, in the same run.
Inside CUDA graphs, so that launches cost neither side anything.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.kernels.timing import bandwidths, interleaved_us, write_result
from vllm.model_executor.layers.fla.ops import chunk_gated_delta_rule, fused_gdn_gating, rmsnorm_gated
from vllm.model_executor.layers.fla.ops.index import prepare_chunk_indices, prepare_chunk_offsets
from vllm.model_executor.layers.mamba.ops.causal_conv1d import causal_conv1d_fn

try:
    import fla
    from fla.modules.causal_conv1d import causal_conv1d as fla_conv
    from fla.modules.norm.fused_norm_gate import rms_norm_gated as fla_norm
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule as fla_chunk
except ImportError:
    fla = None

HK, HV, K, V, TAPS = 16, 32, 128, 128, 4
DIM = 2 * HK * K + HV * V
LENGTHS = "4096,32768,1024,16384,16x2048"


class Prompt:
    """Inputs of one call, and every stage on them."""

    def __init__(self, lengths: list[int]) -> None:
        T, N = sum(lengths), len(lengths)
        projected = torch.randn(T, DIM + HV * V + 2 * HV, device="cuda").bfloat16()
        self.mixed, z, self.b, self.a = projected.split([DIM, HV * V, HV, HV], dim=1)
        self.z = z.unflatten(1, (HV, V))
        self.weight = (torch.randn(TAPS, DIM, device="cuda") * 0.5).bfloat16().T
        self.A_log, self.dt_bias = torch.rand(HV, device="cuda"), torch.randn(HV, device="cuda") - 3
        self.norm_weight = torch.rand(V, device="cuda") + 0.5
        self.starts = [sum(lengths[:n]) for n in range(N + 1)]
        self.cu = torch.tensor(self.starts, dtype=torch.int32, device="cuda")
        self.windows = torch.zeros(N, TAPS - 1, DIM, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        self.pool = torch.zeros(N, HV, V, K, device="cuda")
        self.slots = torch.arange(N, dtype=torch.int32, device="cuda")
        self.fresh = torch.zeros(N, dtype=torch.bool, device="cuda")
        self.indices = prepare_chunk_indices(self.starts, device="cuda")
        self.offsets = prepare_chunk_offsets(self.starts, device="cuda")
        self.long_cu = self.cu.long()
        self.varlen = N > 1

    def conv(self) -> torch.Tensor:
        return causal_conv1d_fn(
            self.mixed.T, self.weight, None, self.windows, self.cu, self.slots, self.fresh, "silu"
        ).T

    def gating(self) -> tuple[torch.Tensor, torch.Tensor]:
        return fused_gdn_gating(self.A_log, self.a, self.b, self.dt_bias)

    def heads(self, convolved: torch.Tensor) -> list[torch.Tensor]:
        parts = convolved.split([HK * K, HK * K, HV * V], dim=-1)
        return [part.view(1, -1, part.shape[-1] // 128, 128) for part in parts]

    def chunk(self, convolved: torch.Tensor, g: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
        return chunk_gated_delta_rule(
            *self.heads(convolved),
            g,
            beta,
            initial_state=self.pool,
            cu_seqlens=self.cu,
            cu_seqlens_cpu=self.starts,
            chunk_indices=self.indices,
            chunk_offsets=self.offsets,
            ssm_state_indices=self.slots,
            has_initial_state=self.fresh,
            use_qk_l2norm_in_kernel=True,
        )[0]

    def norm(self, o: torch.Tensor) -> torch.Tensor:
        return rmsnorm_gated(o[0], self.norm_weight, self.z)

    def ours(self) -> torch.Tensor:
        return self.norm(self.chunk(self.conv(), *self.gating()))

    def stages(self) -> dict[str, Callable[[], object]]:
        convolved, gates = self.conv(), self.gating()
        o = self.chunk(convolved, *gates)
        return {
            "conv": self.conv,
            "gating": self.gating,
            "chunk": lambda: self.chunk(convolved, *gates),
            "norm": lambda: self.norm(o),
        }

    def fla_conv(self) -> torch.Tensor:
        return fla_conv(
            self.mixed[None],
            self.weight.contiguous(),
            activation="silu",
            backend="triton",
            cu_seqlens=self.long_cu if self.varlen else None,
            output_final_state=True,
        )[0]

    def fla_heads(self, convolved: torch.Tensor) -> list[torch.Tensor]:
        """Its kernels take contiguous tensors."""
        return [part.contiguous() for part in self.heads(convolved)]

    def fla_chunk(self, heads: list[torch.Tensor]) -> torch.Tensor:
        return fla_chunk(
            *heads,
            g=self.a[None].contiguous(),
            beta=self.b[None].contiguous(),
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True,
            use_beta_sigmoid_in_kernel=True,
            A_log=self.A_log,
            dt_bias=self.dt_bias,
            cu_seqlens=self.long_cu if self.varlen else None,
        )[0]

    def fla_norm(self, o: torch.Tensor) -> torch.Tensor:
        return fla_norm(o.view(-1, V), self.z.reshape(-1, V), self.norm_weight, None)

    def fla_all(self) -> torch.Tensor:
        return self.fla_norm(self.fla_chunk(self.fla_heads(self.fla_conv())))

    def fla_stages(self) -> dict[str, Callable[[], object]]:
        heads = self.fla_heads(self.fla_conv())
        o = self.fla_chunk(heads)
        return {
            "fla_conv": self.fla_conv,
            "fla_chunk": lambda: self.fla_chunk(heads),
            "fla_norm": lambda: self.fla_norm(o),
        }


def measure(lengths: list[int], bandwidth: float) -> dict:
    with torch.inference_mode():
        prompt = Prompt(lengths)
        chains = {"ours": [prompt.ours], "ours_again": [prompt.ours]}
        if fla is not None:
            want, got = prompt.fla_all().flatten().float(), prompt.ours().flatten().float()
            error = ((got - want).norm() / want.norm()).item()
            if not error < 2e-2:
                raise RuntimeError(f"ours and flash-linear-attention differ by {error:.2g}")
            chains["fla"] = [prompt.fla_all]
            chains |= {name: [stage] for name, stage in prompt.fla_stages().items()}
        chains |= {name: [stage] for name, stage in prompt.stages().items()}
        times = interleaved_us(chains, rounds=10)
    tokens = sum(lengths)
    # in: q k v z b a; out: o; each once in bfloat16
    moved = tokens * 2 * (DIM + 2 * HV * V + 2 * HV)
    return {
        "lengths": f"{len(lengths)} x {lengths[0]}",
        "tokens": tokens,
        "least_bytes": moved,
        **{f"{name}_us": time for name, time in times.items()},
        "share_of_copy": moved / times["ours"] * 1e6 / bandwidth,
    }


def prompts(text: str) -> list[int]:
    """Lengths of "4096", one prompt, or of "16x2048"."""
    count, _, length = text.rpartition("x")
    return [int(length)] * int(count or 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--lengths", default=LENGTHS, help="prompts of each call, default %(default)s")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("needs a CUDA device")
    torch.manual_seed(0)
    bandwidth = bandwidths()
    print(f"{torch.cuda.get_device_name()}: copy {bandwidth['copy'] * 1e-12:.2f} TB/s. us a call:")
    names = ("ours", "ours_again", "fla", "conv", "gating", "chunk", "norm", "fla_conv", "fla_chunk", "fla_norm")
    print(f"{'prompts':>10} " + " ".join(f"{name:>10}" for name in names))
    rows = []
    for lengths in map(prompts, args.lengths.split(",")):
        row = measure(lengths, bandwidth["copy"])
        rows.append(row)
        cells = " ".join(f"{row.get(f'{name}_us', 0):10.1f}" for name in names)
        print(f"{row['lengths']:>10} {cells}", flush=True)
    version = fla.__version__ if fla is not None else None
    write_result(args.json, "gdn_prefill", bandwidth, heads=[HK, HV, K, V], flash_linear_attention=version, rows=rows)


if __name__ == "__main__":
    main()
