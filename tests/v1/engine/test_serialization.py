"""What goes in comes out, whatever it holds; and what is said nearly always is short."""

import dataclasses

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams
from vllm.v1.engine.messages import (
    AbortRequests,
    AddRequests,
    CallAnswer,
    CallCore,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    SchedulerStats,
)
from vllm.v1.engine.serialization import decode_command, decode_outputs, encode_command, encode_outputs
from vllm.v1.outputs import TokenLogprobs

ids = st.lists(st.integers(0, 1 << 18), max_size=4)
logprobs = st.builds(TokenLogprobs, ids, st.lists(st.floats(-50, 0), max_size=4), st.integers(1, 1 << 18))
outputs = st.builds(
    EngineCoreOutput,
    st.text(st.characters(codec="utf-8")),
    ids,
    st.sampled_from([None, "stop", "length", "abort"]),
    st.none() | st.integers(0, 1 << 18) | st.text("ab", max_size=3),
    st.lists(logprobs, max_size=2),
    st.lists(logprobs, max_size=2),
    st.just(0),
    st.none() | st.floats(0, 1e10),
)


all_stats = st.builds(SchedulerStats, *[st.integers(0, 1 << 40)] * 10, st.lists(st.integers(0, 9), max_size=3))
answers = st.builds(
    CallAnswer, st.integers(0, 99), st.none() | st.booleans() | st.text("ab"), st.none() | st.text("ab")
)


@given(st.lists(outputs, max_size=5), all_stats, st.lists(answers, max_size=2))
def test_outputs(some, stats, answered):
    message = EngineCoreOutputs(some, stats, answered)
    assert decode_outputs(encode_outputs(message)) == message


def test_every_field_of_an_output_travels_with_its_first_one():
    output = EngineCoreOutput(
        "r", [1], "stop", 2, [TokenLogprobs([1], [-0.5], 1)], [TokenLogprobs([2], [-1.0], 3)], 4, 5.0
    )
    defaults = EngineCoreOutput("r", [1])
    assert all(getattr(output, f.name) != getattr(defaults, f.name) for f in dataclasses.fields(output)[2:])
    assert decode_outputs(encode_outputs(EngineCoreOutputs([output], SchedulerStats()))).outputs == [output]


def test_a_plain_token_is_a_few_bytes():
    def size(n):
        return len(encode_outputs(EngineCoreOutputs([EngineCoreOutput("123", [70000])] * n, SchedulerStats())))

    assert size(11) - size(1) <= 10 * 12


CHANGED = SamplingParams(
    n=2,
    presence_penalty=0.5,
    frequency_penalty=-0.5,
    repetition_penalty=1.5,
    temperature=0.25,
    top_p=0.5,
    top_k=7,
    min_p=0.125,
    seed=-(1 << 63),
    stop_token_ids=[3, 4],
    ignore_eos=True,
    max_tokens=None,
    min_tokens=3,
    logprobs=-1,
    prompt_logprobs=0,
    detokenize=False,
    skip_special_tokens=False,
    spaces_between_special_tokens=False,
    include_stop_str_in_output=True,
    output_kind=RequestOutputKind.DELTA,
    logit_bias={5: -1.5, 6: 2},
    allowed_token_ids=[1, 2, 3],
    bad_words_token_ids=[[1, 2], [3]],
    extra_args={"a": [1, {"b": None}]},
    structured_outputs=StructuredOutputsParams(json={"type": "object"}),
    thinking_token_budget=9,
    thinking_token_ids=[1, 2],
)


def round_trip(*requests):
    command = decode_command(encode_command(AddRequests(list(requests))))
    assert type(command) is AddRequests
    return command.requests


def test_requests():
    request = EngineCoreRequest("r", [1, 2, 3], CHANGED, 12.5, -7)
    assert round_trip(request) == [request]
    assert type(round_trip(request)[0].sampling_params.output_kind) is RequestOutputKind
    plain = EngineCoreRequest("r", [1], SamplingParams(), 0.0)
    assert round_trip(plain) == [plain]


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(SamplingParams)])
def test_every_parameter_travels_or_is_the_front_ends(name):
    value = getattr(CHANGED, name)
    if name in ("stop", "bad_words"):
        front = dataclasses.replace(SamplingParams(), **{name: ["x"]})
        assert round_trip(EngineCoreRequest("r", [1], front, 0.0))[0].sampling_params == SamplingParams()
        return
    assert value != getattr(SamplingParams(), name), f"CHANGED must give {name} another value than the default"
    received = round_trip(EngineCoreRequest("r", [1], CHANGED, 0.0))[0].sampling_params
    assert getattr(received, name) == value


def test_children_share_their_prompt():
    prompt = list(range(1000))
    children = [EngineCoreRequest(str(i), prompt, SamplingParams(seed=i), 0.0) for i in range(10)]
    other = EngineCoreRequest("other", [5], SamplingParams(), 0.0)
    received = round_trip(*children, other, children[0])
    assert received == [*children, other, children[0]]
    assert all(request.prompt_token_ids is received[0].prompt_token_ids for request in received[:10])
    assert len(encode_command(AddRequests(children))) < 2 * len(encode_command(AddRequests(children[:1])))


def test_aborts():
    assert decode_command(encode_command(AbortRequests(["1", "2"]))) == AbortRequests(["1", "2"])


def test_calls():
    assert decode_command(encode_command(CallCore(3, "stop_profile"))) == CallCore(3, "stop_profile")


@pytest.mark.parametrize(
    "changes", [{"top_k": 1 << 64}, {"extra_args": {"x": object()}}, {"extra_args": {"x": "\ud800"}}]
)
def test_what_cannot_travel_is_a_value_error(changes):
    with pytest.raises(ValueError, match="cannot take a parameter"):
        encode_command(AddRequests([EngineCoreRequest("r", [1], SamplingParams(**changes), 0.0)]))


def test_nonsense_is_not_taken_for_a_message():
    with pytest.raises(msgspec.DecodeError):
        decode_outputs(b"\xc1")
