"""What callers may give, what they may not, and what the engine receives."""

import json
import subprocess
import sys
import types

import pytest

from vllm.config import ModelConfig
from vllm.config.checkpoint import ASSETS, TINY
from vllm.sampling_params import SamplingParams, mix_seed
from vllm.v1.engine.input_processor import MOST_BAD_WORD_PLACES, InputProcessor, load_sampling_defaults
from vllm.v1.engine.tokenizer import load_tokenizer

VOCAB, CONTEXT = 1024, 64


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY)


def configured(**changes):
    """As much of a VllmConfig as the processor reads."""
    text = types.SimpleNamespace(vocab_size=VOCAB)
    model = ModelConfig(
        hf_config=types.SimpleNamespace(text=text), max_model_len=CONTEXT, model_path=str(TINY), **changes
    )
    return types.SimpleNamespace(model_config=model)


@pytest.fixture
def processor(tokenizer):
    return InputProcessor(configured(), tokenizer)


def test_forms_of_a_prompt(processor, tokenizer):
    ids = tokenizer.encode("Hello world")
    for prompt, text in (
        ("Hello world", "Hello world"),
        ({"prompt": "Hello world"}, "Hello world"),
        (ids, None),
        (tuple(ids), None),
        ({"prompt_token_ids": ids}, None),
        ({"prompt_token_ids": ids, "prompt": "said otherwise"}, "said otherwise"),
    ):
        request = processor.process("r", prompt, SamplingParams())
        assert request.prompt_token_ids == ids and request.prompt == text
        assert [child.request_id for child in request.children] == ["r"]
        assert request.children[0].prompt_token_ids == ids


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "at least one token"),
        ([], "at least one token"),
        ({"prompt_token_ids": []}, "at least one token"),
        ([1, VOCAB], f"got {VOCAB}"),
        ([-1, 5], "got -1"),
        ([1, 2.0], "whole numbers"),
        ([1, "2"], "whole numbers"),
        ([1, True], "true or false"),
        ([[1, 2]], "whole numbers"),
        ([5] * CONTEXT, f"prompt has {CONTEXT} tokens"),
        ("word " * 100, "--max-model-len 64"),
        (None, "prompt must be text"),
        (7, "prompt must be text"),
        ({}, "prompt must be text"),
        ({"prompt": 5}, "prompt must be text"),
        ({"prompt": "a", "prompt_token_ids": "b"}, "prompt must be text"),
        ({"prompt": "a", "multi_modal_data": {}}, "multi_modal_data"),
        ("half \ud83d of a pair", "surrogate"),
    ],
)
def test_impossible_prompts(processor, prompt, words):
    with pytest.raises(ValueError) as raised:
        processor.process("r", prompt, SamplingParams())
    assert words in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"stop_token_ids": [3, VOCAB]}, "stop_token_ids"),
        ({"allowed_token_ids": [VOCAB + 5]}, "allowed_token_ids"),
        ({"logit_bias": {VOCAB: 1.0}}, "logit_bias"),
        ({"logprobs": 21}, "logprobs must be at most 20 (--max-logprobs); got 21"),
        ({"prompt_logprobs": 21}, "prompt_logprobs must be at most 20"),
        ({"logprobs": -1}, "got -1 (all 1024)"),
        ({"bad_words": ["x" * i for i in range(1, 600)]}, str(MOST_BAD_WORD_PLACES)),
    ],
)
def test_parameters_that_do_not_fit_the_model(processor, params, words):
    with pytest.raises(ValueError) as raised:
        processor.process("r", [1], SamplingParams(**params))
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_all_logprobs_where_the_server_allows_it(tokenizer):
    processor = InputProcessor(configured(max_logprobs=-1), tokenizer)
    assert processor.process("r", [1], SamplingParams(logprobs=-1, prompt_logprobs=VOCAB)).children


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"max_tokens": None}, 60),
        ({"max_tokens": 500}, 60),
        ({"max_tokens": 5}, 5),
        ({"max_tokens": None, "min_tokens": 100}, 60),
    ],
)
def test_output_is_clipped_to_the_context(processor, asked, expected):
    params = SamplingParams(**asked)
    child = processor.process("r", [1, 2, 3, 4], params).children[0].sampling_params
    assert child.max_tokens == expected and child.min_tokens <= expected
    assert params == SamplingParams(**asked), "the caller's parameters stay"
    longest = processor.process("r", [1] * (CONTEXT - 1), params).children[0].sampling_params
    assert longest.max_tokens == 1 and longest.min_tokens <= 1


def test_children(processor):
    request = processor.process(
        "r", "Hello", SamplingParams(n=3, seed=5, prompt_logprobs=1, logprobs=2), priority=4, arrival_time=9.5
    )
    assert [child.request_id for child in request.children] == ["0_r", "1_r", "2_r"]
    params = [child.sampling_params for child in request.children]
    assert [p.seed for p in params] == [5, mix_seed(5, 1), mix_seed(5, 2)] and len({p.seed for p in params}) == 3
    assert [p.n for p in params] == [1, 1, 1] and [p.logprobs for p in params] == [2, 2, 2]
    assert [p.prompt_logprobs for p in params] == [1, None, None]
    assert {(child.priority, child.arrival_time) for child in request.children} == {(4, 9.5)}
    assert request.sampling_params.n == 3 and request.arrival_time == 9.5
    alone = processor.process("r", "Hello", SamplingParams(seed=5)).children[0]
    assert alone.request_id == "r" and alone.sampling_params.seed == 5


def test_seeds_are_drawn_for_those_without(tokenizer):
    def seeds(seed):
        processor = InputProcessor(configured(seed=seed), tokenizer)
        return [processor.process(str(i), [1], SamplingParams()).children[0].sampling_params.seed for i in range(5)]

    assert seeds(0) == seeds(0) != seeds(1)
    assert len(set(seeds(0))) == 5 and None not in seeds(0)


def test_bad_words_become_tokens(processor, tokenizer):
    child = processor.process("r", [1], SamplingParams(bad_words=["world", " Hello"])).children[0]
    found = child.sampling_params.bad_words_token_ids
    for text in ("world", " world", " Hello"):
        assert tokenizer.encode(text, add_special_tokens=False) in found
    assert len(found) == 3


def test_without_a_tokenizer():
    processor = InputProcessor(configured(), None)
    assert processor.process("r", [1, 2], SamplingParams()).prompt_token_ids == [1, 2]
    with pytest.raises(ValueError, match="no tokenizer"):
        processor.process("r", "text", SamplingParams())
    with pytest.raises(ValueError, match="stop and bad_words"):
        processor.process("r", [1], SamplingParams(stop="x"))


def test_default_parameters(processor, tokenizer):
    expected = {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
    assert processor.default_sampling_params(max_tokens=3) == SamplingParams(**expected, max_tokens=3)
    child = processor.process("r", [1]).children[0].sampling_params
    assert (child.temperature, child.top_k, child.top_p, child.max_tokens) == (0.6, 20, 0.95, 16)
    assert InputProcessor(configured(generation_config="vllm"), tokenizer).default_sampling_params() == SamplingParams()
    overridden = configured(override_generation_config={"top_k": 7, "max_new_tokens": 33})
    found = InputProcessor(overridden, tokenizer).default_sampling_params()
    assert found == SamplingParams(temperature=0.6, top_k=7, top_p=0.95, max_tokens=33)


def test_default_parameters_from_a_folder(tmp_path, tokenizer):
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.3, "transformers_version": "5"}))
    assert load_sampling_defaults(configured(generation_config=str(tmp_path)).model_config) == {"temperature": 0.3}
    with pytest.raises(FileNotFoundError, match="--generation-config"):
        load_sampling_defaults(configured(generation_config=str(tmp_path / "none")).model_config)
    with pytest.raises(ValueError, match="--override-generation-config: do_sample would change nothing"):
        load_sampling_defaults(configured(override_generation_config={"do_sample": True}).model_config)
    with pytest.raises(ValueError, match=r"default sampling parameters .*top_p must be"):
        InputProcessor(configured(override_generation_config={"top_p": 3}), tokenizer)


def test_loading_a_tokenizer(tmp_path, caplog):
    preset = next(path for path in (ASSETS / "presets").iterdir() if not (path / "tokenizer.json").is_file())
    with caplog.at_level("INFO"):
        assert len(load_tokenizer(preset)) == VOCAB
    assert sum("has no tokenizer" in record.message for record in caplog.records) == 1
    assert len(load_tokenizer(types.SimpleNamespace(model_config=ModelConfig(tokenizer=str(TINY))))) == VOCAB
    for missing in (tmp_path, tmp_path / "none", "./none"):
        with pytest.raises(FileNotFoundError) as raised:
            load_tokenizer(missing)
        assert str(raised.value).startswith("--tokenizer") and "\n" not in str(raised.value)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        load_tokenizer(tmp_path)
    assert str(raised.value).startswith("--tokenizer") and "\n" not in str(raised.value)


@pytest.mark.parametrize("stated", ["PreTrainedTokenizerFast", "Qwen2Tokenizer"])
def test_a_tokenizer_file_is_read_without_looking_for_its_class(tmp_path, stated):
    """The same tokenizer as transformers finds by the class that a checkpoint states, without the import of all its models' names."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (TINY / name).is_file():
            (tmp_path / name).write_bytes((TINY / name).read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": stated}))
    script = (
        "import sys; from vllm.v1.engine.tokenizer import load_tokenizer as load; "
        f"print(load({str(tmp_path)!r}).encode('12 apples'), 'transformers.models.auto' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    from transformers import AutoTokenizer

    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert done.stdout.splitlines() == [f"{ours.encode('12 apples')} False"], done.stdout + done.stderr
    messages = [{"role": "user", "content": "Überall <|im_end|> 1234567, naïve 你好\n\n  \tend"}]
    text = ours.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert (ids := ours.encode(text)) == theirs.encode(text) and ours.decode(ids) == theirs.decode(ids) == text
    for name in ("all_special_ids", "model_max_length", "eos_token_id", "vocab_size"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert list(ours.added_tokens_decoder) == list(theirs.added_tokens_decoder)
