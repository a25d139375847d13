"""Launch the kernels of attention and of the draw on the GPU, small, for NVIDIA's checkers, in the way of `tests.kernels.sanitize`:

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 python -m tests.kernels.sanitize_attention
compute-sanitizer --tool racecheck --error-exitcode 1 python -m tests.kernels.sanitize_attention
"""

import torch

from tests.kernels.attention_case import AttentionCase
from tests.kernels.test_draw import PARAMS, make
from vllm.model_executor.layers.ops.attention_decode import attention_decode_triton
from vllm.model_executor.layers.ops.attention_prefill import attention_prefill_triton
from vllm.v1.sample.draw import draw_triton

WORK = [(300, 1), None, (16, 1), (0, 70), (33, 18), (0, 1)]
HEADS = ((16, 2, 256, 64), (6, 2, 128, 32), (3, 1, 80, 20))


def attention() -> None:
    for heads in HEADS:
        for kv_dtype in (torch.bfloat16, torch.float8_e4m3fn):
            case = AttentionCase(WORK, *heads, torch.bfloat16, kv_dtype, pad_tokens=2, device="cuda")
            pages, out, d = case.poisoned_pages(), case.out(), case.meta.num_decodes
            lengths = case.meta.seq_lens[:d]
            attention_decode_triton(case.rows.part(0, d), pages, case.meta.block_table, lengths, case.scale, out[:d])
            attention_prefill_triton(case.rows, pages, case.meta, case.scale, out)
            torch.cuda.synchronize()
            assert out[: sum(case.meta.query_lens_cpu)].isfinite().all()


def draw() -> None:
    state, rows = make(list(PARAMS.values()), 9001, "cuda")
    for dtype in (torch.bfloat16, torch.float32):
        draw_triton(torch.randn(len(PARAMS), 9001, device="cuda").to(dtype), state, rows, state.plan, search=True)
    torch.cuda.synchronize()


def main() -> None:
    torch.manual_seed(0)
    attention()
    draw()
    print("all kernels launched")


if __name__ == "__main__":
    main()
