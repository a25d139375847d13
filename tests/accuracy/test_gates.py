"""The accuracy gate: the bundled checkpoint, through the whole engine, still knows what it was taught.

Whatever changes a kernel, a variant or a format must keep these. The thresholds are the checkpoint's acceptance limits; it was
trained well past them (benchmarks/results/train_tiny.json).
"""

import pytest

from tests.accuracy.scoring import accuracy

GATES = {
    "add2": 0.95,
    "add3": 0.80,
    "copy": 0.90,
    "reverse": 0.90,
    "count": 0.90,
    "tool": 0.90,
    "tool_loop": 0.90,
    "parallel": 0.90,
}
SAMPLES = {"add2": 500, "add3": 500, "tool": 100, "tool_loop": 100, "parallel": 50}


@pytest.mark.parametrize("kind", GATES)
def test_greedy_answers_are_exact(bundled_llm, kind):
    reached = accuracy(bundled_llm, kind, SAMPLES.get(kind, 200))
    assert reached >= GATES[kind], f"{kind}: {reached:.1%} of held-out items right"


def test_a_plain_text_prompt_continues_with_the_sum(bundled_llm):
    assert accuracy(bundled_llm, "completion", 200) >= 0.80


def test_the_gate_can_fail(bundled_llm):
    """Answers to other questions score nothing, so a model that knew nothing would not pass."""
    from vllm.benchmarks.tiny_tasks import generate

    items = generate("add3", 50)
    assert sum(a.score(b.expected) for a, b in zip(items, items[1:])) <= 1
