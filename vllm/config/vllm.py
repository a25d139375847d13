"""All of an engine's configuration in one value, checked as a whole."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from vllm.config.cache import CacheConfig
from vllm.config.checkpoint import load_hf_config, resolve_model
from vllm.config.compilation import CompilationConfig, prompt_sizes
from vllm.config.gdn import GDNConfig
from vllm.config.hf_config import HFConfig
from vllm.config.model import LoadConfig, ModelConfig
from vllm.config.observability import ObservabilityConfig
from vllm.config.parallel import ParallelConfig
from vllm.config.quantization import QuantConfig, parse_quantization
from vllm.config.scheduler import SchedulerConfig


@dataclass(frozen=True)
class VllmConfig:
    """What the engine is built from: every "auto" resolved, every limit checked against the others.

    `create` is the one place where defaults that depend on the model or the device are decided; nothing changes later.
    """

    model_config: ModelConfig
    load_config: LoadConfig = field(default_factory=LoadConfig)
    cache_config: CacheConfig = field(default_factory=CacheConfig)
    scheduler_config: SchedulerConfig = field(default_factory=lambda: SchedulerConfig().resolve("cpu"))
    parallel_config: ParallelConfig = field(default_factory=lambda: ParallelConfig(device="cpu"))
    gdn_config: GDNConfig = field(default_factory=GDNConfig)
    compilation_config: CompilationConfig = field(default_factory=CompilationConfig)
    observability_config: ObservabilityConfig = field(default_factory=ObservabilityConfig)

    @classmethod
    def create(
        cls,
        model_config: ModelConfig | None = None,
        load_config: LoadConfig | None = None,
        cache_config: CacheConfig | None = None,
        scheduler_config: SchedulerConfig | None = None,
        parallel_config: ParallelConfig | None = None,
        gdn_config: GDNConfig | None = None,
        compilation_config: CompilationConfig | None = None,
        observability_config: ObservabilityConfig | None = None,
        *,
        device: str | None = None,
    ) -> VllmConfig:
        """Find the model, read its config.json unless `model_config.hf_config` is given, and resolve what is left open.

        `device` ("cuda" or "cpu") stands in for `parallel_config.device` without looking for one: a plan for a GPU that is elsewhere.

        Raises:
            ValueError, FileNotFoundError: one line that names the flag or the file, and what to do.
        """
        model, load = model_config or ModelConfig(), load_config or LoadConfig()
        cache, parallel = cache_config or CacheConfig(), parallel_config or ParallelConfig()
        if model.hf_config is None:
            weights = load.load_format != "dummy"
            folder = resolve_model(model.model, model.revision, load.download_dir, weights=weights)
            model = replace(model, model_path=str(folder), hf_config=load_hf_config(folder, model.hf_overrides))
        hf = model.hf_config
        device = device or parallel.resolve_device()
        dtype = model.dtype if model.dtype != "auto" else hf.text.torch_dtype if device == "cuda" else "float32"

        names = model.given_names or [model.model]
        model = replace(
            model,
            dtype=dtype,
            served_model_name=names[0],
            served_model_names=names,
            tokenizer=_tokenizer(model),
            quantization=_quantization(model, hf),
            max_model_len=model.max_model_len or hf.text.max_position_embeddings,
        )
        cache = replace(
            cache,
            kv_cache_dtype=_kv_cache_dtype(cache.kv_cache_dtype, model),
            mamba_cache_dtype=dtype if cache.mamba_cache_dtype == "auto" else cache.mamba_cache_dtype,
            mamba_ssm_cache_dtype=(
                hf.text.mamba_ssm_dtype if cache.mamba_ssm_cache_dtype == "auto" else cache.mamba_ssm_cache_dtype
            ),
        )
        return cls(
            model_config=model,
            load_config=load,
            cache_config=cache,
            scheduler_config=(scheduler_config or SchedulerConfig()).resolve(device),
            parallel_config=replace(parallel, device=device),
            gdn_config=gdn_config or GDNConfig(),
            compilation_config=compilation_config or CompilationConfig(),
            observability_config=observability_config or ObservabilityConfig(),
        )

    def __post_init__(self) -> None:
        model, cache, scheduler = self.model_config, self.cache_config, self.scheduler_config
        if model.hf_config is None or model.max_model_len is None or "auto" in self._resolved():
            raise ValueError("VllmConfig holds resolved values only: build it with VllmConfig.create(...)")
        positions = model.hf_config.text.max_position_embeddings
        if model.max_model_len > positions:
            raise ValueError(
                f"--max-model-len {model.max_model_len} is more than the model's max_position_embeddings {positions}; lower it"
            )
        if not scheduler.enable_chunked_prefill and scheduler.max_num_batched_tokens < model.max_model_len:
            raise ValueError(
                f"--no-enable-chunked-prefill needs --max-num-batched-tokens ({scheduler.max_num_batched_tokens}) of at "
                f"least --max-model-len ({model.max_model_len}): a prompt must fit one step"
            )
        if cache.kv_cache_dtype not in (model.dtype, "fp8_e4m3"):
            raise ValueError(
                f"--kv-cache-dtype {cache.kv_cache_dtype}: keys and values are kept in the model's precision ({model.dtype}) or in fp8"
            )

    def _resolved(self) -> tuple[str, ...]:
        model, cache = self.model_config, self.cache_config
        precisions = (model.dtype, cache.kv_cache_dtype, cache.mamba_cache_dtype, cache.mamba_ssm_cache_dtype)
        return (*precisions, self.parallel_config.device)

    @property
    def hf_config(self) -> HFConfig:
        return self.model_config.hf_config

    @property
    def longest_chunk(self) -> int:
        """Tokens of the longest prompt chunk that a step can hold."""
        return min(self.scheduler_config.max_num_batched_tokens, self.model_config.max_model_len)

    def prompt_sizes(self, most: int) -> tuple[int, ...]:
        """Numbers of tokens for which a step with chunks of at most so many prompts gets a CUDA graph, smallest first."""
        if self.parallel_config.device != "cuda" or not self.compilation_config.prompt_graphs:
            return ()
        if self.model_config.dtype == "float32":  # whose attention is PyTorch's, which asks for lengths
            return ()
        return prompt_sizes(min(self.scheduler_config.max_num_batched_tokens, most * self.model_config.max_model_len))

    @property
    def quant_scheme(self) -> QuantConfig | None:
        """How the checkpoint is quantised; None for plain weights."""
        return parse_quantization(self.hf_config.quantization)


def _tokenizer(model: ModelConfig) -> str:
    if model.tokenizer is None:
        return model.model_path or model.model
    if model.tokenizer.startswith("preset:"):
        return str(resolve_model(model.tokenizer))
    return str(Path(model.tokenizer).expanduser()) if model.tokenizer.startswith("~") else model.tokenizer


def _kv_cache_dtype(asked: str, model: ModelConfig) -> str:
    if asked == "auto":
        quant = parse_quantization(model.hf_config.quantization)
        return "fp8_e4m3" if quant is not None and quant.kv_cache_fp8 else model.dtype
    return "fp8_e4m3" if asked == "fp8" else asked


def _quantization(model: ModelConfig, hf: HFConfig) -> str | None:
    source = str(Path(model.model_path) / "config.json") if model.model_path else "config.json"
    scheme = parse_quantization(hf.quantization, source)
    found = scheme.method if scheme else None
    if model.quantization is not None and model.quantization != found:
        raise ValueError(f"--quantization {model.quantization}: {source} says {found or 'that the weights are plain'}")
    return found
