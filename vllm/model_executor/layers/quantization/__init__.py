"""How a layer's weights are stored, and how they multiply: one file a format.

A format is a subclass of `WeightScheme` in `FORMATS`. Nothing outside this package names one.
"""

from vllm.model_executor.layers.quantization.base import TensorInfo, WeightScheme
from vllm.model_executor.layers.quantization.compressed_tensors_wna16 import CompressedTensorsWNA16
from vllm.model_executor.layers.quantization.unquantized import Unquantized

FORMATS: tuple[type[WeightScheme], ...] = (CompressedTensorsWNA16, Unquantized)
"""Tried in this order; the first that recognises a module's tensors takes it."""

__all__ = ["FORMATS", "CompressedTensorsWNA16", "TensorInfo", "Unquantized", "WeightScheme"]
