"""What a benchmark asks of the engine's pools, and what these then hold."""

import pytest

from vllm import LLM
from vllm.benchmarks.decode_run import check_concurrency, random_prompts, run_greedy

PAGE = 16


@pytest.mark.parametrize("tokens,most", [(64, 2), (63, 2), (48, 3), (17, 3)])
def test_the_largest_concurrency_runs_at_once(tiny_model, tokens, most):
    """A model of 64 tokens and three sequences has twelve pages: three full ones leave none for two to grow into."""
    llm = LLM(str(tiny_model), device="cpu", max_model_len=4 * PAGE, max_num_seqs=3, use_tqdm_on_load=False)
    engine = llm.llm_engine
    assert engine.core.info.num_blocks == 1 + 3 * 4
    check_concurrency(engine, [1, most], tokens)
    with pytest.raises(ValueError, match=f"allow {most};"):
        check_concurrency(engine, [most + 1], tokens)
    vocab_size = engine.config.model_config.hf_config.text.vocab_size
    run_greedy(engine, random_prompts(most, tokens - 4, vocab_size), 4)
    assert engine.metrics.num_preemptions == 0
