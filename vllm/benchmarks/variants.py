"""What `vllm bench ab` compares: settings of the engine, as a user writes them on one line."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, NoReturn

from vllm.engine.arg_utils import ArgumentParser, EngineArgs

RUN_TIME = {"gdn_in_proj": "in_proj", "gdn_decode": "decode", "gdn_prefill_backend": "prefill"}
"""Engine arguments that change between two steps of one engine -> their names in `LLMEngine.set_gdn_variants`."""

BASE = "base"


@dataclass(frozen=True)
class Variant:
    """One side of a comparison: engine arguments in the place of the command's own, and environment variables."""

    label: str  # "A"
    text: str  # as it was given
    settings: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)

    @property
    def needs_restart(self) -> bool:
        return bool(self.env) or not set(self.settings) <= set(RUN_TIME)

    @property
    def name(self) -> str:
        return f"{self.label}: {self.text}"


def parse_variant(label: str, text: str) -> Variant:
    """`gdn_in_proj=fused,gdn_decode=packed` -> Variant. `base` is the command's flags as they are; NAME=x in capitals is the environment's.

    Raises:
        ValueError: an argument that the engine does not have, or a value that it cannot take.
    """
    settings: dict[str, Any] = {}
    env: dict[str, str] = {}
    if text.strip() != BASE:
        words = []
        for item in _split(text):
            key, equals, value = item.partition("=")
            key = key.strip().removeprefix("--").replace("-", "_")
            if not equals or not key:
                raise ValueError(
                    f"--{label.lower()} {text}: expected name=value, such as gdn_decode=packed, or {BASE}; got {item!r}"
                )
            if key.isupper():
                env[key] = value
            else:
                words.append(_word(key, value))
        settings = _parse(f"--{label.lower()} {text}", words)
    return Variant(label, text.strip(), settings, env)


def given(engine: EngineArgs) -> dict[str, Any]:
    """The arguments that differ from their defaults, and the model."""
    default = EngineArgs()
    values = {f.name: getattr(engine, f.name) for f in dataclasses.fields(engine)}
    return {name: value for name, value in values.items() if name == "model" or value != getattr(default, name)}


def _split(text: str) -> list[str]:
    """At commas, but not at those inside brackets or quotes."""
    items, depth, quoted, start = [], 0, False, 0
    for i, letter in enumerate(text):
        if letter == '"':
            quoted = not quoted
        elif not quoted:
            depth += (letter in "[{") - (letter in "]}")
            if letter == "," and depth == 0:
                items.append(text[start:i])
                start = i + 1
    return [*items, text[start:]]


def _word(key: str, value: str) -> str:
    """The flag that says the same: key=true is --key and key=false is --no-key."""
    name = "--" + key.replace("_", "-")
    if value.lower() in ("true", "false") and "." not in key:
        return name if value.lower() == "true" else "--no-" + name[2:]
    return f"{name}={value}"


class _Parser(ArgumentParser):
    """Errors are exceptions, which name the variant."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _parse(where: str, words: list[str]) -> dict[str, Any]:
    parser = EngineArgs.add_cli_args(_Parser(prog="variant", add_help=False))
    try:
        engine = EngineArgs.from_cli_args(parser.parse_args(words))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    names = [
        word.partition("=")[0].partition(".")[0].removeprefix("--").removeprefix("no-").replace("-", "_")
        for word in words
    ]
    known = {
        f.name for f in dataclasses.fields(EngineArgs)
    }  # a harmless value of a flag that is not here changes nothing
    return {name: getattr(engine, name) for name in names if name in known}


def describe(value: dict[str, Any]) -> str:
    """Settings on one line."""
    return ", ".join(f"{key}={item if isinstance(item, str) else json.dumps(item)}" for key, item in value.items())
