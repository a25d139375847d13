"""The server's own flags. Each is a field of a dataclass, as the engine's are; imports no web library, so that --help is quick."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm import envs
from vllm.config.knob import check_at_least, check_choices, flag, knob
from vllm.engine.arg_utils import EngineArgs, add_flag


@dataclass(frozen=True)
class ListenArgs:
    """Where the server listens, and what it says about that."""

    host: str = knob("127.0.0.1", "Address to listen on; 0.0.0.0 for all of IPv4, :: for all.")
    port: int = knob(8000, "Port to listen on; 0 takes a free one.")
    root_path: str = knob("", "Path under which a reverse proxy offers the server.")
    uvicorn_log_level: str = knob(
        "info",
        "Level of the web server's own messages.",
        choices=("critical", "error", "warning", "info", "debug", "trace"),
    )
    disable_uvicorn_access_log: bool = knob(True, "Do not log a line for each HTTP request.")
    disable_fastapi_docs: bool = knob(False, "Leave out /docs, /redoc and /openapi.json.")
    timeout_keep_alive: int = knob(75, "Seconds after which an idle connection is closed.")
    shutdown_timeout: int = knob(30, "Seconds that running requests get to finish after SIGTERM or Ctrl-C.")


@dataclass(frozen=True)
class AccessArgs:
    """Who may ask, and how much at once."""

    api_key: list[str] = knob([], "Key that /v1 routes ask for; may be repeated. Default: VLLM_API_KEY, else none.")  # noqa: RUF009
    allowed_origins: list[str] = knob(["*"], "Origins that browsers may call from; may be repeated, or a JSON list.")  # noqa: RUF009
    allowed_methods: list[str] = knob(["*"], "Methods that browsers may use; likewise.")  # noqa: RUF009
    allowed_headers: list[str] = knob(["*"], "Headers that browsers may send; likewise.")  # noqa: RUF009
    allow_credentials: bool = knob(False, "Let browsers send credentials.")
    max_body_size: int = knob(16 << 20, "Largest request body in bytes (16M is 16 MiB).")


@dataclass(frozen=True)
class ChatArgs:
    """How conversations become prompts, and outputs become messages."""

    chat_template: str | None = knob(None, "Jinja template, or a file with one; default: the tokenizer's.")
    chat_template_content_format: str = knob(
        "auto",
        "How the template wants messages of several parts: string (joined by newlines) or openai (a list); auto tries it out.",
        choices=("auto", "string", "openai"),
    )
    default_chat_template_kwargs: dict[str, Any] = knob(  # noqa: RUF009
        {}, 'JSON with variables for the template, such as {"enable_thinking": false}; a request may override each.'
    )
    trust_request_chat_template: bool = knob(False, "Let requests bring a template of their own.")
    reasoning_parser: str | None = knob(None, "Separates thinking from answers: qwen3.")
    tool_call_parser: str | None = knob(None, "Reads tool calls: qwen3_coder, qwen3_xml or hermes.")
    enable_auto_tool_choice: bool = knob(False, "Let the model decide whether to call tools; needs --tool-call-parser.")
    exclude_tools_when_tool_choice_none: bool = knob(
        True, 'Leave tools out of the prompt of a request with tool_choice "none".'
    )


@dataclass(frozen=True)
class AnswerArgs:
    """What answers and logs hold beyond the usual."""

    enable_prompt_tokens_details: bool = knob(False, "Report cached prompt tokens in usage.")
    enable_force_include_usage: bool = knob(False, "End every stream with its usage, asked for or not.")
    enable_tokenizer_info_endpoint: bool = knob(False, "Offer /tokenizer_info, which shows the chat template.")
    enable_log_requests: bool = knob(False, "Log a line when a request comes and one when it is done.")


_GROUPS = {"server": ListenArgs, "access": AccessArgs, "chat": ChatArgs, "answers": AnswerArgs}


@dataclass(frozen=True)
class ServerArgs(AnswerArgs, ChatArgs, AccessArgs, ListenArgs):
    """All of them, checked.

    Raises:
        ValueError: one line that names the flag.
        FileNotFoundError: --chat-template names a file that is not there.
    """

    def __post_init__(self) -> None:
        check_choices(self)
        check_at_least(self, port=0, max_body_size=1, timeout_keep_alive=0, shutdown_timeout=0)
        if self.port > 65535:
            raise ValueError(f"--port must be at most 65535; got {self.port}")
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise ValueError(f"--root-path must begin with a slash and not end with one; got {self.root_path!r}")
        if "" in self.api_key:
            raise ValueError("--api-key must not be empty")
        if self.enable_auto_tool_choice and not self.tool_call_parser:
            raise ValueError("--enable-auto-tool-choice needs --tool-call-parser")
        # Names are checked here, before a model is loaded.
        self.reasoning_parser_class()
        self.tool_parser_class()
        self.chat_template_text()

    @property
    def api_keys(self) -> list[str]:
        """Keys from the flag, else the one from the environment."""
        return self.api_key or [key for key in (envs.VLLM_API_KEY,) if key]

    def reasoning_parser_class(self) -> type | None:
        from vllm.reasoning import ReasoningParserManager

        name = self.reasoning_parser
        return _named("reasoning_parser", ReasoningParserManager.get_reasoning_parser, name)

    def tool_parser_class(self) -> type | None:
        from vllm.tool_parsers import ToolParserManager

        return _named("tool_call_parser", ToolParserManager.get_tool_parser, self.tool_call_parser)

    def chat_template_text(self) -> str | None:
        """The template of --chat-template; whatever cannot be the name of a file is one itself."""
        given = self.chat_template
        if given is None or any(char in given for char in "{}\n"):
            return given
        path = Path(given).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"--chat-template {given}: no such file, and no template either")
        try:
            return path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--chat-template {given}: cannot be read as UTF-8: {error}") from None


def _named(name: str, get: Any, value: str | None) -> type | None:
    try:
        return None if value is None else get(value)
    except ValueError as error:
        raise ValueError(f"{flag(name)}: {error}") from None


def add_server_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Everything that `vllm serve` understands: the model, --config, the server's flags and the engine's."""
    parser.add_argument("model_tag", nargs="?", metavar="MODEL", help="the same as --model")
    parser.add_argument(
        "--config", metavar="FILE", help="YAML with flags as keys (max-model-len: 4096); the command line overrides it"
    )
    for title, cls in _GROUPS.items():
        group, hints = parser.add_argument_group(title), typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            add_flag(group, f, hints[f.name])
    EngineArgs.add_cli_args(parser)
    return parser


def server_args(args: argparse.Namespace) -> ServerArgs:
    """The server's part of a parsed command line."""
    return ServerArgs(**{f.name: getattr(args, f.name) for f in dataclasses.fields(ServerArgs)})
