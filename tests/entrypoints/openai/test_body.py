import orjson
import pytest

from vllm.entrypoints.openai.body import MAX_DEPTH, parse_json, parse_model
from vllm.entrypoints.openai.errors import APIError
from vllm.entrypoints.openai.protocol.chat import ChatCompletionRequest
from vllm.entrypoints.openai.protocol.completion import CompletionRequest


def nested(depth):
    return b"[" * depth + b"]" * depth


def test_depth():
    assert parse_json(nested(MAX_DEPTH))
    for body in (nested(MAX_DEPTH + 1), b'{"a":' * 200 + b"1" + b"}" * 200, nested(100_000)):
        with pytest.raises(APIError) as caught:
            parse_json(body)
        assert caught.value.status == 400
    wide = orjson.dumps([[[]]] * 1000)
    assert len(parse_json(wide)) == 1000
    assert parse_json(orjson.dumps("[" * 1000)) == "[" * 1000, "brackets in a string are not levels"


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"prompt": "a", "n": "x"}, "n", "n: Input should be a valid integer; got 'x'"),
        ({}, "prompt", "prompt: Field required"),
        ({"prompt": "a", "stream_options": {"include_usage": 5}, "stream": True}, "stream_options.include_usage", None),
        ({"prompt": "a", "stream_options": {}}, None, "stream_options needs stream: true"),
        ({"prompt": "a", "logit_bias": {"x y": 1}}, "logit_bias", "logit_bias: keys must be token ids; got 'x y'"),
        ({"prompt": "a", "user": "x" * 10, "seed": "y" * 500}, "seed", None),
    ],
)
def test_messages(body, param, message):
    with pytest.raises(APIError) as caught:
        parse_model(body, CompletionRequest)
    assert caught.value.param == param and len(caught.value.message) < 200
    assert message is None or caught.value.message == message


def test_what_is_not_an_object():
    for body in (None, 5, "a", [1], True):
        with pytest.raises(APIError, match="must be a JSON object"):
            parse_model(body, ChatCompletionRequest)


def test_fields_of_newer_clients_are_passed_over():
    request = parse_model({"prompt": "a", "brand_new": {"x": 1}, "metadata": {}}, CompletionRequest)
    assert not hasattr(request, "brand_new")


def test_many_mistakes_are_not_all_told():
    with pytest.raises(APIError) as caught:
        parse_model({"messages": [{"role": "x"}] * 1000}, ChatCompletionRequest)
    assert len(caught.value.message) < 1000
