"""How the model is spread over devices, and which device that is."""

from __future__ import annotations

from dataclasses import dataclass

from vllm.config.knob import check_choices, knob


@dataclass(frozen=True)
class ParallelConfig:
    """A world of one for now; shapes and loaders already take a rank and a size.

    Inside a VllmConfig `device` is "cuda" or "cpu", never "auto".
    """

    tensor_parallel_size: int = knob(1, "GPUs that share each layer; only 1 for now.", short="-tp")
    device: str = knob(
        "auto", "auto is the NVIDIA GPU where there is one, else the CPU.", choices=("auto", "cuda", "cpu")
    )

    def __post_init__(self) -> None:
        check_choices(self)
        if self.tensor_parallel_size != 1:
            raise ValueError(
                f"--tensor-parallel-size {self.tensor_parallel_size}: this version runs on one device; use 1"
            )

    def resolve_device(self) -> str:
        """ "cuda" or "cpu". Only "auto" and "cuda" import torch, which takes seconds.

        Raises:
            ValueError: cuda was asked for and torch finds no GPU.
        """
        if self.device == "cpu":
            return "cpu"
        import torch

        if torch.cuda.is_available():
            return "cuda"
        if self.device == "cuda":
            raise ValueError(
                "--device cuda: torch finds no CUDA GPU here; --device cpu runs the (slow) reference kernels"
            )
        return "cpu"
