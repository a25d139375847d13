"""What a request asks of the sampler, checked when it is made. Imports no torch: the front end uses it too."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

GREEDY_BELOW = 1e-5
"""Temperatures under this one mean: always the most likely token."""

GENERATION_CONFIG_KEYS = (
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "max_new_tokens",
)
"""What a generation_config.json may say about sampling."""

_INT64 = 1 << 63
_MASK64 = (1 << 64) - 1


class RequestOutputKind(IntEnum):
    """What each RequestOutput of a request holds."""

    CUMULATIVE = 0  # everything so far
    DELTA = 1  # what is new since the last one
    FINAL_ONLY = 2  # one output, when all is done


@dataclass(slots=True)
class StructuredOutputsParams:
    """What form the generated text must have. Exactly one of the first six fields is given; treat an object as constant.

    Args:
        json: a JSON schema, as a dictionary or as text; True allows any JSON value.
        regex: a regular expression that the whole text matches.
        choice: the text is one of these.
        grammar: EBNF in the notation of GBNF; the rule `root` describes the whole text.
        json_object: true: any JSON object.
        structural_tag: a structural tag of xgrammar's, as a dictionary or as text: free text with constrained parts in it.
        disable_any_whitespace: JSON in one line with ", " and ": ", instead of any white space between its parts.
        disable_additional_properties: accepted for vLLM's callers: properties that a schema does not name never appear, unless it
            asks for them with `additionalProperties`.
        begin_after: the constraint holds from the end of this text on, which the model is to generate first: `</think>`.
        begin_at: it also holds from the beginning of this text on, where that comes first: `<tool_call>` inside of the thinking.
    """

    json: str | dict[str, Any] | bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | dict[str, Any] | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    begin_after: str | None = None
    begin_at: str | None = None

    def __post_init__(self) -> None:
        for name, kinds, form in _CONSTRAINTS:
            value = getattr(self, name)
            if value is not None and not isinstance(value, kinds):
                raise ValueError(f"structured_outputs.{name} must be {form}; got {value!r:.80}")
        if self.json is False:
            raise ValueError("structured_outputs.json is false, a schema that nothing satisfies")
        if self.json_object is False:
            self.json_object = None
        given = [name for name, _, _ in _CONSTRAINTS if getattr(self, name) is not None]
        if len(given) != 1:
            names = ", ".join(name for name, _, _ in _CONSTRAINTS)
            raise ValueError(
                f"structured_outputs must have exactly one of {names}; got {' and '.join(given) or 'none'}"
            )
        if self.choice is not None:
            self.choice = list(self.choice)
            if not self.choice or not all(isinstance(text, str) and text for text in self.choice):
                raise ValueError(
                    f"structured_outputs.choice must hold at least one text, and no empty one; got {self.choice!r:.80}"
                )
        for name in ("begin_after", "begin_at"):
            if getattr(self, name) is not None and not (isinstance(getattr(self, name), str) and getattr(self, name)):
                raise ValueError(
                    f"structured_outputs.{name} must be a text that is not empty; got {getattr(self, name)!r:.80}"
                )

    @property
    def kind(self) -> str:
        """The name of the field that is given."""
        return next(name for name, _, _ in _CONSTRAINTS if getattr(self, name) is not None)


_CONSTRAINTS = (
    ("json", (str, dict, bool), "a JSON schema"),
    ("regex", str, "a regular expression"),
    ("choice", (list, tuple), "a list of texts"),
    ("grammar", str, "a grammar in EBNF"),
    ("json_object", bool, "true or false"),
    ("structural_tag", (str, dict), "a structural tag"),
)


@dataclass(slots=True)
class SamplingParams:
    """How to choose the next tokens, when to stop, and what to report.

    Args:
        n: sequences generated for the prompt; above 1 it needs a temperature above 0.
        presence_penalty: subtracted from the logit of each token already generated; -2 to 2.
        frequency_penalty: subtracted once for each time the token was generated; -2 to 2.
        repetition_penalty: divides positive and multiplies negative logits of tokens in the prompt or the output; above 0.
        temperature: divides the logits; 0 takes the most likely token.
        top_p: keep the most likely tokens that together reach this probability; above 0, at most 1.
        top_k: keep the k most likely tokens (and what ties with the last of them); 0 or -1 keeps all.
        min_p: drop tokens less likely than this share of the most likely one; 0 to 1.
        seed: the same seed gives the same text whatever else runs; None or -1 lets the engine draw one.
        stop: strings that end the text where they appear.
        stop_token_ids: tokens that end the sequence.
        ignore_eos: go on after the model's end-of-sequence tokens.
        max_tokens: most tokens generated; None means as many as the context holds.
        min_tokens: tokens generated before anything may end the sequence.
        logprobs: report the chosen token and this many of the likeliest at each position; -1 is all, None is none.
        prompt_logprobs: the same for the prompt's tokens.
        detokenize: produce text; without it only token ids come back, and stop strings cannot be used.
        skip_special_tokens: leave special tokens out of the text.
        spaces_between_special_tokens: accepted for vLLM's callers; byte-level tokenizers never add spaces of their own.
        include_stop_str_in_output: leave the stop string (or stop token's text) that ended it at the end of the text.
        output_kind: what each RequestOutput holds.
        logit_bias: added to the logits of these token ids; values beyond -100 or 100 are cut to that.
        allowed_token_ids: only these may be generated.
        bad_words: words whose last token is never generated where it would complete them.
        bad_words_token_ids: `bad_words` as token ids; the input processor fills it in.
        structured_outputs: the form that the text must have. It wins over everything above: where `allowed_token_ids`, `bad_words`,
            `logit_bias` or `min_tokens` leave no token that fits it, they are passed over for that token; and the text ends when its
            form is complete, also with `ignore_eos`. `max_tokens` and the stops can end it before.
        thinking_token_budget: tokens that the text may think, not counting a prompt's own; then its thinking is ended. It is a
            matter of the chat format, so the engine's caller has to know a reasoning parser. None or -1: as long as it likes.
        thinking_token_ids: what begins thinking, what ends it, and what else does; whoever knows the parser fills it in.
        extra_args: carried along, read by nothing here.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    bad_words_token_ids: list[list[int]] | None = field(default=None, repr=False)
    structured_outputs: StructuredOutputsParams | None = None
    thinking_token_budget: int | None = None
    thinking_token_ids: list[int] | None = field(default=None, repr=False)
    extra_args: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in ("presence_penalty", "frequency_penalty"):
            setattr(self, name, _number(name, getattr(self, name), -2.0, 2.0))
        self.repetition_penalty = _number("repetition_penalty", self.repetition_penalty, 0.0, math.inf, above=True)
        self.temperature = _number("temperature", self.temperature, 0.0, math.inf)
        self.top_p = _number("top_p", self.top_p, 0.0, 1.0, above=True)
        self.min_p = _number("min_p", self.min_p, 0.0, 1.0)

        _integer("n", self.n, 1)
        if self.n > 1 and self.greedy:
            raise ValueError(f"n must be 1 when temperature is 0, because all {self.n} sequences would be equal")
        self.top_k = max(0, _integer("top_k", self.top_k, -1))
        if self.seed == -1:
            self.seed = None
        if self.seed is not None:
            _integer("seed", self.seed, -_INT64, _INT64 - 1)

        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1)
        _integer("min_tokens", self.min_tokens, 0)
        if self.thinking_token_budget == -1:
            self.thinking_token_budget = None
        if self.thinking_token_budget is not None:
            _integer("thinking_token_budget", self.thinking_token_budget, 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens must be at most max_tokens ({self.max_tokens}); got {self.min_tokens}")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), -1)

        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false; got {getattr(self, name)!r}")
        try:
            self.output_kind = RequestOutputKind(self.output_kind)
        except ValueError:
            raise ValueError(f"output_kind must be a RequestOutputKind; got {self.output_kind!r}") from None

        self.stop = _strings("stop", self.stop)
        self.bad_words = _strings("bad_words", self.bad_words)
        if self.stop and not self.detokenize:
            raise ValueError(f"stop needs detokenize, which is off; got {self.stop!r}")
        self.stop_token_ids = _token_ids("stop_token_ids", self.stop_token_ids) or []
        self.allowed_token_ids = _token_ids("allowed_token_ids", self.allowed_token_ids)
        if self.allowed_token_ids == []:
            raise ValueError("allowed_token_ids must hold at least one token; got []")
        self.logit_bias = _bias(self.logit_bias)
        if isinstance(self.structured_outputs, Mapping):
            try:
                self.structured_outputs = StructuredOutputsParams(**self.structured_outputs)
            except TypeError:
                raise ValueError(
                    f"structured_outputs has a field that is not known: {self.structured_outputs!r:.80}"
                ) from None
        if not isinstance(self.structured_outputs, StructuredOutputsParams | None):
            raise ValueError(
                f"structured_outputs must be a StructuredOutputsParams; got {self.structured_outputs!r:.80}"
            )
        if self.extra_args is not None and not isinstance(self.extra_args, dict):
            raise ValueError(f"extra_args must be a dictionary; got {self.extra_args!r}")

    @property
    def greedy(self) -> bool:
        """Whether each token is simply the most likely one."""
        return self.temperature < GREEDY_BELOW

    @property
    def has_penalties(self) -> bool:
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0.0, 0.0, 1.0)

    def clone(self, **changes: Any) -> SamplingParams:
        """A copy that shares no list or dictionary with this one, with `changes` applied and checked."""
        values = {f.name: _copied(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return SamplingParams(**{**values, **changes})

    @classmethod
    def from_defaults(cls, defaults: Mapping[str, Any], **changes: Any) -> SamplingParams:
        """Parameters from the contents of a generation_config.json; keys that are not about sampling are passed over."""
        values = {name: defaults[name] for name in GENERATION_CONFIG_KEYS if defaults.get(name) is not None}
        if "max_new_tokens" in values:
            values["max_tokens"] = values.pop("max_new_tokens")
        return cls(**{**values, **changes})


def mix_seed(seed: int, index: int) -> int:
    """The seed of child `index` of a request with `seed`: 63 bits, not negative. Child 0 keeps the seed itself."""
    if index == 0:
        return seed
    z = (seed + index * 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return (z ^ (z >> 31)) >> 1


_FLAGS = (
    "ignore_eos",
    "detokenize",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
)


def _copied(value: Any) -> Any:
    if isinstance(value, list):
        return [_copied(item) for item in value]
    return dict(value) if isinstance(value, dict) else value


def _number(name: str, value: Any, low: float, high: float, *, above: bool = False) -> float:
    """`value` as a float within [low, high], or (low, high] with `above`; an infinite bound only means: finite."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    try:
        number = float(value) if is_number else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or number > high or number < low or (above and number == low):
        bounds = f"above {low:g}" if above else f"at least {low:g}"
        if high != math.inf:
            bounds += f" and at most {high:g}"
        raise ValueError(f"{name} must be a finite number {bounds}; got {value!r}")
    return number


def _integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """`value` where it is a whole number within [low, high]; True and False are not numbers here."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        bounds = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} must be a whole number {bounds}; got {value!r}")
    return value


def _strings(name: str, value: Any) -> list[str]:
    if value is None:
        return []
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, (list, tuple, set)) or not all(isinstance(text, str) for text in values):
        raise ValueError(f"{name} must be a list of strings; got {value!r}")
    if "" in values:
        raise ValueError(f"{name} must not hold an empty string; got {value!r}")
    return list(values)


def _token_ids(name: str, value: Any) -> list[int] | None:
    if value is None:
        return None
    if not isinstance(value, (list, tuple, set, frozenset)):
        raise ValueError(f"{name} must be a list of token ids; got {value!r}")
    for token in value:
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise ValueError(f"{name} must hold token ids of at least 0; got {token!r}")
    return list(value)


def _bias(value: Any) -> dict[int, float] | None:
    """Keys may be digits in a string, as JSON has them."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise ValueError(f"logit_bias must map token ids to numbers; got {value!r}")
    bias: dict[int, float] = {}
    for key, amount in value.items():
        token = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() else key
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise ValueError(f"logit_bias must have token ids of at least 0 as keys; got {key!r}")
        is_number = isinstance(amount, (int, float)) and not isinstance(amount, bool)
        if not is_number or math.isnan(amount) or math.isinf(amount):
            raise ValueError(f"logit_bias must have finite numbers as values; got {amount!r} for token {token}")
        bias[token] = min(100.0, max(-100.0, float(amount) if abs(amount) < 1e9 else math.copysign(100.0, amount)))
    return bias
