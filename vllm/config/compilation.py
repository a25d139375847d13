"""Whether steps run kernel by kernel or as CUDA graphs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.config.knob import check_choices, knob

_MODES = ("NONE", "FULL_DECODE_ONLY", "FULL")
_SAME = {"FULL_AND_PIECEWISE": "FULL"}
_KEYS = ("mode", "cudagraph_mode", "cudagraph_capture_sizes", "max_cudagraph_capture_size")

PROMPT_SIZES = (16, 32, 64, 128, 192, 256, 384, 512, 1024, 1536, 2048)
"""Tokens that a prompt's chunk is padded to, for a CUDA graph: without one the host takes as long to launch a step whatever its size, and longer
than the GPU takes for a short one. Few tokens more cost little where weights are what a step reads; each size makes the start longer."""


@dataclass(frozen=True)
class CompilationConfig:
    """CUDA graphs of decode steps and of steps with one chunk of a prompt. Other steps are computed kernel by kernel in any case.

    Raises ValueError, in one line, for a key or value that is not known.
    """

    enforce_eager: bool = knob(False, "Run every step kernel by kernel, without CUDA graphs.")
    optimization_level: int = knob(
        2,
        "0 is --enforce-eager: the quickest start and slow decoding; 1 to 3 are the same here.",
        short="-O",
        choices=(0, 1, 2, 3),
    )
    compilation_config: dict[str, Any] = knob(  # noqa: RUF009
        {},
        'JSON: "cudagraph_mode" NONE, FULL_DECODE_ONLY or FULL (default on a GPU), which has graphs of prompts too; '
        '"cudagraph_capture_sizes", a list of batch sizes; "max_cudagraph_capture_size"; "mode" 0 (torch.compile is not used).',
        short="-cc",
    )

    def __post_init__(self) -> None:
        check_choices(self)
        given = self.compilation_config
        if unknown := sorted(set(given) - set(_KEYS)):
            raise ValueError(f"--compilation-config.{unknown[0]}: not known; the keys are {', '.join(_KEYS)}")
        if given.get("mode", 0) not in (0, "NONE", "none", None):
            raise ValueError(
                f"--compilation-config.mode {given['mode']}: the kernels are written by hand and torch.compile is not used; use 0"
            )
        mode = given.get("cudagraph_mode")
        if mode is not None and str(mode).upper() not in (*_MODES, *_SAME):
            raise ValueError(f"--compilation-config.cudagraph_mode must be one of {', '.join(_MODES)}; got {mode!r}")
        sizes, largest = given.get("cudagraph_capture_sizes"), given.get("max_cudagraph_capture_size")
        if sizes is not None and not (isinstance(sizes, list) and sizes and all(map(_is_size, sizes))):
            raise ValueError(
                f"--compilation-config.cudagraph_capture_sizes must be a list of whole numbers of at least 1; got {sizes!r}"
            )
        if largest is not None and not _is_size(largest):
            raise ValueError(
                f"--compilation-config.max_cudagraph_capture_size must be a whole number of at least 1; got {largest!r}"
            )

    @property
    def cudagraph_mode(self) -> str:
        """Which steps run as CUDA graphs where there is a GPU: one of _MODES."""
        if self.enforce_eager or self.optimization_level == 0:
            return "NONE"
        mode = str(self.compilation_config.get("cudagraph_mode") or "FULL").upper()
        return _SAME.get(mode, mode)

    @property
    def decode_graphs(self) -> bool:
        return self.cudagraph_mode != "NONE"

    @property
    def prompt_graphs(self) -> bool:
        return self.cudagraph_mode == "FULL"

    @property
    def capture_sizes(self) -> tuple[int, ...] | None:
        """The batch sizes asked for; None where the choice is ours."""
        sizes = self.compilation_config.get("cudagraph_capture_sizes")
        return None if sizes is None else tuple(sizes)

    @property
    def max_capture_size(self) -> int | None:
        return self.compilation_config.get("max_cudagraph_capture_size")


def prompt_sizes(longest: int) -> tuple[int, ...]:
    """Numbers of tokens that chunks of prompts are padded to for a graph, smallest first.

    Args:
        longest: the most that a step can hold.
    """
    return tuple(sorted({min(size, longest) for size in PROMPT_SIZES}))


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
