"""The networks, one file a family, each readable top to bottom."""

from vllm.model_executor.models.interfaces import StatefulLayers
from vllm.model_executor.models.registry import ARCHITECTURES, model_class

__all__ = ["ARCHITECTURES", "StatefulLayers", "model_class"]
