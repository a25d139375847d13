import pytest

from vllm import LLM


@pytest.fixture(scope="session")
def bundled_llm(tiny_model):
    """The bundled checkpoint in the device's own precision: float32 on a CPU, bfloat16 on a GPU."""
    return LLM(model=str(tiny_model), max_model_len=1024, max_num_seqs=128, use_tqdm_on_load=False)
