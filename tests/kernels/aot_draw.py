"""Compile the sampler's kernels ahead of time, one JSON line each: ``python -m tests.kernels.aot_draw``. See `tests.kernels.aot`."""

import json
import sys

import torch

from tests.kernels.aot import compile_for, record  # before any kernel: it turns the interpreter off
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.draw import draw_triton
from vllm.v1.sample.state import SamplingState


def launch_all(params: dict, dtype: torch.dtype) -> None:
    state = SamplingState(1, 248320, "cpu")
    state.add(0, SamplingParams(**params), [], [], ())
    draw_triton(torch.zeros(1, 248320, dtype=dtype), state, torch.zeros(1, dtype=torch.int64), state.plan, search=True)


def main() -> None:
    params = ({"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 20, "top_p": 0.95})
    for recorded in record([(each, dtype) for each in params for dtype in (torch.bfloat16, torch.float32)], launch_all):
        for arch in (90, 120):
            print(json.dumps(compile_for(arch, recorded)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
