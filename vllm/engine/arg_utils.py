"""EngineArgs: every knob of `vllm.config`, flat, as keyword arguments and as command-line flags.

Nothing is listed here: a field of a config dataclass that was made with `knob` becomes a field of EngineArgs and a flag.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import difflib
import types
import typing
from typing import Any

from vllm.config import (
    CacheConfig,
    CompilationConfig,
    GDNConfig,
    LoadConfig,
    ModelConfig,
    ObservabilityConfig,
    ParallelConfig,
    SchedulerConfig,
    VllmConfig,
)
from vllm.config.knob import flag, is_knob
from vllm.engine.arg_parser import ArgumentParser, CollectTexts, MergeJson, human_int, json_object, texts
from vllm.engine.unsupported import UNSUPPORTED, Unsupported, refuse

__all__ = ["ArgumentParser", "EngineArgs"]

# Argument of VllmConfig.create -> config dataclass; also the order and the headings of --help.
_CONFIGS = {
    "model_config": ModelConfig,
    "load_config": LoadConfig,
    "cache_config": CacheConfig,
    "scheduler_config": SchedulerConfig,
    "parallel_config": ParallelConfig,
    "gdn_config": GDNConfig,
    "compilation_config": CompilationConfig,
    "observability_config": ObservabilityConfig,
}
_TITLES = {
    "model_config": "model",
    "load_config": "loading",
    "cache_config": "memory",
    "scheduler_config": "scheduling",
    "parallel_config": "device",
    "gdn_config": "Gated DeltaNet",
    "compilation_config": "CUDA graphs",
    "observability_config": "statistics",
}
_KNOBS = {name: [f for f in dataclasses.fields(cls) if is_knob(f)] for name, cls in _CONFIGS.items()}

_HINTS = {
    f.name: hint
    for name, cls in _CONFIGS.items()
    for hints in [typing.get_type_hints(cls)]
    for f in _KNOBS[name]
    for hint in [hints[f.name]]
}


def _as_field(f: dataclasses.Field) -> tuple[str, Any, dataclasses.Field]:
    spec = dataclasses.field(default=f.default, default_factory=f.default_factory, metadata=f.metadata)
    return f.name, f.type, spec


_Fields = dataclasses.make_dataclass("_Fields", [_as_field(f) for knobs in _KNOBS.values() for f in knobs])


class EngineArgs(_Fields):
    """Arguments of an engine, as users give them: unresolved and checked only by name.

    Raises:
        TypeError: an unknown argument, with the nearest known one, or a value of another type than the argument's.
        ValueError: an argument of vLLM's that is not supported here, with what to do instead.
    """

    def __init__(self, model: str | None = None, **kwargs: Any):
        known = {f.name for f in dataclasses.fields(_Fields)}
        for name in [name for name in kwargs if name not in known]:
            if name not in UNSUPPORTED:
                near = difflib.get_close_matches(name, sorted(known), n=1)
                raise TypeError(f"unknown engine argument {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
            value = kwargs.pop(name)
            refuse(name, value, spelled=f"{name}={_brief(value)}")
        if model is not None:
            kwargs["model"] = model
        super().__init__(**kwargs)
        for name, hint in _HINTS.items():
            if not _fits(getattr(self, name), hint):
                raise TypeError(f"{name} must be {_type_name(hint)}; got {getattr(self, name)!r}")

    @classmethod
    def from_kwargs(cls, **kwargs: Any) -> EngineArgs:
        """What `LLM(model, **engine_args)` calls; the same as calling the class."""
        return cls(**kwargs)

    @staticmethod
    def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Add a flag for every knob, one group a config, and the refusals of vLLM's other flags."""
        for name in _CONFIGS:
            group = parser.add_argument_group(_TITLES[name])
            for f in _KNOBS[name]:
                add_flag(group, f, _HINTS[f.name])
        for name, entry in UNSUPPORTED.items():
            _add_refusal(parser, name, entry)
        return parser

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> EngineArgs:
        """Take the knobs out of a parsed namespace; other attributes are left alone.

        A positional `model_tag`, where the command has one, is the model, as --model is.
        """
        values = {f.name: getattr(args, f.name) for f in dataclasses.fields(_Fields) if hasattr(args, f.name)}
        tag = getattr(args, "model_tag", None)
        default = next(f.default for f in dataclasses.fields(_Fields) if f.name == "model")
        names = values.get("served_model_name") or []
        if tag is None and len(names) > 1 and values.get("model", default) == default:
            raise ValueError(f"no model: --served-model-name has taken {' and '.join(names)}; put the model before it")
        if tag is not None:
            if values.get("model", default) not in (default, tag):
                raise ValueError(f"two models: {tag} and --model {values['model']}; give one")
            values["model"] = tag
        return cls(**values)

    def create_engine_config(self, *, device: str | None = None) -> VllmConfig:
        """Check everything and resolve what depends on the model and the device: see `VllmConfig.create`."""
        configs = {
            name: cls(**{f.name: copy.deepcopy(getattr(self, f.name)) for f in _KNOBS[name]})
            for name, cls in _CONFIGS.items()
        }
        return VllmConfig.create(**configs, device=device)


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value has the type of its knob; a whole number is a float too, but True is no number."""
    if value is None:
        return type(None) in typing.get_args(hint)
    kind = _plain_type(hint)
    if kind in (int, float) and isinstance(value, bool):
        return False
    if kind is list and isinstance(value, list):
        return all(isinstance(item, str) for item in value)
    one_will_do = kind is list and str in typing.get_args(hint)
    return isinstance(value, (int, float) if kind is float else str if one_will_do else kind)


def _type_name(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "True or False", str: "a text", dict: "a dictionary"}
    names |= {list: "a list of texts"}
    return names[_plain_type(hint)] + (" or None" if type(None) in typing.get_args(hint) else "")


def _plain_type(hint: Any) -> Any:
    """int | None -> int; dict[str, Any] -> dict; str | list[str] -> list."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        hint = [a for a in typing.get_args(hint) if a is not type(None)][-1]
    return typing.get_origin(hint) or hint


def add_flag(group: Any, f: dataclasses.Field, hint: Any) -> None:
    """Add the flag of one knob, whose type is `hint`, to a parser or to a group of one."""
    kind = _plain_type(hint)
    default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
    names = [name for name in (f.metadata["short"], flag(f.name)) if name]
    text = f.metadata["help"].replace("%", "%%")
    if default not in (None, {}, []) and kind is not bool:
        text += f" [{default}]"
    options: dict[str, Any] = {"dest": f.name, "default": default, "help": text}
    if kind is bool:
        options["help"] += f" [{'yes' if default else 'no'}]"
        group.add_argument(*names, action=argparse.BooleanOptionalAction, **options)
        return
    if kind is dict:
        group.add_argument(*names, action=MergeJson, type=json_object, metavar="JSON", **options)
        return
    if kind is list:
        if f.metadata["many"]:
            options["nargs"] = "+"
        group.add_argument(*names, action=CollectTexts, type=texts, metavar="TEXT", **options)
        return
    choices = f.metadata["choices"]
    if choices is not None:
        choices = [choice for choice in choices if choice is not None]
        options |= {"choices": choices}
    else:
        options |= {"metavar": {int: "N", float: "X"}.get(kind, "TEXT")}
    group.add_argument(*names, type=human_int if kind is int else kind, **options)


def _add_refusal(parser: argparse.ArgumentParser, name: str, entry: Unsupported) -> None:
    names = [n for n in (entry.short, flag(name)) if n]
    shape = {"nargs": 0} if entry.boolean else {"nargs": "?"}
    negative = ["--no-" + flag(name)[2:]] if entry.boolean else []
    parser.add_argument(
        *names,
        *negative,
        action=_Refuse,
        dest=argparse.SUPPRESS,
        default=argparse.SUPPRESS,
        help=argparse.SUPPRESS,
        **shape,
    )


class _Refuse(argparse.Action):
    """A flag of vLLM's: a harmless value passes and leaves no trace; any other is an error with advice."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        long = next(option for option in self.option_strings if option.startswith("--"))
        name = long[2:].replace("-", "_")
        value = (not option_string.startswith("--no-")) if self.nargs == 0 else "" if values is None else values
        try:
            refuse(name, value, spelled=option_string)
        except ValueError as error:
            parser.error(str(error))
