"""The engine's side: grammars compiled beside its steps, and the masks of each step.

A request waits here, outside the scheduler's queue, until its grammar is compiled; everybody else goes on meanwhile.
"""

from __future__ import annotations

import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from vllm.logger import init_logger
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.request import Request
from vllm.v1.structured_output.constraint import Constraint, TokenSets
from vllm.v1.structured_output.masks import TokenMasks, num_words, pack_tokens
from vllm.v1.structured_output.spec import Compiler, GrammarSpec, Vocabulary, spec_of
from vllm.v1.structured_output.thinking import ThinkingBudget

logger = init_logger(__name__)

NUM_THREADS = 2
MOST_GRAMMARS = 256
MOST_BYTES = 512 << 20
"""Compiled grammars that are kept, the latest used of them, for requests to come."""


class GrammarCache:
    """Compiled grammars, each compiled once. For several threads.

    Args:
        load_vocabulary: called once, by the first thread that needs it.
    """

    def __init__(self, load_vocabulary: Callable[[], Vocabulary]) -> None:
        self._load_vocabulary = load_vocabulary
        self._lock = threading.Lock()
        self._compiler_lock = threading.Lock()
        self._compiler: Compiler | None = None
        self._entries: OrderedDict[GrammarSpec, Future[Any]] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def constraint(self, params: StructuredOutputsParams) -> Constraint:
        """A new text's constraint. Raises ValueError for what cannot be compiled."""
        compiler, spec = self._get_compiler(), spec_of(params)
        matcher = compiler.matcher(self._compiled(compiler, spec))
        return Constraint(matcher, self._sets, spec.kind == "json", params.begin_after or "", params.begin_at or "")

    def _get_compiler(self) -> Compiler:
        with self._compiler_lock:
            if self._compiler is None:
                vocabulary = self._load_vocabulary()
                tokens = vocabulary.tokens
                blank = [token_id for token_id, token in enumerate(tokens) if token.isspace()]
                raw = [
                    token_id for token_id, token in enumerate(tokens) if any(b < 32 and b not in b"\n\r" for b in token)
                ]
                self._sets = TokenSets(
                    tokens,
                    open_mask=pack_tokens(vocabulary.stop_token_ids, len(tokens), allowed=False),
                    json_mask=pack_tokens(raw, len(tokens), allowed=False),
                    solid_mask=pack_tokens(sorted({*blank, *raw}), len(tokens), allowed=False),
                )
                self._compiler = Compiler(vocabulary)
            return self._compiler

    def _compiled(self, compiler: Compiler, spec: GrammarSpec) -> Any:
        with self._lock:
            entry = self._entries.get(spec)
            first = entry is None
            if first:
                entry = self._entries[spec] = Future()
            self._entries.move_to_end(spec)
        if first:
            try:
                compiled = compiler.compile(spec)
            except BaseException as error:
                with self._lock:
                    del self._entries[spec]
                entry.set_exception(error)
                raise
            entry.set_result(compiled)
            self._make_room(_size(spec, compiled))
        return entry.result()

    def _make_room(self, num_bytes: int) -> None:
        """Count an entry that was added, and forget the longest unused ones beyond the limits."""
        with self._lock:
            self._bytes += num_bytes
            for spec, entry in list(self._entries.items())[:-1]:
                if len(self._entries) <= MOST_GRAMMARS and self._bytes <= MOST_BYTES:
                    return
                if entry.done():
                    del self._entries[spec]
                    self._bytes -= _size(spec, entry.result())


def _size(spec: GrammarSpec, compiled: Any) -> int:
    return 4 * len(spec.text) + compiled.memory_size_bytes


class GrammarManager:
    """Constrained requests of one engine. Everything but compiling happens in the engine's thread.

    Args:
        load_vocabulary: of the model's tokenizer; called in a thread when the first constrained request comes.
        vocab_size: logits of a row.
    """

    def __init__(self, load_vocabulary: Callable[[], Vocabulary], vocab_size: int) -> None:
        self._cache = GrammarCache(load_vocabulary)
        self._vocab_size = vocab_size
        self._threads: ThreadPoolExecutor | None = None
        self._waiting: dict[str, Request] = {}
        self._compiled: queue.SimpleQueue[tuple[Request, Constraint | None]] = queue.SimpleQueue()
        self._live: dict[str, Request] = {}

    @property
    def num_waiting(self) -> int:
        """Requests whose grammars are not compiled yet."""
        return len(self._waiting)

    def submit(self, request: Request) -> None:
        """Have a request's grammar compiled; `take_ready` gives it back."""
        if request.request_id in self._waiting:
            raise ValueError(f"request {request.request_id} exists already")
        if self._threads is None:
            self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="grammar")
        self._waiting[request.request_id] = request
        self._threads.submit(self._compile, request)

    def abort(self, request_ids: Iterable[str]) -> None:
        """Forget requests that still wait here; others are passed over."""
        for request_id in request_ids:
            self._waiting.pop(request_id, None)

    def take_ready(self, timeout: float = 0.0) -> tuple[list[Request], list[Request]]:
        """Requests whose grammars have been compiled since the last call, and those whose grammars cannot be.

        Args:
            timeout: seconds to wait for the first of them.
        """
        ready: list[Request] = []
        failed: list[Request] = []
        while self._waiting:
            try:
                request, constraint = self._compiled.get(timeout > 0 and not ready and not failed, timeout)
            except queue.Empty:
                break
            if self._waiting.get(request.request_id) is not request:
                continue  # aborted meanwhile
            del self._waiting[request.request_id]
            if constraint is None:
                failed.append(request)
                continue
            self.hold(request, constraint)
            ready.append(request)
        return ready, failed

    def hold(self, request: Request, constraint: Constraint | None = None) -> None:
        """Keep a request to its constraint from its next token on, and to its thinking budget, where it has one."""
        params = request.sampling_params
        if params.thinking_token_budget is not None:
            constraint = ThinkingBudget(
                params.thinking_token_budget,
                params.thinking_token_ids,
                request.prompt_token_ids,
                self._vocab_size,
                constraint,
            )
        request.constraint = constraint
        self._live[request.request_id] = request

    def masks(self, scheduled: Iterable[str]) -> TokenMasks | None:
        """The masks of a step, once the scheduler has counted its tokens as computed; None where nothing is constrained.

        Args:
            scheduled: ids of the requests in the step.
        """
        if not self._live:
            return None
        self._live = {key: request for key, request in self._live.items() if not _is_free(request)}
        rows = [self._live[key] for key in scheduled if key in self._live and _needs_mask(self._live[key])]
        if not rows:
            return None
        words = np.empty((len(rows), num_words(self._vocab_size)), dtype=np.int32)
        for i, request in enumerate(rows):
            request.constraint.fill(words, i)
        return TokenMasks([request.request_id for request in rows], words)

    def shutdown(self) -> None:
        """End the threads; may be called again."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    def _compile(self, request: Request) -> None:
        constraint = None
        try:
            if request.request_id in self._waiting:
                constraint = self._cache.constraint(request.sampling_params.structured_outputs)
        except Exception as error:
            logger.error("Request %s cannot be constrained: %s", request.request_id, error)
        self._compiled.put((request, constraint))


def _is_free(request: Request) -> bool:
    """Whether nothing holds a request any more; one whose thinking is over goes on as if nothing ever had."""
    if not request.is_finished and request.constraint.is_over:
        request.constraint = None
    return request.is_finished or request.constraint is None


def _needs_mask(request: Request) -> bool:
    """Whether the step samples a token for the request, and not just any token may come."""
    return not request.num_uncomputed_tokens and not request.constraint.is_idle
