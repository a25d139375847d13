"""What a benchmark asks of the engine's pools, and what these then hold."""

import pytest

from vllm import LLM
from vllm.benchmarks.decode_run import check_concurrency, random_prompts, run_greedy

PAGE = 16


@pytest.mark.parametrize(
    "pages,tokens,most",
    [(None, 64, 3), (None, 61, 3), (8, 64, 2), (8, 61, 2), (8, 36, 2), (8, 32, 3), (8, 17, 3), (5, 32, 2)],
)
def test_the_largest_concurrency_runs_at_once(tiny_model, pages, tokens, most):
    """With whole pages in use to the last one, and where a sequence begins its last page while it decodes."""
    limits = {"max_model_len": 4 * PAGE, "max_num_seqs": 3, "num_gpu_blocks_override": pages and 1 + pages}
    llm = LLM(str(tiny_model), device="cpu", use_tqdm_on_load=False, **limits)
    engine = llm.llm_engine
    assert engine.core.info.num_blocks == 1 + (pages or 3 * 4)
    check_concurrency(engine, [1, most], tokens)
    with pytest.raises(ValueError, match=f"allow {most};"):
        check_concurrency(engine, [most + 1], tokens)
    vocab_size = engine.config.model_config.hf_config.text.vocab_size
    run_greedy(engine, random_prompts(most, tokens - 4, vocab_size), 4)
    assert engine.metrics.num_preemptions == 0
