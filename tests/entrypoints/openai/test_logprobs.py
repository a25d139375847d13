import pytest

from tests.entrypoints.openai.server import TINY
from vllm.entrypoints.openai.logprobs import CompletionLogprobs, TokenNames, chat_logprobs, joined
from vllm.outputs import Logprob
from vllm.v1.engine.detokenizer import TokenTable
from vllm.v1.engine.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY)


@pytest.fixture(scope="module")
def names(tokenizer):
    return TokenNames(TokenTable(tokenizer), as_ids=False)


def test_half_characters_have_their_bytes(tokenizer, names):
    token_ids = tokenizer.encode("𝄞")
    assert len(token_ids) == 4, "one token a byte"
    content = chat_logprobs([{token: Logprob(-1.0, 1)} for token in token_ids], names, 1)
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == "𝄞"


def test_the_likeliest_come_in_order_and_no_more_than_asked_for(names):
    chosen = {7: Logprob(-3.0, 9), 5: Logprob(-0.1, 1), 6: Logprob(-1.0, 2)}
    (entry,) = chat_logprobs([chosen], names, 2)
    assert [top["logprob"] for top in entry["top_logprobs"]] == [-0.1, -1.0] and entry["logprob"] == -3.0
    (entry,) = chat_logprobs([chosen], names, 0)
    assert entry["top_logprobs"] == []
    assert len(chat_logprobs([chosen], names, -1)[0]["top_logprobs"]) == 3


def test_offsets_are_places_in_the_text(tokenizer, names):
    text = "a𝄞é b"
    token_ids = tokenizer.encode(text)
    positions = [{token: Logprob(-1.0, 1)} for token in token_ids]
    whole = CompletionLogprobs(names, skip_special=True).output(token_ids, positions)
    for token, offset in zip(whole["tokens"], whole["text_offset"]):
        assert "\ufffd" in token or text[offset:].startswith(token)
    pieces, parts = CompletionLogprobs(names, skip_special=True), None
    for token, position in zip(token_ids, positions):
        parts = joined(parts, pieces.output([token], [position]))
    assert parts == whole, "cut anywhere"


def test_special_tokens_have_a_place_only_where_they_are_shown(tokenizer, names):
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for skipped, expected in ((True, 0), (False, len("<|im_end|>"))):
        logprobs = CompletionLogprobs(names, skip_special=skipped)
        logprobs.output([end], [{end: Logprob(-1.0, 1)}])
        assert logprobs.output([5], [{5: Logprob(-1.0, 1)}])["text_offset"] == [expected]


def test_no_infinities(names):
    (entry,) = chat_logprobs([{5: Logprob(float("-inf"), 900)}], names, 1)
    assert entry["logprob"] == -9999.0
