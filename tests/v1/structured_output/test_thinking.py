"""Thinking that has a limit: where one text stands, and whole answers of the bundled checkpoint."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.structured_output.masks import num_words, unpack_tokens
from vllm.v1.structured_output.thinking import ThinkingBudget, opens_thinking

START, END, CALL, WORD, VOCAB = 3, 4, 5, 6, 70
IDS = [START, END, CALL]


class Grammar:
    """Allows one token, once it has begun; notes what it is told."""

    is_done = False

    def __init__(self, has_begun):
        self.has_begun, self.seen = has_begun, []

    def fill(self, words, row):
        words[row] = 0
        words[row, 0] = 1 << 7

    def accept(self, token_id):
        self.seen.append(token_id)
        return token_id != 9


def allowed(budget):
    if budget.is_idle:
        return None
    words = np.full((2, num_words(VOCAB)), -1, dtype=np.int32)
    budget.fill(words, 1)
    assert (words[0] == -1).all()
    return list(unpack_tokens(words[1], VOCAB))


@pytest.mark.parametrize(
    ("prompt", "opens"),
    [([], False), ([1, START], True), ([START, 1, 2], True), ([START, END], False), ([START, END, START, 1], True)],
)
def test_prompts(prompt, opens):
    assert opens_thinking(prompt, START, END) == opens


@pytest.mark.parametrize("most", [0, 1, 5])
def test_the_end_is_forced_after_so_many_tokens(most):
    budget = ThinkingBudget(most, IDS, [1, START, 2], VOCAB)
    for _ in range(most):
        assert allowed(budget) is None and budget.accept(WORD)
    assert allowed(budget) == [END] and not budget.is_over
    assert budget.accept(END) and budget.is_over
    for token in (WORD, START, WORD):  # a second block is text like any other
        assert budget.accept(token) and allowed(budget) is None and not budget.is_done


def test_when_a_token_must_be_known_before_the_next_is_scheduled():
    """Not before the budget is nearly used up: until then its engine may work ahead."""
    budget = ThinkingBudget(3, IDS, [START], VOCAB)
    known = [budget.must_know_tokens]
    for token in (WORD, WORD, WORD, END):
        budget.accept(token)
        known.append(budget.must_know_tokens)
    assert known == [False, False, True, True, False]
    assert ThinkingBudget(1, IDS, [], VOCAB).must_know_tokens, "the first token may open a block"
    assert ThinkingBudget(9, IDS, [START], VOCAB, Grammar(has_begun=False)).must_know_tokens


@pytest.mark.parametrize("end", [END, CALL])
def test_thinking_that_ends_by_itself(end):
    budget = ThinkingBudget(2, IDS, [START], VOCAB)
    assert budget.accept(WORD) and budget.accept(end) and budget.is_over
    assert ThinkingBudget(0, IDS[:2], [START], VOCAB).accept(CALL)


def test_calls_are_thinking_where_no_tools_are_offered():
    budget = ThinkingBudget(1, IDS[:2], [START], VOCAB)
    budget.accept(CALL)
    assert allowed(budget) == [END]


def test_a_block_that_the_text_opens():
    budget = ThinkingBudget(1, IDS, [1, 2], VOCAB)
    assert allowed(budget) is None and not budget.is_over
    budget.accept(START)
    budget.accept(WORD)
    assert allowed(budget) == [END]
    late = ThinkingBudget(0, IDS, [START, END], VOCAB)
    late.accept(WORD)
    late.accept(START)
    assert late.is_over and allowed(late) is None


def test_a_form_begins_behind_the_thinking():
    grammar = Grammar(has_begun=False)
    budget = ThinkingBudget(1, IDS, [START], VOCAB, grammar)
    assert allowed(budget) == [7], "the form's own mask"
    budget.accept(WORD)
    assert allowed(budget) == [END]
    budget.accept(END)
    grammar.has_begun = True
    assert allowed(budget) == [7] and not budget.is_over and not budget.accept(9)
    assert grammar.seen == [WORD, END, 9]
    grammar.is_done = True
    assert budget.is_done


def test_a_form_that_holds_already_decides():
    budget = ThinkingBudget(0, IDS, [START], VOCAB, Grammar(has_begun=True))
    assert allowed(budget) == [7]


@given(st.lists(st.integers(0, 9), max_size=30), st.integers(0, 12), st.lists(st.integers(0, 9), max_size=6))
def test_no_block_is_longer_than_its_budget(wanted, most, prompt):
    """A model that goes where it likes, as far as it is let."""
    budget, written = ThinkingBudget(most, IDS, prompt, VOCAB), []
    for token in wanted:
        tokens = allowed(budget)
        written.append(token if tokens is None else tokens[0])
        assert budget.accept(written[-1])
    thinks, inside = opens_thinking(prompt, START, END), 0
    for i, token in enumerate(written):
        if thinks:
            thinks = token not in IDS[1:]
            inside += thinks
        elif i == 0:
            thinks = token == START
    assert inside <= most


@pytest.fixture(scope="module", params=[False, True], ids=["one step at a time", "a step ahead"])
def llm(tiny_model, request):
    settings = {"max_model_len": 512, "max_num_seqs": 8, "use_tqdm_on_load": False, "async_scheduling": request.param}
    llm = LLM(str(tiny_model), reasoning_parser="qwen3", **settings)
    yield llm
    llm.llm_engine.grammar_checker.shutdown()


CHATS = [[{"role": "user", "content": f"What is {a}+{b}?"}] for a, b in ((12, 34), (25, 13), (41, 27), (33, 55))]


def answers(llm, **fields):
    params = SamplingParams(temperature=0.0, max_tokens=80, skip_special_tokens=False, **fields)
    done = [output.outputs[0] for output in llm.chat(CHATS, params, use_tqdm=False)]
    llm.llm_engine.core.check_idle()
    assert not llm.llm_engine.core.grammars.masks([])
    return done


def thoughts(llm, completion):
    """Tokens before the end token."""
    return completion.token_ids.index(llm.get_tokenizer().convert_tokens_to_ids("</think>"))


def test_answers_of_the_engine(llm):
    """Cut after so many tokens and not before; what follows is an answer; and a budget that is not used changes nothing."""
    free = answers(llm)
    for most in (0, 2, 5):
        for cut, whole in zip(answers(llm, thinking_token_budget=most), free):
            assert thoughts(llm, cut) == min(most, thoughts(llm, whole))
            assert cut.token_ids[:most] == whole.token_ids[:most]
            text = cut.text.partition("</think>")[2].removesuffix("<|im_end|>").strip()
            assert text.isdigit() and cut.finish_reason == "stop", cut
    assert [c.token_ids for c in answers(llm, thinking_token_budget=70)] == [c.token_ids for c in free]
    assert [c.token_ids for c in answers(llm, thinking_token_budget=-1)] == [c.token_ids for c in free]


def test_a_budget_and_a_form(llm):
    form = StructuredOutputsParams(regex=r"\[\d\d\]", begin_after="</think>")
    for completion in answers(llm, thinking_token_budget=3, structured_outputs=form):
        assert thoughts(llm, completion) == 3 and completion.finish_reason == "stop"
        text = completion.text.partition("</think>")[2].removesuffix("<|im_end|>").strip()
        assert text[0] + text[-1] == "[]" and text[1:-1].isdigit(), text


def test_it_goes_on_as_if_nothing_had_held_it(llm):
    """Once the thinking is over, the engine makes no masks for the request."""
    engine = llm.llm_engine
    ids = llm.get_tokenizer().apply_chat_template(CHATS[0], add_generation_prompt=True, return_dict=False)
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, thinking_token_budget=2)
    params = params.clone(thinking_token_ids=llm._thinking_token_ids)
    engine.add_request("r", {"prompt_token_ids": ids}, params)
    held = []
    while engine.has_unfinished_requests:
        engine.step()
        held.append(len(engine.core.grammars._live))
    assert held[:3] == [1, 1, 1] and set(held[5:]) == {0}


def test_nobody_knows_how_thinking_ends(tiny_model):
    llm = LLM(str(tiny_model), max_model_len=64, max_num_seqs=1, use_tqdm_on_load=False)
    with pytest.raises(ValueError, match="thinking_token_budget needs a reasoning parser"):
        llm.generate("a", SamplingParams(thinking_token_budget=3), use_tqdm=False)
    with pytest.raises(ValueError, match="thinking_token_budget must be a whole number of at least 0"):
        SamplingParams(thinking_token_budget=-2)
