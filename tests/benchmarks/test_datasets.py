import argparse
import json

import pytest

from vllm.benchmarks.datasets import add_dataset_args, check_dataset_args, make_samples
from vllm.engine.arg_parser import ArgumentParser
from vllm.v1.engine.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(tiny_model)


def arguments(*words) -> argparse.Namespace:
    parser = ArgumentParser()
    add_dataset_args(parser)
    args = parser.parse_args([str(word) for word in words])
    check_dataset_args(args)
    return args


def test_random_prompts_have_the_length_asked_for(tokenizer):
    args = arguments("--num-prompts", 40, "--random-input-len", 60, "--random-output-len", 9)
    samples = make_samples(args, tokenizer, seed=3)
    lengths = [len(tokenizer.encode(sample.prompt, add_special_tokens=False)) for sample in samples]
    assert lengths == [sample.prompt_len for sample in samples]
    assert sum(length == 60 for length in lengths) >= 36 and all(abs(length - 60) <= 2 for length in lengths)
    assert {sample.output_len for sample in samples} == {9} and len({sample.prompt for sample in samples}) == 40
    assert samples == make_samples(args, tokenizer, seed=3) != make_samples(args, tokenizer, seed=4)


def test_lengths_vary_within_the_ratio_and_share_a_prefix():
    args = arguments(
        "--num-prompts", 300, "--random-input-len", 50, "--random-range-ratio", 0.4, "--random-prefix-len", 5
    )
    samples = make_samples(args, None, vocab_size=100)
    assert {len(sample.prompt) - 5 for sample in samples} == set(range(30, 71))
    assert len({tuple(sample.prompt[:5]) for sample in samples}) == 1
    assert min(sample.output_len for sample in samples) >= 77 and max(sample.output_len for sample in samples) <= 179


def test_prefix_repetition():
    words = (
        "--prefix-repetition-prefix-len",
        8,
        "--prefix-repetition-suffix-len",
        4,
        "--prefix-repetition-num-prefixes",
        3,
    )
    args = arguments("--dataset-name", "prefix_repetition", "--num-prompts", 30, *words)
    samples = make_samples(args, None, vocab_size=1000)
    prefixes = [tuple(sample.prompt[:8]) for sample in samples]
    assert sorted(map(prefixes.count, set(prefixes))) == [10, 10, 10]
    assert len({tuple(sample.prompt[8:]) for sample in samples}) == 30 and {len(s.prompt) for s in samples} == {12}


def test_sharegpt(tokenizer, tmp_path):
    turn = lambda text: {"from": "human", "value": text}
    long, short = "12+34 " * 700, "a"
    entries = [
        {"conversations": [turn(f"What is {i}+{i}?"), turn(f"It is {2 * i}, I think.")]} for i in range(100, 120)
    ]
    entries += [{"conversations": [turn(long), turn("yes, it is")]}, {"conversations": [turn(short), turn(short)]}]
    entries += [{"conversations": [turn("alone")]}, {"other": 1}, 3]
    path = tmp_path / "s.json"
    path.write_text(json.dumps(entries))
    flags = ("--dataset-name", "sharegpt", "--dataset-path", path)
    samples = make_samples(arguments(*flags, "--num-prompts", 50, "--no-oversample"), tokenizer)
    assert len(samples) == 20 and all(sample.prompt.startswith("What is 1") for sample in samples)
    answer = len(tokenizer.encode("It is 200, I think."))
    assert {sample.output_len for sample in samples} == {answer}
    assert len(make_samples(arguments(*flags, "--num-prompts", 50), tokenizer)) == 50
    assert {s.output_len for s in make_samples(arguments(*flags, "--sharegpt-output-len", 7), tokenizer)} == {7}


def test_custom(tokenizer, tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text('{"prompt": "one"}\n\n{"prompt": "two", "output_tokens": 5}\n')
    flags = ("--dataset-name", "custom", "--dataset-path", path, "--custom-output-len", 8)
    samples = make_samples(arguments(*flags, "--num-prompts", 2), tokenizer)
    assert [(sample.prompt, sample.output_len) for sample in samples] == [("one", 8), ("two", 5)]
    for line, message in (
        ("{", "line 4: not JSON"),
        ('{"text": 1}', "line 4: expected"),
        ('{"prompt": "x", "output_tokens": 0}', "line 4"),
    ):
        path.write_text('{"prompt": "one"}\n\n\n' + line)
        with pytest.raises(ValueError, match=message):
            make_samples(arguments(*flags, "--num-prompts", 3), tokenizer)


def test_files_that_do_not_do(tokenizer, tmp_path):
    path = tmp_path / "x.json"
    flags = ("--dataset-name", "sharegpt", "--dataset-path", path)
    for content, message in (("{", "not JSON"), ("{}", "expected a list"), ("[]", "nothing in it")):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            make_samples(arguments(*flags), tokenizer)
    path.write_text('[{"conversations": {"a": 1, "b": 2}}, {"conversations": 5}]')
    with pytest.raises(ValueError, match="nothing in it"):
        make_samples(arguments(*flags), tokenizer)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"x\.json: not text"):
        make_samples(arguments("--dataset-name", "custom", "--dataset-path", path), tokenizer)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        make_samples(arguments(*flags), None, 100)
    with pytest.raises(ValueError, match="--random-range-ratio must lie in 0 to 1"):
        arguments("--random-range-ratio", 1.5)
    with pytest.raises(ValueError, match="--random-input-len must be at least 1"):
        arguments("--random-input-len", 0)
