"""How much memory the attention pages and the GDN slots may take, and in which precision."""

from __future__ import annotations

from dataclasses import dataclass

from vllm.config.knob import check_at_least, check_choices, knob


@dataclass(frozen=True)
class CacheConfig:
    """Two pools: pages of `block_size` tokens for attention, one slot a running sequence for GDN state.

    Inside a VllmConfig the three precisions are names of dtypes, never "auto"; eight-bit floats are "fp8_e4m3".
    """

    block_size: int = knob(16, "Tokens in one page of attention keys and values.", choices=(16, 32, 64, 128))
    gpu_memory_utilization: float = knob(0.9, "Share of the GPU's memory the engine may use, between 0 and 1.")
    kv_cache_memory_bytes: int | None = knob(
        None, "Bytes for pages and slots together (8G is 8 GiB); default: what --gpu-memory-utilization leaves."
    )
    kv_cache_dtype: str = knob(
        "auto",
        "Precision of attention keys and values; auto is fp8 where the checkpoint asks for it, else the model's.",
        choices=("auto", "fp8", "fp8_e4m3", "bfloat16", "float16", "float32"),
    )
    num_gpu_blocks_override: int | None = knob(None, "Number of pages, whatever the memory profile says.")
    mamba_cache_dtype: str = knob(
        "auto",
        "Precision of the convolution windows; auto is the model's.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    mamba_ssm_cache_dtype: str = knob(
        "auto", "Precision of the recurrent state; auto is the checkpoint's.", choices=("auto", "float32", "bfloat16")
    )

    def __post_init__(self) -> None:
        check_choices(self)
        check_at_least(self, kv_cache_memory_bytes=1, num_gpu_blocks_override=2)
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ValueError(
                f"--gpu-memory-utilization must be above 0 and at most 1; got {self.gpu_memory_utilization}"
            )
