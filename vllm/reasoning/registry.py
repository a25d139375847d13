"""Names of parsers, as given on the command line, and the classes behind them, imported when first asked for."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import ClassVar, TypeVar

Parser = TypeVar("Parser", bound=type)


class ParserManager:
    """A table from name to parser class. Subclasses hold the table and say in messages what it is a table of.

    An entry is a class, or the text "module:Class", which is imported on first use.
    """

    kind: ClassVar[str]
    _known: ClassVar[dict[str, type | str]]

    @classmethod
    def register_module(cls, name: str, parser: Parser | str | None = None) -> Callable[[Parser], Parser] | None:
        """Make `name` mean `parser` (a class, or "module:Class"). Without `parser`, a decorator for the class."""
        if parser is not None:
            cls._known[name] = parser
            return None

        def decorate(decorated: Parser) -> Parser:
            cls._known[name] = decorated
            return decorated

        return decorate

    @classmethod
    def list_registered(cls) -> list[str]:
        """The names that can be asked for, sorted."""
        return sorted(cls._known)

    @classmethod
    def _get(cls, name: str) -> type:
        if name not in cls._known:
            raise ValueError(f"unknown {cls.kind} {name!r}; known: {', '.join(cls.list_registered())}")
        parser = cls._known[name]
        if isinstance(parser, str):
            module, _, attribute = parser.partition(":")
            parser = cls._known[name] = getattr(import_module(module), attribute)
        return parser
