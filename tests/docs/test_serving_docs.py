"""docs/serving.md against the program: commands parse, numbers are computed again, names exist."""

import configparser
import json
import re
import shlex

import pytest
import yaml

from vllm import envs
from vllm.engine.arg_parser import ArgumentParser
from vllm.engine.arg_utils import EngineArgs
from vllm.engine.unsupported import UNSUPPORTED
from vllm.entrypoints.cli import config_file, plan
from vllm.entrypoints.cli.main import COMMANDS, main
from vllm.entrypoints.openai.cli_args import ServerArgs, add_server_args, server_args
from vllm.entrypoints.openai.protocol.chat import ChatCompletionRequest
from vllm.entrypoints.openai.protocol.completion import CompletionRequest
from vllm.v1.metrics.engine_metrics import EngineMetrics

from tests.structure.tree import ROOT  # isort: skip

PAGE = (ROOT / "docs" / "serving.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.M | re.S)
PROSE = re.sub(r"^```.*?^```$", "", PAGE, flags=re.M | re.S)


def blocks(language: str) -> list[str]:
    return [text for name, text in BLOCKS if name == language]


def command_lines(text: str) -> list[list[str]]:
    """The commands of a shell block, as words; a backslash goes on."""
    joined = text.replace("\\\n", " ")
    return [shlex.split(line) for line in joined.splitlines() if line.strip() and not line.startswith("#")]


def serve_parser() -> ArgumentParser:
    return add_server_args(ArgumentParser(prog="vllm serve", exit_on_error=False))


def plan_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="vllm plan")
    plan.add_arguments(parser)
    return parser


def check_command(words: list[str]) -> tuple[ServerArgs, EngineArgs]:
    """A `vllm serve` command line, up to where the model would be loaded."""
    assert words[:2] == ["vllm", "serve"], words
    args = serve_parser().parse_args(words[2:])
    return server_args(args), EngineArgs.from_cli_args(args)


def systemd_words(line: str) -> list[str]:
    """ExecStart as systemd splits it: quotes as in a shell, %% is one per cent sign, $$ one dollar sign."""
    assert not re.search(r"(?<!%)%(?!%)|(?<!\$)\$(?!\$)", re.sub(r"%%|\$\$", "", line)), "a bare % or $"
    return [word.replace("%%", "%").replace("$$", "$") for word in shlex.split(line)]


SHELL = [words for text in blocks("bash") for words in command_lines(text)]
PLANS = [(lines[0].removeprefix("$ "), lines[1:]) for text in blocks("console") if (lines := text.strip().splitlines())]


def test_there_is_something_to_test():
    assert len(BLOCKS) == PAGE.count("```") / 2 and {name for name, _ in BLOCKS} == {
        *("bash", "console", "yaml", "ini", "nginx", "caddyfile")
    }
    assert len(SHELL) >= 6 and len(PLANS) >= 5


@pytest.mark.parametrize("words", SHELL, ids=lambda words: " ".join(words)[:60])
def test_a_command(words):
    if words[0] == "curl":
        body = json.loads(words[words.index("-d") + 1])
        model = ChatCompletionRequest if "chat" in words[1] else CompletionRequest
        assert model.model_validate(body) and "http://127.0.0.1:8000/v1/" in words[1]
        return
    if "--config" in words:
        assert words == ["vllm", "serve", "--config", "/etc/vllm/serve.yaml"]
        return
    server, engine = check_command(words)
    assert server.reasoning_parser == "qwen3" and engine.model


@pytest.mark.parametrize(("command", "lines"), PLANS, ids=lambda value: value if isinstance(value, str) else "")
def test_quoted_numbers(command, lines, capsys):
    words = shlex.split(command)
    assert words[:2] == ["vllm", "plan"] and main(words[1:]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert lines and [line for line in lines if line not in printed] == []


def test_recipes_are_what_was_planned():
    """Every plan that fits is followed by a server with the same limits."""
    served = [check_command(words)[1] for words in SHELL if "--max-num-seqs" in words]
    planned = [
        EngineArgs.from_cli_args(plan_parser().parse_args(shlex.split(command)[2:]))
        for command, _ in PLANS
        if "--max-num-seqs" in command
    ]
    limits = [[(e.max_num_seqs, e.max_model_len) for e in engines] for engines in (served, planned)]
    assert limits[0] == limits[1] and len(served) == 4


def test_the_file_of_flags(tmp_path):
    (text,) = (text for text in blocks("yaml") if "/etc/vllm/serve.yaml" in text)
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    words = config_file.with_config_file(["--config", str(path)])
    server, engine = check_command(["vllm", "serve", *words])
    assert server.default_chat_template_kwargs == {"enable_thinking": False} and engine.max_model_len == 65536


def test_the_systemd_unit():
    (text,) = blocks("ini")
    parser = configparser.RawConfigParser(strict=True, comment_prefixes="#", delimiters="=")
    parser.optionxform = str
    parser.read_string(text.replace("\\\n", " "))
    assert parser.sections() == ["Unit", "Service", "Install"]
    service = parser["Service"]
    words = systemd_words(service["ExecStart"])
    assert words[0].endswith("/bin/vllm")
    server, _ = check_command(["vllm", *words[1:]])
    assert server.default_chat_template_kwargs == {"enable_thinking": False}
    assert int(service["TimeoutStopSec"]) > server.shutdown_timeout and service["KillMode"] == "mixed"


@pytest.mark.parametrize(
    ("line", "words"), [('a \'{"b": "50%%"}\'', ["a", '{"b": "50%"}']), ("a $$x", ["a", "$x"]), ("a $x", None)]
)
def test_systemd_s_quoting(line, words):
    if words is None:
        with pytest.raises(AssertionError):
            systemd_words(line)
    else:
        assert systemd_words(line) == words


def test_the_compose_file():
    (text,) = (text for text in blocks("yaml") if "services:" in text)
    compose = yaml.safe_load(text)
    services = compose["services"]
    vllm = services["vllm"]
    server, _ = check_command(vllm["command"])
    assert server.host == "0.0.0.0" and server.default_chat_template_kwargs == {"enable_thinking": False}
    kind, python, dash_c, probe = vllm["healthcheck"]["test"]
    assert (kind, python, dash_c) == ("CMD", "python3", "-c") and f":{server.port}/health" in probe
    compile(probe, "healthcheck", "exec")
    assert int(vllm["stop_grace_period"].removesuffix("s")) > server.shutdown_timeout
    chat = services["chat"]
    assert chat["environment"]["OPENAI_API_BASE_URL"] == f"http://vllm:{server.port}/v1"
    assert chat["depends_on"] == {"vllm": {"condition": "service_healthy"}}
    used = {volume.partition(":")[0] for volume in chat["volumes"]}
    assert used == compose["volumes"].keys()


def test_the_scrape_configuration():
    (text,) = (text for text in blocks("yaml") if "scrape_configs" in text)
    (job,) = yaml.safe_load(text)["scrape_configs"]
    assert job["metrics_path"] == "/metrics" and job["static_configs"] == [{"targets": ["127.0.0.1:8000"]}]


@pytest.mark.parametrize("language", ["nginx", "caddyfile"])
def test_the_proxies_guard_only_what_has_keys(language):
    (text,) = blocks(language)
    assert text.count("{") == text.count("}")
    assert re.findall(r"^\s*(?:location|handle) (\S+)", text, re.M) == [f"/llm/v1/{'*' * (language == 'caddyfile')}"]
    assert "127.0.0.1:8000" in text and "16m" in text.lower()


def test_every_flag_exists():
    """In prose and tables too."""
    refused = {"--" + name.replace("_", "-") for name in UNSUPPORTED}
    known = {option for parser in (serve_parser(), plan_parser()) for option in parser._option_string_actions} - refused
    usable, _, about_refusal = PROSE.partition("## What is refused")
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", " ".join(re.findall(r"`([^`\n]+)`", usable))))
    assert len(named) > 10 and named <= known, named - known
    assert set(re.findall(r"`(--[a-z-]+)`", about_refusal)) <= refused
    assert {name.split()[1] for name in re.findall(r"`(vllm [a-z-]+)", PROSE)} <= COMMANDS.keys()


def test_refused_flags_and_fields_are_refused():
    about_refusal = PROSE[PROSE.index("## What is refused") :]
    flags, _, fields = about_refusal.partition("| field")
    for flag in re.findall(r"`(--[a-z-]+)`", "".join(re.findall(r"^\| (.*?) \|", flags, re.M))):
        name = flag.removeprefix("--").replace("-", "_")
        assert name in UNSUPPORTED and not UNSUPPORTED[name].advice.startswith("see"), flag
    for field in re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (.*?) \|", fields, re.M))):
        assert field in CompletionRequest.refused, field


def test_every_variable_is_read():
    named = set(re.findall(r"\bVLLM_\w+", PAGE))
    assert named and named <= envs.VARIABLES.keys()


def test_every_metric_is_there():
    config = EngineArgs(model="preset:tiny", load_format="dummy").create_engine_config(device="cpu")
    text = EngineMetrics(config).render().decode()
    named = set(re.findall(r"vllm:[a-z]\w+", PAGE))
    assert len(named) > 5 and [name for name in named if f"\n{name}" not in text] == []


def test_defaults_are_as_told():
    server, engine = check_command(["vllm", "serve", "m"])
    assert (engine.max_num_queued_requests, engine.max_num_seqs) == (4096, 256)
    assert (server.shutdown_timeout, server.timeout_keep_alive, server.max_body_size) == (30, 75, 16 << 20)
    assert (server.host, server.port, server.api_keys) == ("127.0.0.1", 8000, [])
