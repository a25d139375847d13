"""Before the first request: every kernel is compiled, and nothing is left of the prompts that nobody sent."""

import random

import pytest
import torch
import triton

from vllm import LLM, SamplingParams
from vllm.v1.worker.warm_up import compile_kernels, run_largest_steps


def make(tiny_model, **options) -> LLM:
    return LLM(str(tiny_model), max_model_len=256, max_num_seqs=8, use_tqdm_on_load=False, **options)


@pytest.mark.parametrize("limits", [{}, {"max_num_batched_tokens": 8}, {"max_num_seqs": 1, "max_model_len": 9}])
def test_warming_up_changes_no_answer(tiny_model, limits):
    prompts = [[7, 8, 9, i] for i in range(4)]
    params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    llm = LLM(str(tiny_model), use_tqdm_on_load=False, **({"max_model_len": 256, "max_num_seqs": 8} | limits))
    expected = [o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)]
    core = llm.llm_engine.core
    core.step()
    run_largest_steps(core.worker.runner)
    compile_kernels(core.worker.runner)
    assert not core.worker.runner.batch.sequences
    assert [o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)] == expected


@pytest.mark.parametrize(
    "limits,largest",
    [
        ({"max_num_batched_tokens": 100}, [100]),
        ({"max_num_batched_tokens": 600}, [256, 256, 88]),
        ({}, [256] * 8),
    ],
    ids=["a chunk", "a full step", "all sequences"],
)
def test_the_largest_step_has_all_tokens_that_a_step_may_have(tiny_model, monkeypatch, limits, largest):
    """However short the model's sequences are: several prompts share a step."""
    runner, steps = make(tiny_model, **limits).llm_engine.core.worker.runner, []
    monkeypatch.setattr(runner, "execute", lambda s: steps.append(list(s.num_scheduled_tokens.values())))
    run_largest_steps(runner)
    assert [step for step in steps if step] == [largest, [1] * 8]


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["FULL_DECODE_ONLY", "FULL"])
def test_no_kernel_is_compiled_after_the_start(tiny_model, monkeypatch, mode):
    llm = make(tiny_model, compilation_config={"cudagraph_mode": mode})
    compiled = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **seen: compiled.append(seen["fn"].name))
    rng = random.Random(0)
    lengths = (1, 2, 3, 7, 16, 31, 32, 33, 64, 100, 128, 200)
    prompts = [[rng.randrange(5, 800) for _ in range(n)] for n in lengths]
    params = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)
    for prompt in prompts:
        llm.generate([prompt], params, use_tqdm=False)
    llm.generate(prompts, params, use_tqdm=False)
    assert not compiled
    assert torch.cuda.is_available()


@pytest.mark.gpu
def test_memory_is_extended_and_not_added_to(tiny_model, monkeypatch):
    """From an engine's start on, unless the user has set PyTorch's allocator up: what steps of different sizes leave free lies together."""
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    make(tiny_model)
    torch.cuda.empty_cache()
    x = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")  # more than anything that was there before has left
    (ours,) = [s for s in torch.cuda.memory_snapshot() if 0 <= x.data_ptr() - s["address"] < s["total_size"]]
    assert ours["is_expandable"]
