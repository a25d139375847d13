import dataclasses

import pytest

from tests.structure.test_loaded_modules import HEAVY, LATER, WEB, loaded
from vllm.config.knob import is_knob
from vllm.engine.arg_parser import ArgumentParser
from vllm.engine.arg_utils import EngineArgs
from vllm.engine.unsupported import UNSUPPORTED
from vllm.entrypoints.cli.config_file import with_config_file
from vllm.entrypoints.openai.cli_args import ServerArgs, add_server_args, server_args


def parse(*words):
    return server_args(add_server_args(ArgumentParser(prog="test")).parse_args([str(word) for word in words]))


def test_every_field_is_a_flag_with_its_default():
    assert parse() == ServerArgs()
    actions = {option for action in add_server_args(ArgumentParser())._actions for option in action.option_strings}
    for f in dataclasses.fields(ServerArgs):
        assert is_knob(f) and "--" + f.name.replace("_", "-") in actions and f.metadata["help"].endswith((".", ".)"))
    names = {f.name for f in dataclasses.fields(ServerArgs)}
    assert not names & set(UNSUPPORTED) and not names & {f.name for f in dataclasses.fields(EngineArgs)}


def test_values():
    args = parse(
        *(
            "--host",
            "::",
            "--port=0",
            "--api-key",
            "a",
            "--api-key",
            "b",
            "--allowed-origins",
            '["http://x", "http://y"]',
        ),
        *("--default-chat-template-kwargs", '{"enable_thinking": false}', "--default-chat-template-kwargs.a.b", "2"),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--no-disable-uvicorn-access-log"),
        *("--max_body_size", "1M", "--allowed-methods", "GET"),
    )
    assert (args.host, args.port, args.api_key) == ("::", 0, ["a", "b"])
    assert args.allowed_origins == ["http://x", "http://y"] and args.allowed_methods == ["GET"]
    assert args.default_chat_template_kwargs == {"enable_thinking": False, "a": {"b": 2}}
    assert args.max_body_size == 1 << 20 and not args.disable_uvicorn_access_log


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"port": -1}, "--port"),
        ({"port": 65536}, "--port"),
        ({"root_path": "x"}, "--root-path"),
        ({"root_path": "/x/"}, "--root-path"),
        ({"api_key": [""]}, "--api-key"),
        ({"shutdown_timeout": -1}, "--shutdown-timeout"),
        ({"uvicorn_log_level": "loud"}, "--uvicorn-log-level"),
        ({"reasoning_parser": "x"}, "--reasoning-parser"),
        ({"tool_call_parser": "x"}, "--tool-call-parser"),
    ],
)
def test_impossible_values(args, message):
    with pytest.raises(ValueError, match=message):
        ServerArgs(**args)


def test_a_file_of_flags(tmp_path):
    file = tmp_path / "flags.yaml"
    file.write_text(
        "port: 9000\napi_key: [a, b]\nenable-auto-tool-choice: true\ntool-call-parser: hermes\nhost: null\n"
        "disable-uvicorn-access-log: false\ndefault-chat-template-kwargs:\n  enable_thinking: false\n"
    )
    for words in (["--config", str(file)], [f"--config={file}"]):
        args = parse(*with_config_file([*words, "--port", "9001"]))
        assert (args.port, args.api_key, args.tool_call_parser) == (9001, ["a", "b"], "hermes")
        assert args.default_chat_template_kwargs == {"enable_thinking": False} and not args.disable_uvicorn_access_log
    assert with_config_file(["MODEL"]) == ["MODEL"]


@pytest.mark.parametrize("text", ["- a", "a: [", "config: x", "5: 6", "\xff"])
def test_a_file_of_something_else(tmp_path, text):
    file = tmp_path / "flags.yaml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="--config"):
        with_config_file(["--config", str(file)])
    with pytest.raises(FileNotFoundError):
        with_config_file(["--config", "nowhere"])


def test_flags_need_no_web_library():
    names = loaded("import vllm.entrypoints.cli.serve")
    assert not names & (WEB | LATER | HEAVY - {"numpy"}), names
