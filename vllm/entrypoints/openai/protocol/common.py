"""Fields that chat and completions share, and how they become SamplingParams."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from vllm.sampling_params import RequestOutputKind

MOST_SEQUENCES = 1024
"""Sequences that one HTTP request may ask for: its prompts times `n`."""

MOST_ENTRIES = 1 << 20
"""Tokens that the lists of a request may name, counted once for each sequence: every sequence gets its own copy."""

ShortText = Annotated[str, Field(max_length=1000)]

_NO_MEDIA = "this server takes text and gives text"
_BY_STRUCTURED = "use structured_outputs"
REFUSED = {
    "best_of": "send n, and choose on your side",
    "use_beam_search": "beam search is not supported",
    "length_penalty": "beam search is not supported",
    "guided_json": _BY_STRUCTURED,
    "guided_regex": _BY_STRUCTURED,
    "guided_choice": _BY_STRUCTURED,
    "guided_grammar": _BY_STRUCTURED,
    "truncate_prompt_tokens": "shorten the prompt on your side",
    "logits_processors": "use logit_bias, bad_words or allowed_token_ids",
    "prompt_embeds": "prompts are text or token ids",
    "mm_processor_kwargs": _NO_MEDIA,
    "functions": "use tools",
    "function_call": "use tool_choice",
    "audio": _NO_MEDIA,
    "web_search_options": "offer a search tool in tools",
    "documents": "put them into the messages",
}
"""Fields that would change the answer if they were honoured, and what to do instead. Values that ask for nothing pass."""


class Strict(BaseModel):
    """Values have the types that JSON gives them; fields that nobody here knows are passed over, as OpenAI's clients expect."""

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=(), allow_inf_nan=False)


class StreamOptions(Strict):
    include_usage: bool | None = Field(None, description="End the stream with a chunk that holds the usage.")
    continuous_usage_stats: bool | None = Field(None, description="Put the usage so far into every chunk.")


class JsonSchema(Strict):
    name: str
    json_schema: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchema | None = None
    structures: list[Any] | None = None
    triggers: list[str] | None = None
    format: Any = None

    @model_validator(mode="after")
    def _complete(self) -> ResponseFormat:
        if self.type == "json_schema" and (self.json_schema is None or self.json_schema.json_schema is None):
            raise ValueError("response_format of type json_schema needs json_schema.schema")
        return self


class StructuredOutputs(Strict):
    """One constraint on what is generated."""

    json_schema: dict[str, Any] | str | bool | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: dict[str, Any] | str | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None


class GenerationRequest(Strict):
    """What both endpoints take. Null means: what the model's generation_config.json says."""

    model: str | None = Field(None, description="A name that /v1/models lists; may be left out.")
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=MOST_SEQUENCES)
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: ShortText | Annotated[list[ShortText], Field(max_length=64)] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(None, ge=0)
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    thinking_token_budget: int | None = Field(
        None, ge=-1, lt=1 << 63, description="Tokens of thinking after which it is ended; -1 is no limit."
    )
    bad_words: Annotated[list[ShortText], Field(max_length=1000)] | None = None
    allowed_token_ids: list[int] | None = None
    logit_bias: dict[str, float] | None = None
    prompt_logprobs: int | None = Field(None, ge=-1)
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = Field(
        None, description='Show tokens in log-probabilities as "token_id:N".'
    )
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    priority: int | None = Field(
        None, ge=-(1 << 63), lt=1 << 63, description="Lower goes first, under --scheduling-policy priority."
    )
    request_id: str | None = Field(None, min_length=1, max_length=128, pattern=r"^[\x21-\x7e]+$")
    cache_salt: str | None = Field(
        None, min_length=1, description="Keeps cached prefixes apart; nothing is cached here, so it changes nothing."
    )
    user: str | None = None

    refused: ClassVar[dict[str, str]] = REFUSED

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for name in cls.refused.keys() & values.keys():
                if not _harmless(name, values[name], values.get("n")):
                    raise ValueError(f"{name} is not supported: {cls.refused[name]}")
        return values

    @field_validator("logit_bias")
    @classmethod
    def _digits(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for key in value or ():
            if not (key.isascii() and key.isdecimal() and len(key) < 10):
                raise ValueError(f"keys must be token ids; got {key!r:.40}")
        return value

    @property
    def num_sequences(self) -> int:
        return self.n or 1

    @property
    def offers_tools(self) -> bool:
        """Whether the model may call tools in its answer."""
        return False

    @model_validator(mode="after")
    def _bounded(self) -> GenerationRequest:
        lists = (self.stop_token_ids, self.allowed_token_ids, self.logit_bias)
        entries = sum(len(value or ()) for value in lists) * self.num_sequences
        if entries > MOST_ENTRIES:
            raise ValueError(
                "stop_token_ids, allowed_token_ids and logit_bias may have "
                f"{MOST_ENTRIES} entries in all, counted once a sequence; got {entries}"
            )
        return self

    @model_validator(mode="after")
    def _streams(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        if self.stream and self.prompt_logprobs is not None:
            raise ValueError("prompt_logprobs cannot be streamed; set stream to false")
        return self

    def sampling_changes(self) -> dict[str, Any]:
        """The fields that a SamplingParams has under the same name, where the request sets them, and how outputs come."""
        kind = RequestOutputKind.DELTA if self.stream else RequestOutputKind.FINAL_ONLY
        given = {name: getattr(self, name) for name in _SAMPLING_FIELDS}
        return {**{name: value for name, value in given.items() if value is not None}, "output_kind": kind}


def _harmless(name: str, value: Any, n: Any) -> bool:
    """Whether a refused field's value asks for what happens anyway."""
    if value is None or value is False or value in ("", [], {}):
        return True
    return (name == "best_of" and value == (n or 1)) or (name == "length_penalty" and value == 1)


_SAMPLING_FIELDS = (
    *(
        "n",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "seed",
    ),
    *("stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "min_tokens", "bad_words"),
    "thinking_token_budget",
    *("skip_special_tokens", "spaces_between_special_tokens", "allowed_token_ids", "logit_bias", "prompt_logprobs"),
)
