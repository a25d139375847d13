import random

import pytest

from vllm.benchmarks.roofline import distinct_experts, reached, step_bytes
from vllm.engine.arg_utils import EngineArgs


def config(name):
    return EngineArgs(f"preset:{name}").create_engine_config(device="cuda")


def test_distinct_experts_are_what_drawing_gives():
    draw = random.Random(0)
    for tokens in (1, 4, 64):
        met = [len({e for _ in range(tokens) for e in draw.sample(range(256), 8)}) for _ in range(200)]
        assert distinct_experts(256, 8, tokens) == pytest.approx(sum(met) / 200, rel=0.02)
    assert distinct_experts(256, 8, 1) == pytest.approx(8) and distinct_experts(0, 0, 5) == 0


@pytest.mark.parametrize(("sequences", "tok_s"), [(1, 985), (2, 1717), (4, 2752), (8, 4026), (16, 5495), (64, 10420)])
def test_tokens_a_second_of_the_35b_model_at_4_5_terabytes(sequences, tok_s):
    """Worked out by hand from the shapes, with GDN state and without keys and values."""
    moved = step_bytes(config("qwen3.5-35b-a3b-awq-4bit"), sequences, 0)
    assert 4.5e12 / sum(moved.values()) * sequences == pytest.approx(tok_s, rel=0.01)


def test_components_of_the_35b_model():
    moved = step_bytes(config("qwen3.5-35b-a3b-awq-4bit"), 4, 1000)
    # 10 attention layers, keys and values, 2 heads of 256 in bfloat16
    assert moved["KV cache"] == 4 * 1001 * 10 * 2 * 2 * 256 * 2
    assert moved["lm_head"] == 248320 * 2048 * 2
    assert moved["GDN projections"] == pytest.approx(2.02e9, rel=0.01)
    # three matrices of 2048 x 512, 4.5 bits a weight
    one = 3 * 2048 * 512 * 4.5 / 8
    assert moved["routed experts"] == pytest.approx(40 * distinct_experts(256, 8, 4) * one, rel=0.01)
    assert moved["embeddings"] == 4 * 2048 * 2 and "dense MLP" not in moved


def test_a_tied_head_is_the_table():
    tied = config("qwen3.5-0.8b")
    assert tied.hf_config.text.tie_word_embeddings
    text = tied.hf_config.text
    assert step_bytes(tied, 1, 0)["lm_head"] == text.vocab_size * text.hidden_size * 2


def test_share():
    found = reached({"a": 3_000_000, "b": 1_000_000}, step_ms=2.0, read_bytes_s=4e9)
    assert found["floor_ms"] == 1.0 and found["share"] == 0.5 and found["bytes_s"] == 2e9
