"""One normal form of every constraint: what is compiled, what caches are keyed by."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any

from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.structured_output.schema import dump_json, one_line, parse_json, prepare_schema

LONGEST = 1 << 17
"""Characters of a constraint: a schema, a regular expression, a grammar, or all choices together."""

_ANY_OBJECT = '{"type":"object","additionalProperties":true}'


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """What the compiler is given.

    Args:
        kind: "json", "regex", "choice", "grammar" or "structural_tag".
        text: the schema, expression, grammar or tag; for choices a JSON list.
        any_whitespace: for JSON.
        after_newlines: up to two newlines may come first: the model's habit between its thinking and its answer.
    """

    kind: str
    text: str
    any_whitespace: bool = True
    after_newlines: bool = False

    @property
    def digest(self) -> bytes:
        """Short, and different for different specs."""
        flags = f"{self.kind} {self.any_whitespace} {self.after_newlines} "
        return hashlib.sha256((flags + self.text).encode("utf-8", "surrogatepass")).digest()


def spec_of(params: StructuredOutputsParams) -> GrammarSpec:
    """The normal form of a request's parameters.

    Raises:
        ValueError: one line: too long, too deep, not JSON, or a schema with a keyword that would not be honoured.
    """
    kind, text = _kind_and_text(params)
    if len(text) > LONGEST:
        raise ValueError(
            f"structured_outputs.{params.kind} has {len(text)} characters; at most {LONGEST} are supported"
        )
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise ValueError(f"structured_outputs.{params.kind} holds half of a surrogate pair")
    if "\0" in text:
        raise ValueError(f"structured_outputs.{params.kind} holds a NUL character")
    return GrammarSpec(kind, text, not params.disable_any_whitespace, params.begin_after is not None)


def _kind_and_text(params: StructuredOutputsParams) -> tuple[str, str]:
    name = f"structured_outputs.{params.kind}"
    given = getattr(params, params.kind)
    if isinstance(given, str) and len(given) > LONGEST:
        return params.kind, given  # too long; nothing else needs to be known of it
    if params.kind == "json":
        schema = parse_json(name, given) if isinstance(given, str) else given
        return "json", dump_json(name, prepare_schema(schema))
    if params.kind == "json_object":
        return "json", _ANY_OBJECT
    if params.kind == "choice":
        return "choice", dump_json(name, given)
    if params.kind == "structural_tag":
        tag = parse_json(name, given) if isinstance(given, str) else given
        return "structural_tag", dump_json(name, _prepared_tag(tag, name))
    return params.kind, given


def _prepared_tag(tag: Any, name: str) -> dict[str, Any]:
    """A structural tag in its present form, with the schemas in it prepared."""
    dump_json(name, tag)  # its depth, before anything walks it
    if not isinstance(tag, dict):
        raise ValueError(f"{name} must be an object; got {tag!r:.80}")
    if "structures" in tag:  # the form it had first
        try:
            tags = [
                {
                    "type": "tag",
                    "begin": item["begin"],
                    "content": {"type": "json_schema", "json_schema": item.get("schema", True)},
                    "end": item["end"],
                }
                for item in tag["structures"]
            ]
            tag = {"format": {"type": "triggered_tags", "triggers": tag["triggers"], "tags": tags}}
        except (TypeError, KeyError, AttributeError):
            raise ValueError(f"{name} must have structures, each with begin, schema and end, and triggers") from None
    if not isinstance(tag.get("format"), dict):
        raise ValueError(f"{name} must have a format")
    return {"type": "structural_tag", "format": _prepared_format(tag["format"])}


def _prepared_format(value: Any) -> Any:
    if isinstance(value, list):
        return [_prepared_format(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.get("type") == "json_schema" and "json_schema" in value:
        return {**value, "json_schema": prepare_schema(value["json_schema"])}
    return {key: _prepared_format(item) for key, item in value.items()}


class Vocabulary:
    """What the compiler must know of a tokenizer.

    Args:
        tokens: bytes of each token id, as many as the model has logits; none for ids that no constrained text may hold: special
            tokens, which are not text, and ids beyond the tokenizer's.
        stop_token_ids: the tokens that end a text.
    """

    def __init__(self, tokens: list[bytes], stop_token_ids: list[int]) -> None:
        self.tokens = tokens
        self.stop_token_ids = stop_token_ids

    def __len__(self) -> int:
        return len(self.tokens)


class Compiler:
    """xgrammar's compiler for one vocabulary. May be used from several threads, which it does not hold up: it runs without the
    interpreter's lock.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        import xgrammar

        self._xgrammar = xgrammar
        self._info = xgrammar.TokenizerInfo(
            vocabulary.tokens,
            vocab_type=xgrammar.VocabType.RAW,
            vocab_size=len(vocabulary),
            stop_token_ids=vocabulary.stop_token_ids,
        )
        self._compiler = xgrammar.GrammarCompiler(self._info, max_threads=1, cache_enabled=False)

    def compile(self, spec: GrammarSpec) -> Any:
        """xgrammar's CompiledGrammar. Raises ValueError, in one line, for what it cannot compile."""
        try:
            grammar = self._grammar(spec)
            if spec.after_newlines:
                newlines = self._xgrammar.Grammar.from_regex(r"\n{0,2}")
                grammar = self._xgrammar.Grammar.concat(newlines, grammar)
            return self._compiler.compile_grammar(grammar)
        except (RuntimeError, ValueError, TypeError) as error:
            raise ValueError(
                f"structured_outputs: the {_NAMES[spec.kind]} cannot be compiled: {one_line(error)}"
            ) from None

    def matcher(self, compiled: Any) -> Any:
        """A new state of a compiled grammar, at its beginning."""
        return self._xgrammar.GrammarMatcher(compiled)

    def _grammar(self, spec: GrammarSpec) -> Any:
        grammar = self._xgrammar.Grammar
        if spec.kind == "json":
            return self._bounded(grammar.from_json_schema(spec.text, any_whitespace=spec.any_whitespace))
        if spec.kind == "regex":
            return grammar.from_regex(spec.text)
        if spec.kind == "choice":
            return grammar.from_ebnf("root ::= " + " | ".join(map(_literal, parse_json("choice", spec.text))))
        if spec.kind == "structural_tag":
            return self._bounded(grammar.from_structural_tag(spec.text))
        return grammar.from_ebnf(spec.text)

    def _bounded(self, grammar: Any) -> Any:
        """The same with exponents of at most two digits: readers of JSON turn larger numbers into infinities, or refuse them."""
        text = str(grammar)
        bounded = _EXPONENT.sub(r"([eE] \1 \2{1, 2})", text)
        return grammar if bounded == text else self._xgrammar.Grammar.from_ebnf(bounded)


# As xgrammar prints the rules of its JSON numbers.
_EXPONENT = re.compile(r"\(\[eE\] (\S+) (\S+)\{1, -1\}\)")

_NAMES = {
    "json": "JSON schema",
    "regex": "regular expression",
    "choice": "choice",
    "grammar": "grammar",
    "structural_tag": "structural tag",
}


def _literal(text: str) -> str:
    """A text as EBNF spells it: what is not plain ASCII as escapes."""
    return (
        '"'
        + "".join(char if char.isascii() and (char.isalnum() or char in " _-.,:;") else _escape(char) for char in text)
        + '"'
    )


def _escape(char: str) -> str:
    code = ord(char)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
