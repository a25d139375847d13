"""Every impossible value is one clear line; every possible one survives cloning."""

import copy
import math
import pickle
import subprocess
import sys

import pytest

from vllm.sampling_params import RequestOutputKind, SamplingParams, mix_seed

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("n", v) for v in (0, -1, 1.0, True, "2", None)],
        *[("presence_penalty", v) for v in (-2.1, 2.1, NAN, INF, True, "1", None)],
        *[("frequency_penalty", v) for v in (-2.1, 2.1, NAN, -INF, False, None)],
        *[("repetition_penalty", v) for v in (0, 0.0, -1.0, NAN, INF, True)],
        *[("temperature", v) for v in (-0.1, NAN, INF, 10**400, True, "0.7", None)],
        *[("top_p", v) for v in (0, 0.0, -0.1, 1.01, NAN, INF, True)],
        *[("top_k", v) for v in (-2, 1.5, 3.0, True, NAN, None)],
        *[("min_p", v) for v in (-0.1, 1.1, NAN, INF, True)],
        *[("seed", v) for v in (2**63, -(2**63) - 1, 1.5, True, "1", NAN)],
        *[("max_tokens", v) for v in (0, -1, 2.0, True, INF)],
        *[("min_tokens", v) for v in (-1, 2.0, True, 17, None)],
        *[("logprobs", v) for v in (-2, 1.0, True, "3")],
        *[("prompt_logprobs", v) for v in (-2, 1.0, True)],
        *[("stop", v) for v in ("", [""], ["a", ""], [1], 5, {"a": 1})],
        *[("bad_words", v) for v in ("", ["a", ""], [1])],
        *[("stop_token_ids", v) for v in ([-1], [1.0], [True], 5, "12")],
        *[("allowed_token_ids", v) for v in ([], [-1], [2.5], [True], 7)],
        *[
            ("logit_bias", v)
            for v in ({-1: 1.0}, {"x": 1.0}, {"-1": 1.0}, {1: NAN}, {1: INF}, {1: True}, {1: "2"}, {True: 1.0}, [1])
        ],
        *[(name, v) for name in ("ignore_eos", "detokenize", "skip_special_tokens") for v in (1, None, "yes")],
        ("spaces_between_special_tokens", 0),
        ("include_stop_str_in_output", 0),
        *[("output_kind", v) for v in (3, "delta", None)],
        ("extra_args", [1]),
    ],
)
def test_impossible_values(field, value):
    with pytest.raises(ValueError) as raised:
        SamplingParams(**{field: value})
    message = str(raised.value)
    assert "\n" not in message and message.startswith(field), message
    if not isinstance(value, (list, dict)):
        assert repr(value) in message or str(value) in message, message


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0},
        {"temperature": 1e9, "top_k": 10**30, "top_p": 1, "min_p": 1, "seed": -(2**63)},
        {"top_p": 1e-9, "top_k": -1, "repetition_penalty": 0.01, "presence_penalty": -2, "frequency_penalty": 2},
        {"max_tokens": None, "min_tokens": 10**6},
        {"logprobs": -1, "prompt_logprobs": 0},
        {"stop": ("a", "b"), "bad_words": {"c"}, "stop_token_ids": (1, 2)},
    ],
)
def test_possible_values(values):
    assert SamplingParams(**values) == SamplingParams(**values).clone()


def test_normal_forms():
    params = SamplingParams(stop="end", logit_bias={"7": 250, 8: -1e300, 9: 10**400 // 10**390}, top_k=-1, seed=-1)
    assert params.stop == ["end"] and params.bad_words == [] and params.stop_token_ids == []
    assert params.logit_bias == {7: 100.0, 8: -100.0, 9: 100.0}
    assert params.top_k == 0 and params.seed is None
    assert SamplingParams(output_kind=1).output_kind is RequestOutputKind.DELTA
    assert SamplingParams().max_tokens == 16


def test_fields_that_exclude_each_other():
    with pytest.raises(ValueError, match="n must be 1 when temperature is 0"):
        SamplingParams(n=2, temperature=0)
    with pytest.raises(ValueError, match="min_tokens must be at most max_tokens"):
        SamplingParams(max_tokens=3, min_tokens=4)
    with pytest.raises(ValueError, match="stop needs detokenize"):
        SamplingParams(stop=["x"], detokenize=False)


def test_greedy():
    assert SamplingParams(temperature=0).greedy and SamplingParams(temperature=9e-6).greedy
    assert not SamplingParams(temperature=1e-5).greedy and not SamplingParams().greedy


def test_a_clone_shares_nothing_and_is_checked():
    params = SamplingParams(stop=["a"], logit_bias={1: 2.0}, bad_words_token_ids=[[1, 2]], extra_args={"k": 1})
    clone = params.clone(temperature=0.5)
    clone.stop.append("b")
    clone.logit_bias[3] = 1.0
    clone.bad_words_token_ids[0].append(3)
    clone.extra_args["z"] = 2
    assert params.stop == ["a"] and params.logit_bias == {1: 2.0} and params.bad_words_token_ids == [[1, 2]]
    assert params.extra_args == {"k": 1} and params.temperature == 1.0 and clone.temperature == 0.5
    with pytest.raises(ValueError, match="top_p"):
        params.clone(top_p=2)
    assert pickle.loads(pickle.dumps(params)) == copy.deepcopy(params) == params


def test_from_defaults():
    defaults = {
        "temperature": 0.6,
        "top_k": 20,
        "top_p": None,
        "max_new_tokens": 99,
        "do_sample": True,
        "eos_token_id": [1],
    }
    params = SamplingParams.from_defaults(defaults, top_k=5)
    assert params == SamplingParams(temperature=0.6, top_k=5, max_tokens=99)
    assert SamplingParams.from_defaults({}) == SamplingParams()
    with pytest.raises(ValueError, match="top_p must be"):
        SamplingParams.from_defaults({"top_p": 7})


def test_child_seeds():
    assert mix_seed(42, 0) == 42
    seeds = {mix_seed(seed, i) for seed in (-(2**63), -7, 0, 1, 2, 2**63 - 1) for i in range(1, 200)}
    assert len(seeds) == 6 * 199 and all(0 <= seed < 2**63 for seed in seeds)


def test_neither_torch_nor_transformers_is_imported():
    code = (
        "import sys, vllm.sampling_params, vllm.outputs, vllm.v1.engine.input_processor, vllm.v1.engine.output_processor, "
        "vllm.v1.engine.tokenizer; assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
