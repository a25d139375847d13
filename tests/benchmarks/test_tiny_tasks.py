"""The accuracy tasks: reproducible, split without leaks, and scored strictly."""

import random

import pytest

from vllm.benchmarks import tiny_tasks as tasks

FIRST_KEYS = {
    "add2": "37+59",
    "add3": "667+945",
    "copy": "copy xmacgva",
    "reverse": "reverse afibuwe",
    "count": "count 124",
    "tool": 'stop_photo {"days": 316}',
    "tool_loop": 'set_price {"zone": "vabebubu"} usob',
    "parallel": 'set_weather {"size": 58, "title": "pstvhy"} play_note {"color": "digomobu", "label": "zofofuc"}',
    "completion": "372+822",
    "other": "other Ava music izizumi udasases isun ehig cairo jefimefe.",
}


@pytest.mark.parametrize("kind", tasks.KINDS)
def test_generation_is_reproducible_and_distinct(kind):
    first, again = tasks.generate(kind, 40), tasks.generate(kind, 40)
    assert first == again
    questions = {(item.key, item.prompt or item.messages[0]["content"]) for item in first}
    assert len(questions) == 40
    assert first != tasks.generate(kind, 40, seed=1)


@pytest.mark.parametrize("kind", tasks.KINDS)
def test_splits_do_not_share_items(kind):
    assert all(tasks.is_held_out(item.key) for item in tasks.generate(kind, 40, "heldout"))
    assert not any(tasks.is_held_out(item.key) for item in tasks.generate(kind, 40, "train"))
    with pytest.raises(ValueError, match="split"):
        tasks.draw(kind, random.Random(0), "test")


def test_questions_are_the_published_ones():
    # Accuracies in benchmarks/results refer to these items: a change of the generators must be deliberate.
    firsts = {kind: tasks.generate(kind, 1)[0].key for kind in tasks.KINDS}
    assert firsts == FIRST_KEYS


def test_commuted_sums_share_a_split():
    keys = {tasks._addition("add2", a, b, "{a}+{b}=").key for a, b in ((17, 54), (54, 17))}
    assert len(keys) == 1


@pytest.mark.parametrize("kind", tasks.KINDS)
def test_expected_answer_scores_and_others_do_not(kind):
    for item in tasks.generate(kind, 20):
        assert item.score(item.expected)
        assert item.score(item.expected + "<|im_end|>\n")
        assert item.score(f"{item.thought}\n</think>\n\n{item.expected}<|im_end|>") or item.prompt is not None
        assert not item.score("")
        assert not item.score("no")


def test_calls_are_compared_by_value_type_and_order():
    item = next(
        i for i in tasks.stream("parallel") if any(isinstance(v, int) for v in i.calls[0]["arguments"].values())
    )
    calls = [dict(call) for call in item.calls]
    assert item.score_calls(calls)
    assert not item.score_calls(calls[::-1])
    assert not item.score_calls(calls[:1])
    as_text = [{**call, "arguments": {k: str(v) for k, v in call["arguments"].items()}} for call in calls]
    assert not item.score_calls(as_text)
    assert item.score("\n\n".join(tasks.format_call(call["name"], call["arguments"]) for call in calls))
    assert not item.score(item.expected.replace("</function>", ""))


def test_column_sums_are_right():
    assert tasks.column_sums(347, 586) == "7+6=13, 4+8+1=13, 3+5+1=9"
    assert tasks.column_sums(5, 5) == "5+5=10"
    assert tasks.column_sums(0, 0) == "0+0=0"


def test_gate_words_avoid_joined_pairs():
    for kind in ("copy", "reverse"):
        for item in tasks.generate(kind, 100):
            word = item.key.split()[1]
            assert not any(pair in word for pair in tasks.JOINED_PAIRS)
