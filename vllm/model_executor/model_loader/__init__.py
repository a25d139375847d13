"""From a folder of safetensors files, or from nothing, to a model on its device."""

from vllm.model_executor.model_loader.loader import load_checkpoint, load_model

__all__ = ["load_checkpoint", "load_model"]
