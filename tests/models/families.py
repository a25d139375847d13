"""A checkpoint together with the transformers model that it was written from."""

from dataclasses import dataclass
from pathlib import Path

import torch

from vllm.config.checkpoint import load_hf_config
from vllm.config.gdn import GDNConfig
from vllm.config.model import LoadConfig
from vllm.model_executor.model_loader import load_checkpoint


@dataclass(frozen=True)
class Family:
    """transformers' model, and ours on demand, of one checkpoint."""

    name: str
    folder: Path
    reference: torch.nn.Module

    def load(self, dtype=torch.float32, device="cpu", **gdn):
        return load(self.folder, dtype, device, **gdn)

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """[len(tokens), vocab] float32."""
        with torch.inference_mode():
            return self.reference(input_ids=torch.tensor([tokens])).logits[0].float()


def load(folder: Path, dtype=torch.float32, device="cpu", load_format="auto", **gdn):
    return load_checkpoint(
        folder,
        load_hf_config(folder),
        dtype=dtype,
        device=device,
        load_config=LoadConfig(load_format=load_format, use_tqdm_on_load=False),
        gdn_config=GDNConfig(**gdn),
    )
