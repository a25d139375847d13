"""The engine's configuration: one dataclass a concern, composed and checked by `VllmConfig`. Imports neither torch nor transformers."""

from vllm.config.cache import CacheConfig
from vllm.config.checkpoint import load_hf_config, preset_names, resolve_model
from vllm.config.compilation import CompilationConfig
from vllm.config.gdn import GDNConfig
from vllm.config.hf_config import HFConfig, TextConfig, parse_hf_config
from vllm.config.model import LoadConfig, ModelConfig
from vllm.config.observability import ObservabilityConfig
from vllm.config.parallel import ParallelConfig
from vllm.config.quantization import QuantConfig, parse_quantization
from vllm.config.scheduler import SchedulerConfig
from vllm.config.vllm import VllmConfig

__all__ = [
    "CacheConfig",
    "CompilationConfig",
    "GDNConfig",
    "HFConfig",
    "LoadConfig",
    "ModelConfig",
    "ObservabilityConfig",
    "ParallelConfig",
    "QuantConfig",
    "SchedulerConfig",
    "TextConfig",
    "VllmConfig",
    "load_hf_config",
    "parse_hf_config",
    "parse_quantization",
    "preset_names",
    "resolve_model",
]
