"""Which variant of each stage of the Gated DeltaNet layer runs."""

from __future__ import annotations

from dataclasses import dataclass

from vllm.config.knob import check_choices, knob


@dataclass(frozen=True)
class GDNConfig:
    """Names of the variants in `vllm.model_executor.layers.mamba.gdn_linear_attn`."""

    gdn_in_proj: str = knob(
        "auto", "Input projection: one GEMM (fused) or two (serial).", choices=("auto", "serial", "fused")
    )

    def __post_init__(self) -> None:
        check_choices(self)
