"""From what a caller gives to requests that the engine can run without further questions."""

from __future__ import annotations

import operator
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.config.checkpoint import read_json
from vllm.sampling_params import GENERATION_CONFIG_KEYS, SamplingParams, mix_seed
from vllm.v1.engine.messages import EngineCoreRequest

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig


MOST_BAD_WORD_PLACES = 1 << 16
"""The sampler keeps a request's bad words in a table this large: 512 KiB on the device."""


@dataclass(slots=True)
class ProcessedRequest:
    """A caller's request, checked, with its n sequences as the engine core will see them."""

    request_id: str
    prompt: str | None  # as text, where it came as text
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    arrival_time: float
    children: list[EngineCoreRequest]  # ids: the request's own where n is 1, else "{i}_{request_id}"


class InputProcessor:
    """Checks prompts and parameters against the model, tokenises, and settles seeds and limits.

    Args:
        config: of the engine; the model's generation_config.json gives the default parameters.
        tokenizer: of transformers; None where all prompts are token ids.

    Raises:
        ValueError, FileNotFoundError: the default parameters are impossible or cannot be read.
    """

    def __init__(self, config: VllmConfig, tokenizer: Any | None) -> None:
        model = config.model_config
        self.tokenizer = tokenizer
        self.max_model_len = model.max_model_len
        self.vocab_size = model.hf_config.text.vocab_size
        self.max_logprobs = self.vocab_size if model.max_logprobs == -1 else model.max_logprobs
        self._defaults = load_sampling_defaults(model)
        self._seeds = random.Random(model.seed)
        try:
            self.default_sampling_params()
        except ValueError as error:
            raise ValueError(f"default sampling parameters (generation_config.json, overrides): {error}") from None

    def default_sampling_params(self, **changes: Any) -> SamplingParams:
        """What a request gets that brings no parameters, with `changes` laid over it."""
        return SamplingParams.from_defaults(self._defaults, **changes)

    def process(
        self,
        request_id: str,
        prompt: Any,
        sampling_params: SamplingParams | None = None,
        priority: int = 0,
        arrival_time: float | None = None,
        *,
        tokenised: tuple[str | None, list[int]] | None = None,
    ) -> ProcessedRequest:
        """Validate and tokenise one prompt.

        Args:
            prompt: text, token ids, {"prompt": text} or {"prompt_token_ids": ids}.
            sampling_params: left as they are; None means the model's defaults.
            priority: lower goes first under the priority policy.
            arrival_time: seconds, time.time(); default: now.
            tokenised: what `tokenise` gave for the prompt, where it has been called already.

        Raises:
            ValueError: one line that names the field and the value.
        """
        arrival_time = time.time() if arrival_time is None else arrival_time
        params = sampling_params or self.default_sampling_params()
        text, token_ids = self.tokenise(prompt) if tokenised is None else tokenised
        self._check_params(params)
        params = self._settled(params, len(token_ids))
        children = []
        for i in range(params.n):
            child = params
            if params.n > 1:  # prompt log-probabilities are the same for all: the first child brings them
                scored = params.prompt_logprobs if i == 0 else None
                child = params.clone(n=1, seed=mix_seed(params.seed, i), prompt_logprobs=scored)
            child_id = request_id if params.n == 1 else f"{i}_{request_id}"
            children.append(EngineCoreRequest(child_id, token_ids, child, arrival_time, priority))
        return ProcessedRequest(request_id, text, token_ids, params, arrival_time, children)

    def tokenise(self, prompt: Any) -> tuple[str | None, list[int]]:
        """A prompt's text, where it has one, and its checked token ids. Raises ValueError."""
        text, token_ids = _parts(prompt)
        if token_ids is None:
            if self.tokenizer is None:
                raise ValueError("prompt is text, but there is no tokenizer; give prompt_token_ids")
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise ValueError(f"prompt holds half of a surrogate pair at character {error.start}") from None
            token_ids = self.tokenizer.encode(text)
        else:
            token_ids = self._checked_ids("prompt_token_ids", token_ids)
        if not token_ids:
            raise ValueError("prompt must hold at least one token; got none")
        if len(token_ids) >= self.max_model_len:
            raise ValueError(
                f"prompt has {len(token_ids)} tokens, which leaves no room for output: "
                f"with --max-model-len {self.max_model_len} it may have at most {self.max_model_len - 1}"
            )
        return text, token_ids

    def _checked_ids(self, name: str, values: Any) -> list[int]:
        try:
            token_ids = [operator.index(value) for value in values]
        except TypeError:
            raise ValueError(f"{name} must hold whole numbers only") from None
        if any(isinstance(value, bool) for value in values):
            raise ValueError(f"{name} must hold whole numbers only; got true or false")
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < self.vocab_size:
            wrong = next(token for token in token_ids if not 0 <= token < self.vocab_size)
            raise ValueError(f"{name} must be from 0 to {self.vocab_size - 1}, the model's vocabulary; got {wrong}")
        return token_ids

    def _check_params(self, params: SamplingParams) -> None:
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias", "thinking_token_ids"):
            self._checked_ids(name, getattr(params, name) or ())
        for name in ("logprobs", "prompt_logprobs"):
            wanted = getattr(params, name)
            if wanted is not None and (self.vocab_size if wanted == -1 else wanted) > self.max_logprobs:
                meaning = f" (all {self.vocab_size})" if wanted == -1 else ""
                raise ValueError(f"{name} must be at most {self.max_logprobs} (--max-logprobs); got {wanted}{meaning}")
        if params.thinking_token_budget is not None and not params.thinking_token_ids:
            raise ValueError(
                "thinking_token_budget needs a reasoning parser (--reasoning-parser, or LLM(reasoning_parser=...)), which says how thinking ends"
            )
        if (params.stop or params.bad_words) and self.tokenizer is None:
            raise ValueError("stop and bad_words need a tokenizer, and there is none")

    def _settled(self, params: SamplingParams, num_prompt_tokens: int) -> SamplingParams:
        """A copy with everything decided: a seed, the length that is left, bad words as tokens."""
        room = self.max_model_len - num_prompt_tokens
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        return params.clone(
            seed=self._seeds.getrandbits(63) if params.seed is None else params.seed,
            max_tokens=max_tokens,
            min_tokens=min(params.min_tokens, max_tokens),
            bad_words_token_ids=self._bad_words(params.bad_words) if params.bad_words else None,
        )

    def _bad_words(self, words: list[str]) -> list[list[int]]:
        """Each word at the beginning of a text and after a space, which byte-level tokenizers spell differently."""
        spellings = []
        for word in words:
            for text in (word, " " + word.lstrip()):
                token_ids = self.tokenizer.encode(text, add_special_tokens=False)
                if token_ids and token_ids not in spellings:
                    spellings.append(token_ids)
        for token_ids in spellings:
            self._checked_ids("bad_words", token_ids)
        longest = max(map(len, spellings), default=0)
        if len(spellings) * longest > MOST_BAD_WORD_PLACES:
            raise ValueError(
                f"bad_words has {len(spellings)} spellings of up to {longest} tokens; "
                f"their number times the longest may be at most {MOST_BAD_WORD_PLACES}"
            )
        return spellings


def load_sampling_defaults(model: ModelConfig) -> dict[str, Any]:
    """What generation_config.json says about sampling, with the user's overrides laid over it.

    Raises:
        ValueError: an override that nothing would read, or a file that is not JSON.
        FileNotFoundError: a folder was named that has no generation_config.json.
    """
    unknown = sorted(set(model.override_generation_config) - set(GENERATION_CONFIG_KEYS))
    if unknown:
        raise ValueError(
            f"--override-generation-config: {', '.join(unknown)} would change nothing; it may set {', '.join(GENERATION_CONFIG_KEYS)}"
        )
    found: dict[str, Any] = {}
    if model.generation_config == "auto":
        path = Path(model.model_path or model.model) / "generation_config.json"
        found = read_json(path) if path.is_file() else {}
    elif model.generation_config != "vllm":
        path = Path(model.generation_config).expanduser() / "generation_config.json"
        if not path.is_file():
            raise FileNotFoundError(f"--generation-config {model.generation_config}: there is no {path}")
        found = read_json(path)
    known = {key: value for key, value in found.items() if key in GENERATION_CONFIG_KEYS}
    return {**known, **model.override_generation_config}


def _parts(prompt: Any) -> tuple[str | None, Any | None]:
    """A prompt's text and token ids, as far as it has them."""
    if isinstance(prompt, str):
        return prompt, None
    if isinstance(prompt, (list, tuple)):
        return None, prompt
    if isinstance(prompt, Mapping):
        unknown = sorted(str(key) for key in prompt if key not in ("prompt", "prompt_token_ids"))
        if unknown:
            raise ValueError(f"prompt must have the keys prompt or prompt_token_ids; got {', '.join(unknown)}")
        text, token_ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
        if isinstance(token_ids, (list, tuple)) and (text is None or isinstance(text, str)):
            return text, token_ids
        if isinstance(text, str) and token_ids is None:
            return text, None
    raise ValueError(f"prompt must be text, a list of token ids, or a dictionary with one of them; got {prompt!r:.80}")
