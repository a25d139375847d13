"""The offline API: `LLM("model").generate([...])`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from vllm.engine.arg_utils import EngineArgs
from vllm.outputs import RequestOutput
from vllm.reasoning import ReasoningParserManager
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.metrics.reader import Metric


class LLM:
    """A model loaded into this process.

    Args:
        model: folder of a checkpoint, a Hugging Face model id, or ``preset:NAME``.
        reasoning_parser: says where thinking begins and ends, for requests with a `thinking_token_budget`.
        **engine_args: any flag of `vllm serve` that concerns the engine, as a keyword (`max_model_len=4096`).

    Raises:
        TypeError: an unknown keyword.
        ValueError, FileNotFoundError: an impossible value, an unreadable model, or one that does not fit.
    """

    def __init__(self, model: str, *, reasoning_parser: str | None = None, **engine_args: Any) -> None:
        parser = ReasoningParserManager.get_reasoning_parser(reasoning_parser) if reasoning_parser else None
        config = EngineArgs.from_kwargs(model=model, **engine_args).create_engine_config()
        self.llm_engine = LLMEngine(config)
        self._counter = itertools.count()
        self._thinking_token_ids = parser.token_ids(self.get_tokenizer()) if parser else None

    def get_tokenizer(self) -> Any:
        """The transformers tokenizer of the model."""
        return self.llm_engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """A fresh copy of what a request gets that names no parameters."""
        return self.llm_engine.input_processor.default_sampling_params()

    def get_metrics(self) -> list[Metric]:
        """What the engine has counted and timed since its start, as Counter, Gauge and Histogram of vllm.v1.metrics.reader."""
        return self.llm_engine.metrics.snapshot()

    def reset_prefix_cache(self) -> bool:
        """Forget what is cached of prompts, which is nothing in this version. Whether nothing is cached now."""
        return self.llm_engine.core.reset_prefix_cache()

    def start_profile(self) -> None:
        """Record what the engine does, with torch.profiler, until `stop_profile`. Raises ValueError if it is recorded."""
        self.llm_engine.core.start_profile()

    def stop_profile(self) -> str:
        """Write the record into VLLM_TORCH_PROFILER_DIR (else VLLM_CACHE_ROOT/profiles), and return the file's path.

        Raises:
            ValueError: nothing is being recorded.
        """
        return self.llm_engine.core.stop_profile()

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Complete every prompt; outputs come back in the prompts' order.

        Args:
            prompts: one prompt or a list of them; a prompt is a text, a list of token ids, or a dict with `prompt` or
                `prompt_token_ids`.
            sampling_params: for all prompts, or one a prompt; None means the model's defaults.
            use_tqdm: show a progress bar.
            priority: one number a prompt, lower first, where the engine schedules by priority.

        Raises:
            ValueError: a prompt or parameter is impossible; then no prompt has been run.
        """
        prompts = _as_prompt_list(prompts)
        params = _one_for_each("sampling_params", sampling_params, len(prompts))
        priorities = _one_for_each("priority", priority if priority is not None else 0, len(prompts))
        request_ids: list[str] = []
        try:
            for prompt, p, rank in zip(prompts, params, priorities, strict=True):
                request_ids.append(str(next(self._counter)))
                self._add(request_ids[-1], prompt, p, rank)
            return self._run(request_ids, use_tqdm)
        except BaseException:
            # A bad prompt or Ctrl-C leaves nothing behind that the next call would have to finish.
            self.llm_engine.abort_requests(request_ids)
            raise

    def chat(
        self,
        messages: list[dict[str, Any]] | list[list[dict[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or a list of them, through the tokenizer's chat template.

        Args:
            messages: a list of `{"role": ..., "content": ...}`, or a list of such lists.
            chat_template: a Jinja template in place of the tokenizer's own.
            tools: OpenAI tool definitions that the template may offer.
            chat_template_kwargs: passed to the template, such as `{"enable_thinking": False}`.
        """
        conversations = [messages] if not messages or isinstance(messages[0], dict) else messages
        prompts = [
            {
                "prompt_token_ids": self.get_tokenizer().apply_chat_template(
                    conversation,
                    chat_template=chat_template,
                    tools=tools,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    tokenize=True,
                    return_dict=False,
                    **(chat_template_kwargs or {}),
                )
            }
            for conversation in conversations
        ]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def _add(self, request_id: str, prompt: Any, params: SamplingParams | None, priority: int) -> None:
        params = params or self.get_default_sampling_params()
        # Nobody sees anything but the end, so nothing else is put together.
        changes: dict[str, Any] = {"output_kind": RequestOutputKind.FINAL_ONLY}
        if params.thinking_token_budget is not None:
            changes["thinking_token_ids"] = params.thinking_token_ids or self._thinking_token_ids
        self.llm_engine.add_request(request_id, prompt, params.clone(**changes), priority)

    def _run(self, request_ids: list[str], use_tqdm: bool) -> list[RequestOutput]:
        finished: dict[str, RequestOutput] = {}
        with tqdm(total=len(request_ids), desc="Processed prompts", disable=not use_tqdm, dynamic_ncols=True) as bar:
            while self.llm_engine.has_unfinished_requests:
                for output in self.llm_engine.step():
                    if output.finished:
                        finished[output.request_id] = output
                        bar.update()
        return [finished[request_id] for request_id in request_ids]


def _as_prompt_list(prompts: Any) -> list[Any]:
    """One prompt in any form, or a list of prompts -> a list of prompts."""
    if isinstance(prompts, (str, dict)):
        return [prompts]
    prompts = list(prompts)
    if prompts and all(isinstance(p, int) for p in prompts):
        return [prompts]
    return prompts


def _one_for_each(name: str, values: Any, count: int) -> list[Any]:
    if not isinstance(values, (list, tuple)):
        return [values] * count
    if len(values) != count:
        raise ValueError(f"{name}: {len(values)} given for {count} prompts")
    return list(values)
