"""Which variant of each stage of the Gated DeltaNet layer runs."""

from __future__ import annotations

from dataclasses import dataclass

from vllm.config.knob import check_at_least, check_choices, knob


@dataclass(frozen=True)
class GDNConfig:
    """Names of the variants in `vllm.model_executor.layers.mamba.gdn_variants`.

    Attributes:
        separate_in_proj: keep the input projection's modules as checkpoints name them (in_proj_qkv, in_proj_z, in_proj_ba), so that
            adapters can attach to each. Not a flag: what loads adapters sets it.
    """

    gdn_in_proj: str = knob(
        "auto",
        "Input projection: one GEMM (fused), two (serial), or two on two CUDA streams (dual_stream).",
        choices=("auto", "serial", "dual_stream", "fused"),
    )
    gdn_dual_stream_min_tokens: int = knob(1, "Steps of fewer tokens run dual_stream's two GEMMs one after the other.")
    gdn_dual_stream_max_tokens: int = knob(256, "Steps of more tokens run dual_stream's two GEMMs one after the other.")
    gdn_decode: str = knob(
        "auto",
        "Decoding rows: one kernel a stage (unpacked), convolution then one kernel (packed), or a single launch (fused).",
        choices=("auto", "unpacked", "packed", "fused"),
    )
    gdn_prefill_backend: str = knob(
        "auto", "What computes prompt chunks; auto is triton on a GPU.", choices=("auto", "triton", "torch")
    )
    separate_in_proj: bool = False

    def __post_init__(self) -> None:
        check_choices(self)
        check_at_least(self, gdn_dual_stream_min_tokens=0)
        check_at_least(self, gdn_dual_stream_max_tokens=self.gdn_dual_stream_min_tokens)
