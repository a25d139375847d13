"""Prompts in, text out, one step at a time, in this process."""

from __future__ import annotations

from functools import partial
from typing import Any

from vllm.config import VllmConfig
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.engine.tokenizer import load_tokenizer
from vllm.v1.engine.vocabulary import load_vocabulary
from vllm.v1.metrics.engine_metrics import EngineMetrics
from vllm.v1.structured_output.checker import GrammarChecker


class LLMEngine:
    """The synchronous engine: input processing, the core, output processing.

    Args:
        config: validated configuration.

    Raises:
        ValueError, FileNotFoundError: the model cannot be loaded or does not fit, in one line that says what to change.
    """

    def __init__(self, config: VllmConfig) -> None:
        self.config = config
        self.tokenizer = load_tokenizer(config)
        self.input_processor = InputProcessor(config, self.tokenizer)
        self.grammar_checker = GrammarChecker(partial(load_vocabulary, config, self.tokenizer))
        self.core = EngineCore(config)
        self.metrics = EngineMetrics(config)
        self.metrics.engine_is_ready(self.core.info)
        self.output_processor = OutputProcessor(self.tokenizer, self.metrics)

    def add_request(
        self, request_id: str, prompt: Any, sampling_params: SamplingParams | None = None, priority: int = 0
    ) -> None:
        """Validate, tokenise and queue one prompt.

        Args:
            request_id: unique among unfinished requests.
            prompt: text, token ids, or a dict with `prompt` or `prompt_token_ids`.
            sampling_params: None means the model's defaults.
            priority: lower goes first under the priority policy.

        Raises:
            ValueError: the prompt or a parameter is impossible. Nothing has been queued then.
        """
        if sampling_params is not None and sampling_params.structured_outputs is not None:
            self.grammar_checker.check(sampling_params.structured_outputs)
        request = self.input_processor.process(request_id, prompt, sampling_params, priority)
        self.core.check_fits(len(request.prompt_token_ids))
        self.output_processor.add_request(request)
        for child in request.children:
            self.core.add_request(child)

    def step(self) -> list[RequestOutput]:
        """Run one step of the core; the requests that have something new to say."""
        outputs, stopped = self.output_processor.process(self.core.step())
        if stopped:
            self.core.abort_requests(stopped)
        self.metrics.step(self.core.take_stats(), self.output_processor.num_unfinished_sequences)
        return outputs

    def abort_requests(self, request_ids: list[str]) -> None:
        """Drop requests and everything they hold; unknown ids are ignored."""
        self.core.abort_requests(self.output_processor.abort(request_ids))
        self.metrics.queue_length(self.output_processor.num_unfinished_sequences)

    def set_gdn_variants(
        self, in_proj: str | None = None, decode: str | None = None, prefill: str | None = None
    ) -> tuple[str, str, str] | None:
        """Change stages of the GDN layers from the next step on; None leaves one as it is. Returns the three in force.

        Returns None for a model without such layers. Raises ValueError, with nothing changed, for a name that is unknown or cannot run.
        """
        return self.core.set_gdn_variants(in_proj, decode, prefill)

    @property
    def has_unfinished_requests(self) -> bool:
        return self.output_processor.has_unfinished_requests or self.core.has_unfinished_requests
