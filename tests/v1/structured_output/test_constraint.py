"""Masks, the place where a constraint begins, white space, cost."""

import time

import numpy as np
import pytest

from tests.v1.structured_output.vocabularies import STOP, VOCABULARY, grammars, large_vocabulary
from vllm.sampling_params import StructuredOutputsParams as Params
from vllm.v1.structured_output import constraint as constraint_module
from vllm.v1.structured_output import manager as manager_module
from vllm.v1.structured_output.manager import GrammarCache
from vllm.v1.structured_output.masks import num_words, pack_tokens, unpack_tokens
from vllm.v1.structured_output.spec import Vocabulary

SIZE = len(VOCABULARY)
IDS = {token: i for i, token in reversed(list(enumerate(VOCABULARY.tokens))) if token}


@pytest.fixture(scope="module")
def cache():
    return grammars()


def allowed(constraint) -> set[int]:
    words = np.full((2, num_words(SIZE)), 0x55555555, np.int32)
    constraint.fill(words, 1)
    assert (words[0] == 0x55555555).all()
    return set(unpack_tokens(words[1], SIZE).tolist())


def write(constraint, text: str) -> None:
    for byte in text.encode():
        assert constraint.accept(byte)


def test_packing_and_unpacking():
    for size in (1, 31, 32, 33, SIZE):
        chosen = list(range(0, size, 3))
        assert unpack_tokens(pack_tokens(chosen, size, allowed=True), size).tolist() == chosen
        others = [i for i in range(size) if i % 3]
        assert unpack_tokens(pack_tokens(chosen, size, allowed=False), size).tolist() == others
        assert pack_tokens([], size, allowed=True).shape == (num_words(size),)


def test_a_complete_text_can_only_end(cache):
    constraint = cache.constraint(Params(choice=["ab"]))
    assert allowed(constraint) == {ord("a")}
    write(constraint, "ab")
    assert allowed(constraint) == {STOP} and not constraint.is_done
    assert constraint.accept(STOP) and constraint.is_done


def test_a_token_that_does_not_fit_is_not_accepted(cache):
    assert not cache.constraint(Params(choice=["ab"])).accept(ord("b"))


def test_thinking_is_free_until_it_ends(cache):
    constraint = cache.constraint(Params(choice=["ab"], begin_after="</think>"))
    everything = {i for i in range(SIZE) if i != STOP}
    for text in ("so ab? ", "</thin", "k", "</thi<"):
        assert allowed(constraint) == everything
        write(constraint, text)
    write(constraint, "/thin>")
    assert not constraint.has_begun
    assert constraint.accept(IDS[b"</think>"]) and constraint.has_begun
    assert allowed(constraint) == {ord("a"), ord("\n"), IDS[b"\n\n"]}
    assert constraint.accept(IDS[b"\n\n"])
    assert allowed(constraint) == {ord("a")}


@pytest.mark.parametrize("rest", ["", "\n", "\n\n", "\n\na"])
def test_a_token_may_hold_more_than_the_end_of_thinking(cache, rest):
    constraint = cache.constraint(Params(choice=["ab"], begin_after="nk"))
    token = len(VOCABULARY.tokens) - 1
    constraint._sets = constraint_module.TokenSets(
        [*VOCABULARY.tokens[:-1], b"k" + rest.encode()], *(getattr(constraint._sets, n) for n in ("open_mask", "json_mask", "solid_mask"))
    )  # fmt: skip
    write(constraint, "thin")
    assert constraint.accept(token) and constraint.has_begun
    assert allowed(constraint) & {ord("a"), ord("b")} == ({ord("b")} if "a" in rest else {ord("a")})


def test_a_call_inside_the_thinking_begins_the_constraint(cache):
    params = Params(regex="<tool_call>\n[0-9]+", begin_after="</think>", begin_at="<tool_call>")
    constraint = cache.constraint(params)
    write(constraint, "hm <tool_ <tool_call")
    assert not constraint.has_begun
    write(constraint, ">")
    assert constraint.has_begun and allowed(constraint) == {ord("\n")}
    other = cache.constraint(params)
    write(other, "hm </think>")
    assert other.has_begun and ord("<") in allowed(other)
    late = cache.constraint(Params(regex="<t>1", begin_after="</think>", begin_at="<t>"))
    late._sets = constraint_module.TokenSets(
        [b"x <t>2 <t>", *late._sets.tokens[1:]], late._sets.open_mask, late._sets.json_mask, late._sets.solid_mask
    )
    late.accept(0)  # the first does not fit, so it is part of the thinking
    assert not late.has_begun
    write(late, "</think><t>1")
    assert allowed(late) == {STOP}


def test_white_space_of_json_comes_to_an_end(cache):
    constraint = cache.constraint(Params(json={"type": "array", "items": {"type": "integer"}}))
    write(constraint, "[\n")
    blanks = {ord(" "), ord("\n"), IDS[b"  "], IDS[b"\n\n"]}
    assert allowed(constraint) >= blanks
    write(constraint, "\n")
    assert not allowed(constraint) & blanks and allowed(constraint) & {ord("1"), ord("]")}
    write(constraint, "1,")
    assert allowed(constraint) >= blanks
    write(constraint, " " * constraint_module.MOST_BLANKS)
    assert not allowed(constraint) & blanks
    assert ord("\t") not in allowed(cache.constraint(Params(json={"type": "string", "minLength": 2})))


def test_a_grammar_that_costs_too_much_ends(cache, monkeypatch):
    monkeypatch.setattr(constraint_module, "SECONDS_ALLOWED", 0.05)
    monkeypatch.setattr(constraint_module, "SECONDS_A_TOKEN", 0.0)
    constraint = cache.constraint(Params(grammar='root ::= root root root | root root | "a" | ""'))
    start = time.monotonic()
    for _ in range(2000):
        allowed(constraint)
        if not constraint.accept(ord("a")):
            break
    else:
        pytest.fail("it never ended")
    assert time.monotonic() - start < 20


def test_grammars_are_compiled_once_and_the_oldest_forgotten(cache, monkeypatch):
    monkeypatch.setattr(manager_module, "MOST_GRAMMARS", 3)
    fresh = grammars()
    for name in ("a", "b", "a", "c", "d", "a"):
        fresh.constraint(Params(choice=[name]))
    assert [spec.text for spec in fresh._entries] == ['["c"]', '["d"]', '["a"]']
    with pytest.raises(ValueError, match="cannot be compiled"):
        fresh.constraint(Params(regex="("))
    assert len(fresh) == 3


def test_masks_of_64_rows_cost_a_few_milliseconds(cache):
    """Realistic in that most tokens are words; the size of the vocabulary is that of the published models."""
    tokens = large_vocabulary(248_320).tokens
    large = GrammarCache(lambda: Vocabulary(tokens, [STOP]))
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "tags": {"type": "array", "items": {"type": "string"}}},
        "required": ["name", "age", "tags"],
    }  # fmt: skip
    constraints = [large.constraint(Params(json=schema)) for _ in range(64)]
    rows = np.empty((64, num_words(len(tokens))), np.int32)
    costs = []
    for byte in b'{"name": "Ann Bee", "age": 42, "tags": ["a", "b c"]}':
        start = time.thread_time()
        for row, constraint in enumerate(constraints):
            constraint.fill(rows, row)
        costs.append(time.thread_time() - start)
        assert sum(constraint.accept(byte) for constraint in constraints) == 64
    assert sorted(costs)[len(costs) // 2] < 0.005, costs
    assert sum(costs) / len(costs) < 0.01, costs
