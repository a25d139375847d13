"""argparse as this program uses it: one-line errors, suggestions, --under_scores, dotted keys for JSON flags, 32K for 32768."""

from __future__ import annotations

import argparse
import difflib
import itertools
import json
import re
import sys
from typing import Any, NoReturn

from vllm.config.hf_config import merge

_SUFFIX = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def human_int(text: str) -> int:
    """An integer: 4096, 4k (4000), 4K (4096), 1.5G (of 2**30)."""
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?)([kmgKMG]?)", text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"expected a whole number, such as 4096, 4k (4000) or 4K (4096); got {text!r}")
    number, unit = match.groups()
    value = float(number) * _SUFFIX[unit] if "." in number else int(number) * _SUFFIX[unit]
    if value != int(value):
        raise argparse.ArgumentTypeError(f"expected a whole number; got {text!r}")
    return int(value)


def json_object(text: str) -> dict[str, Any]:
    """A JSON object."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"expected a JSON object; {error} in {text!r}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'expected a JSON object such as {{"key": 1}}; got {text!r}')
    return value


def texts(text: str) -> list[str]:
    """A JSON list of strings, or one string as it is."""
    value = _value(text)
    return value if isinstance(value, list) and all(isinstance(item, str) for item in value) else [text]


class CollectTexts(argparse.Action):
    """Several uses of a flag add up, and so do several values of one; the first use replaces the default."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        given = getattr(namespace, self.dest, None)
        lists = [values] if self.nargs is None else values
        setattr(namespace, self.dest, [*([] if given is self.default else given), *itertools.chain(*lists)])


class MergeJson(argparse.Action):
    """Several uses of a JSON flag, dotted keys among them, build one object; the later value wins."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        given = getattr(namespace, self.dest, None) or {}
        setattr(namespace, self.dest, merge(given, values))


class ArgumentParser(argparse.ArgumentParser):
    """For one subcommand. Errors are one line on stderr and exit code 2."""

    def __init__(self, *args: Any, **kwargs: Any):
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:
        return super().parse_known_args(self.normalise(sys.argv[1:] if args is None else list(args)), namespace)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error("unrecognized arguments: " + ", ".join(word + self._suggestion(word) for word in unknown))
        return found

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")

    def normalise(self, args: list[str]) -> list[str]:
        """--max_model_len becomes --max-model-len, and --flag.a.b 4 becomes --flag={"a": {"b": 4}}."""
        done: list[str] = []
        rest = iter(args)
        for word in rest:
            if word == "--":
                return [*done, word, *rest]
            match = re.fullmatch(r"(-{1,2}[A-Za-z][\w-]*)((?:\.[^=]+)?)(=.*)?", word, re.DOTALL)
            if match is None:
                done.append(word)
                continue
            name, path, value = match[1], match[2], match[3]
            if name.startswith("--"):
                name = name.replace("_", "-")
            if re.fullmatch(r"-O\d", name):
                name, value = "-O", f"={name[2:]}"
            if not path:
                done += [name, value[1:]] if name == "-O" and value else [name + (value or "")]
                continue
            text = value[1:] if value is not None else next(rest, None)
            if text is None:
                self.error(f"argument {name}{path}: expected a value")
            done.append(f"{self._long(name)}={json.dumps(_nest(path[1:].split('.'), _value(text)))}")
        return done

    def _long(self, name: str) -> str:
        """-cc -> --compilation-config: only the long form takes a value after "="."""
        action = self._option_string_actions.get(name)
        return action.option_strings[-1] if action else name

    def _suggestion(self, word: str) -> str:
        if not word.startswith("-"):
            return ""
        shown = {
            option for action in self._actions if action.help != argparse.SUPPRESS for option in action.option_strings
        }
        near = difflib.get_close_matches(word.split("=")[0], sorted(shown), n=1, cutoff=0.6)
        return f" (did you mean {near[0]}?)" if near else ""


def _value(text: str) -> Any:
    """JSON where it is JSON, else the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _nest(path: list[str], value: Any) -> Any:
    for key in reversed(path):
        value = {key: value}
    return value
