"""How a layer's weights are stored, and how they multiply: one file a format.

A format is a subclass of `WeightScheme` in `FORMATS`. Nothing outside this package names one.
"""

from vllm.model_executor.layers.quantization.awq import Awq
from vllm.model_executor.layers.quantization.base import TensorInfo, WeightScheme
from vllm.model_executor.layers.quantization.compressed_tensors_wna16 import CompressedTensorsWNA16
from vllm.model_executor.layers.quantization.fp8 import Fp8
from vllm.model_executor.layers.quantization.nvfp4 import NvFp4
from vllm.model_executor.layers.quantization.unquantized import Unquantized

FORMATS: tuple[type[WeightScheme], ...] = (CompressedTensorsWNA16, Fp8, NvFp4, Awq, Unquantized)
"""Tried in this order; the first that recognises a module's tensors takes it."""

__all__ = [
    "FORMATS",
    "Awq",
    "CompressedTensorsWNA16",
    "Fp8",
    "NvFp4",
    "TensorInfo",
    "Unquantized",
    "WeightScheme",
]
