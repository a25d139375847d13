"""Incremental text equals decoding everything at once, never shows half a character, and stops where it should."""

import random
import time
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vllm.config.checkpoint import TINY
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.detokenizer import Detokenizer, StopStrings, TokenTable
from vllm.v1.engine.tokenizer import load_tokenizer

ADDED = [
    "<tool call>",
    "日本 語",
    "naïve ",
    "Ġ",
]  # spelled as they are, not in the byte-level alphabet; the last is the catch


def byte_level_tokenizer():
    """A tokenizer that merges across words, scripts and halves of characters, with special and other added tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>", "<|start of text|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["the cat sat on thé mat 😀😁😂 你好世界 여보세요 \u0301e\u0301 \r\n\t --- !!! 👩‍👩‍👧"] * 3, trainer
    )
    tokenizer.add_tokens([AddedToken(text, special=False) for text in ADDED])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


@pytest.fixture(scope="module", params=["bundled", "built"])
def tokenizer(request):
    if request.param == "built":
        return byte_level_tokenizer()
    return load_tokenizer(TINY)


def pieces(table, token_ids, **params):
    """What each token releases, and last what the end does."""
    detokenizer = Detokenizer(table, SamplingParams(**params))
    found = []
    for token_id in token_ids:
        assert detokenizer.push(token_id) is None
        found.append(detokenizer.take())
    assert detokenizer.finish() is None
    return [*found, detokenizer.take()]


@settings(max_examples=150, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_random_ids_equal_decoding_at_once(tokenizer, data, skip):
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) + 3), max_size=60))
    found = pieces(TokenTable(tokenizer), ids, skip_special_tokens=skip)
    assert "".join(found) == tokenizer.decode(ids, skip_special_tokens=skip)


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=60))
@example("👩‍👩‍👧 é e\u0301 日本 語")
def test_random_text_comes_whole(tokenizer, text):
    """Each piece is valid by itself: U+FFFD shows only where the text has it."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    found = pieces(TokenTable(tokenizer), ids, skip_special_tokens=False)
    assert "".join(found) == tokenizer.decode(ids)
    assert "".join(found) in (text, unicodedata.normalize("NFC", text))  # the bundled one normalises
    assert "".join(found).count("\ufffd") == text.count("\ufffd")
    assert found[-1] == ""


def test_a_character_in_several_tokens(tokenizer):
    table = TokenTable(tokenizer)
    of_byte = {table.bytes_of(i): i for i in range(len(tokenizer)) if len(table.bytes_of(i)) == 1}
    smile = [of_byte[bytes([b])] for b in "😀".encode()]
    letter = of_byte[b"A"]
    assert pieces(table, smile) == ["", "", "", "😀", ""]
    assert pieces(table, smile[:3]) == ["", "", "", "\ufffd"]
    assert pieces(table, [*smile[:3], letter]) == ["", "", "", "\ufffdA", ""]
    assert pieces(table, [smile[3], letter]) == ["\ufffd", "A", ""]
    assert pieces(table, [of_byte[b"\xff"]]) == ["\ufffd", ""]


def test_special_and_unknown_ids(tokenizer):
    table = TokenTable(tokenizer)
    end = tokenizer.eos_token_id
    assert pieces(table, [end]) == ["", ""]
    assert pieces(table, [end], skip_special_tokens=False)[0] == tokenizer.eos_token
    assert table.bytes_of(len(tokenizer) + 5) == b"" and table.text_of(len(tokenizer) + 5) == ""
    for token_id in range(len(tokenizer)):
        assert table.text_of(token_id) == tokenizer.decode([token_id])


def test_work_per_token_does_not_grow(tokenizer):
    """The last thousand tokens of 40,000 cost about what the first thousand cost; decoding a window again and again would not."""
    ids = random.Random(0).choices(range(len(tokenizer)), k=40_000)
    detokenizer = Detokenizer(TokenTable(tokenizer), SamplingParams(stop=["never there", "neither"]))
    times = []
    for start in range(0, len(ids), 1000):
        began = time.perf_counter()
        for token_id in ids[start : start + 1000]:
            detokenizer.push(token_id)
            detokenizer.take()
        times.append(time.perf_counter() - began)
    assert min(times[-5:]) < 5 * min(times[:10])


def test_without_detokenisation(tokenizer):
    for table, params in ((None, {}), (TokenTable(tokenizer), {"detokenize": False})):
        assert pieces(table, [5, 6, 7], **params) == [""] * 4


def test_tokenizers_that_are_not_byte_level_are_refused():
    class Other:
        pass

    with pytest.raises(ValueError, match="byte-level"):
        TokenTable(Other())


# Stop strings.


def first_complete(text, stops):
    """(stop, end) by looking at every beginning of the text."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return max(complete, key=len), end
    return None


def may_begin(text, stops):
    """Length of the longest end of the text that begins a stop string without completing it."""
    return max((n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n])), default=0)


short = st.text(alphabet="ab", min_size=1, max_size=6)


@settings(max_examples=400, deadline=None)
@given(text=st.text(alphabet="abc", max_size=30), stops=st.lists(short, min_size=1, max_size=4), data=st.data())
def test_stop_strings_equal_looking_everywhere(text, stops, data):
    matcher, position, expected = StopStrings(stops), 0, first_complete(text, stops)
    while position < len(text):
        size = data.draw(st.integers(1, 5))
        piece = text[position : position + size]
        match = matcher.feed(piece, armed=True)
        if expected and expected[1] <= position + len(piece):
            assert match == (expected[0], expected[1] - position)
            return
        assert match is None
        position += len(piece)
        assert matcher.held == may_begin(text[:position], stops)
    assert expected is None


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="ab", max_size=30), stops=st.lists(short, min_size=1, max_size=3), deaf=st.integers(0, 30))
def test_what_is_not_armed_does_not_count(text, stops, deaf):
    matcher = StopStrings(stops)
    found = None
    for i, char in enumerate(text):
        found = matcher.feed(char, armed=i >= deaf)
        if found:
            break
        assert matcher.held == may_begin(text[: i + 1], stops)
    ends = [end for end in range(deaf + 1, len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    assert (found is None) == (not ends)
    if ends:
        assert i + 1 == ends[0] and found == (max((s for s in stops if text[: ends[0]].endswith(s)), key=len), 1)


def stopped_text(tokenizer, text, **params):
    """(released pieces, stop string, tokens pushed): the text token by token up to its stop."""
    detokenizer = Detokenizer(TokenTable(tokenizer), SamplingParams(**params))
    found = []
    for n, token_id in enumerate(tokenizer.encode(text, add_special_tokens=False), 1):
        stop = detokenizer.push(token_id)
        found.append(detokenizer.take())
        if stop is not None:
            return found, stop, n
    stop = detokenizer.finish()
    return [*found, detokenizer.take()], stop, n


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet="ab 😀é", min_size=1, max_size=40), stops=st.lists(st.text(alphabet="ab 😀é", min_size=1, max_size=4), max_size=3),
       include=st.booleans())  # fmt: skip
def test_text_is_cut_at_the_first_stop(tokenizer, text, stops, include):
    found, stop, _ = stopped_text(tokenizer, text, stop=stops, include_stop_str_in_output=include)
    expected = first_complete(text, stops)
    if expected is None:
        assert stop is None and "".join(found) == text
    else:
        assert stop == expected[0]
        assert "".join(found) == text[: expected[1] - (0 if include else len(stop))]


def test_only_what_may_become_a_stop_is_held_back(tokenizer):
    found, stop, _ = stopped_text(tokenizer, "a-b--c---d", stop=["---"])
    assert stop == "---" and "".join(found) == "a-b--c"
    detokenizer = Detokenizer(TokenTable(tokenizer), SamplingParams(stop=["STOP"]))
    released = []
    for char in "xSTxSTOx":
        detokenizer.push(tokenizer.encode(char, add_special_tokens=False)[0])
        released.append(detokenizer.take())
    assert released == ["x", "", "", "STx", "", "", "", "STOx"]


def test_min_tokens_come_before_a_stop(tokenizer):
    ids = [tokenizer.encode(char, add_special_tokens=False)[0] for char in "xxxxxx"]
    for min_tokens in range(5):
        detokenizer = Detokenizer(TokenTable(tokenizer), SamplingParams(stop=["x"], min_tokens=min_tokens))
        ended = next(i for i, token_id in enumerate(ids, 1) if detokenizer.push(token_id))
        assert ended == min_tokens + 1 and detokenizer.text == "x" * min_tokens


def test_a_silent_last_token_has_no_text(tokenizer):
    detokenizer = Detokenizer(TokenTable(tokenizer), SamplingParams())
    ids = tokenizer.encode("ab", add_special_tokens=False)
    detokenizer.push(ids[0])
    detokenizer.push(ids[-1], silent=True)
    detokenizer.finish()
    assert detokenizer.text == tokenizer.decode(ids[:1])


def test_what_the_end_releases_may_complete_a_stop(tokenizer):
    table = TokenTable(tokenizer)
    half = next(i for i in range(len(tokenizer)) if table.bytes_of(i) == b"\xf0")
    detokenizer = Detokenizer(table, SamplingParams(stop=["\ufffd"]))
    assert detokenizer.push(half) is None and detokenizer.finish() == "\ufffd" and detokenizer.text == ""
