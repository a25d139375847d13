import argparse
import dataclasses

import pytest

from vllm.config import (
    CacheConfig,
    CompilationConfig,
    GDNConfig,
    LoadConfig,
    ModelConfig,
    ObservabilityConfig,
    ParallelConfig,
    SchedulerConfig,
)
from vllm.config.knob import is_knob
from vllm.engine.arg_parser import human_int
from vllm.engine.arg_utils import ArgumentParser, EngineArgs
from vllm.engine.unsupported import UNSUPPORTED, refuse

CONFIGS = (
    ModelConfig,
    LoadConfig,
    CacheConfig,
    SchedulerConfig,
    ParallelConfig,
    GDNConfig,
    CompilationConfig,
    ObservabilityConfig,
)


@pytest.fixture(scope="module")
def parser():
    return EngineArgs.add_cli_args(ArgumentParser(prog="test"))


def parse(parser, line):
    return EngineArgs.from_cli_args(parser.parse_args(line.split() if isinstance(line, str) else line))


def fails(parser, capsys, line):
    """The one line that a wrong command line prints."""
    with pytest.raises(SystemExit) as caught:
        parse(parser, line)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


def test_every_knob_is_an_argument_with_its_default_and_a_flag(parser):
    knobs = {f.name: f for cls in CONFIGS for f in dataclasses.fields(cls) if is_knob(f)}
    assert {f.name for f in dataclasses.fields(EngineArgs)} == set(knobs)
    flags = {option for action in parser._actions for option in action.option_strings}
    default = EngineArgs()
    for cls in CONFIGS:
        for f in dataclasses.fields(cls):
            if is_knob(f):
                assert getattr(default, f.name) == getattr(cls(), f.name)
                assert "--" + f.name.replace("_", "-") in flags
                assert f.metadata["help"].endswith(".")
    assert parse(parser, []) == default


def test_no_flag_is_both_known_and_refused():
    assert not {f.name for f in dataclasses.fields(EngineArgs)} & set(UNSUPPORTED)


def test_values(parser):
    args = parse(
        parser,
        "--model m -q compressed-tensors --max-model-len 32K --gpu-memory-utilization 0.8 --no-enable-chunked-prefill "
        "--language-model-only --kv-cache-memory-bytes 1.5G --max-num-batched-tokens=4k -tp 1 --gdn-in-proj fused",
    )
    assert (args.model, args.quantization, args.max_model_len) == ("m", "compressed-tensors", 32768)
    assert (args.gpu_memory_utilization, args.kv_cache_memory_bytes) == (0.8, 3 << 29)
    assert (args.enable_chunked_prefill, args.language_model_only, args.max_num_batched_tokens) == (False, True, 4000)
    assert args.gdn_in_proj == "fused"


def test_underscores(parser):
    assert parse(parser, "--max_model_len=7 --served_model_name a_b").max_model_len == 7
    assert parse(parser, "--served_model_name a_b").served_model_name == ["a_b"]


def test_several_names(parser):
    for line in (
        "--served-model-name a b --dtype auto",
        "--served-model-name a --served-model-name=b",
        '--served-model-name=["a","b"]',
    ):
        assert parse(parser, "--model m " + line).served_model_name == ["a", "b"]
    with pytest.raises(ValueError, match="no model: --served-model-name has taken a and m; put the model before it"):
        parse(parser, "--served-model-name a m")
    assert EngineArgs("m", served_model_name="a").served_model_name == "a"
    for wrong in (5, [5], {"a": 1}):
        with pytest.raises(TypeError, match="served_model_name must be a list of texts or None"):
            EngineArgs("m", served_model_name=wrong)
    for wrong in ("", ["a", ""], []):
        with pytest.raises(ValueError, match="--served-model-name must not be empty"):
            EngineArgs("preset:tiny", served_model_name=wrong).create_engine_config(device="cpu")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--hf-overrides", '{"a": {"b": 1}}'], {"a": {"b": 1}}),
        (["--hf-overrides.text_config.num_hidden_layers", "4"], {"text_config": {"num_hidden_layers": 4}}),
        (["--hf_overrides.a.b=x", "--hf-overrides.a.c", "[1, 2]"], {"a": {"b": "x", "c": [1, 2]}}),
        (["--hf-overrides.a", "1", "--hf-overrides", '{"b": 2}', "--hf-overrides.a=3"], {"a": 3, "b": 2}),
        (["--hf-overrides.a", "true", "--hf-overrides.b", "null"], {"a": True, "b": None}),
        (["--hf-overrides.a", "x=y.z"], {"a": "x=y.z"}),
    ],
)
def test_json_flags(parser, words, expected):
    assert parse(parser, words).hf_overrides == expected
    assert parse(parser, []).hf_overrides == {}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--max-modellen 3", ["--max-modellen", "did you mean --max-model-len?"]),
        ("--zzzz", ["--zzzz"]),
        ("stray", ["unrecognized arguments: stray"]),
        ("--max-model-len 3x", ["--max-model-len", "3x"]),
        ("--max-model-len 1.5", ["whole number"]),
        ("--max-model", ["--max-model"]),
        ("--dtype int8", ["--dtype", "int8", "bfloat16"]),
        ("--block-size 17", ["--block-size", "17"]),
        ("--hf-overrides {", ["--hf-overrides", "JSON"]),
        ("--hf-overrides [1]", ["JSON object"]),
        ("--hf-overrides.a", ["--hf-overrides.a", "expected a value"]),
        ("--max-model-len.a 4", ["--max-model-len"]),
    ],
)
def test_mistakes(parser, capsys, line, words):
    message = fails(parser, capsys, line)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "line",
    [
        "--enable-prefix-caching",
        "--enable_prefix_caching",
        "-pp 2",
        "--pipeline-parallel-size 2",
        "-dp 2",
        "--enable-expert-parallel",
        "-ep",
        '-sc {"method":"mtp"}',
        "--speculative-config.num_speculative_tokens 2",
        "--enable-lora",
        "--kv-transfer-config {}",
        "--swap-space 4",
        "--trust-remote-code",
        "--distributed-executor-backend ray",
        "--limit-mm-per-prompt.image 1",
    ],
)
def test_vllm_flags_are_refused_by_name(parser, capsys, line):
    message = fails(parser, capsys, line)
    assert "is not supported: " in message
    assert message.split()[1].lstrip("-")[0] in line


@pytest.mark.parametrize(
    "line",
    [
        "--no-enable-prefix-caching",
        "-pp 1 --data-parallel-size=1",
        "--no-trust-remote-code --no-enable-lora",
        "--swap-space 0",
        "--disable-custom-all-reduce",
        "--no-enable-expert-parallel",
    ],
)
def test_flags_that_ask_for_what_happens_anyway_pass(parser, line):
    assert parse(parser, line) == EngineArgs()


@pytest.mark.parametrize(("line", "level"), [("-O0", 0), ("-O 3", 3), ("-O=1", 1), ("--optimization-level 0", 0)])
def test_optimization_levels(parser, line, level):
    assert parse(parser, line).optimization_level == level


def test_refused_flags_are_not_in_the_help(parser):
    text = parser.format_help()
    assert "prefix-caching" not in text and "--max-model-len" in text


def test_a_positional_model():
    parser = ArgumentParser()
    parser.add_argument("model_tag", nargs="?")
    EngineArgs.add_cli_args(parser)
    assert parse(parser, "m").model == "m"
    assert parse(parser, "m --model m").model == "m"
    with pytest.raises(ValueError, match="two models: m and --model n"):
        parse(parser, "m --model n")


def test_works_with_plain_argparse():
    parser = EngineArgs.add_cli_args(argparse.ArgumentParser())
    assert EngineArgs.from_cli_args(parser.parse_args(["--max-num-seqs", "4"])).max_num_seqs == 4


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("-1", -1),
        ("4096", 4096),
        ("4k", 4000),
        ("4K", 4096),
        ("1M", 1 << 20),
        ("2g", 2 * 10**9),
        ("0.5K", 512),
    ],
)
def test_human_int(text, value):
    assert human_int(text) == value


@pytest.mark.parametrize("text", ["", "k", "1 000", "1e3", "0.3", "4KB", "--1"])
def test_not_a_human_int(text):
    with pytest.raises(argparse.ArgumentTypeError):
        human_int(text)


def test_keywords():
    assert EngineArgs("m", max_num_seqs=4) == EngineArgs.from_kwargs(model="m", max_num_seqs=4)
    assert EngineArgs(enable_prefix_caching=False, pipeline_parallel_size=1, speculative_config=None) == EngineArgs()
    assert EngineArgs(swap_space=0) == EngineArgs()
    assert dataclasses.replace(EngineArgs("m"), seed=3).seed == 3


@pytest.mark.parametrize(
    ("kwargs", "kind", "word"),
    [
        ({"max_modl_len": 4}, TypeError, "unknown engine argument 'max_modl_len'; did you mean 'max_model_len'?"),
        ({"qqq": 4}, TypeError, "unknown engine argument 'qqq'"),
        ({"enable_prefix_caching": True}, ValueError, "enable_prefix_caching=True is not supported"),
        ({"pipeline_parallel_size": 2}, ValueError, "pipeline_parallel_size=2 is not supported"),
        ({"speculative_config": {"method": "mtp"}}, ValueError, "speculative_config={'method': 'mtp'} is not"),
        ({"max_num_seqs": "8"}, TypeError, "max_num_seqs must be a whole number; got '8'"),
        ({"max_model_len": 8.0}, TypeError, "max_model_len must be a whole number or None"),
        ({"max_num_seqs": True}, TypeError, "max_num_seqs"),
        ({"language_model_only": 1}, TypeError, "language_model_only must be True or False"),
        ({"dtype": None}, TypeError, "dtype must be a text"),
        ({"hf_overrides": "{}"}, TypeError, "hf_overrides must be a dictionary"),
    ],
)
def test_wrong_keywords(kwargs, kind, word):
    with pytest.raises(kind) as caught:
        EngineArgs(**kwargs)
    assert word in str(caught.value)


def test_flag_and_keyword_give_the_same_advice(parser, capsys):
    for name, entry in UNSUPPORTED.items():
        value = (not any(entry.harmless)) if entry.boolean else "no-such-value"
        if entry.boolean and len(entry.harmless) == 2:
            continue  # both values are harmless
        with pytest.raises(ValueError) as keyword:
            EngineArgs(**{name: value})
        flag = name.replace("_", "-")
        words = [f"--{flag}" if value is True else f"--no-{flag}"] if entry.boolean else [f"--{flag}", value]
        message = fails(parser, capsys, words)
        assert message.split(": ", 2)[2].strip() == str(keyword.value).split(": ", 1)[1]
        refuse(name, None)


def test_create_engine_config():
    config = EngineArgs("preset:qwen3.5-9b", max_num_seqs=3, hf_overrides={"text_config": {"num_hidden_layers": 4}})
    config = config.create_engine_config(device="cuda")
    assert config.scheduler_config.max_num_seqs == 3
    assert config.hf_config.text.num_hidden_layers == 4
    assert config.model_config.dtype == "bfloat16"
    assert EngineArgs("preset:qwen3.5-9b", device="cpu").create_engine_config().model_config.dtype == "float32"
    with pytest.raises(ValueError, match="--dtype"):
        EngineArgs(dtype="int4").create_engine_config()


def test_the_config_does_not_share_dictionaries_with_the_arguments():
    overrides = {"text_config": {"num_hidden_layers": 4}}
    config = EngineArgs("preset:qwen3.5-9b", hf_overrides=overrides).create_engine_config(device="cpu")
    overrides["text_config"]["num_hidden_layers"] = 8
    assert config.model_config.hf_overrides == {"text_config": {"num_hidden_layers": 4}}
