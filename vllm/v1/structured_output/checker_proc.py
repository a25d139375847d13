"""The process of checker.py: `python -m vllm.v1.structured_output.checker_proc`, with a socket as stdin.

It may end at any time, by its own timers or by what it is given; nothing is lost with it.
"""

from __future__ import annotations

import os
import pickle
import random
import resource
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from vllm.v1.structured_output.schema import one_line
from vllm.v1.structured_output.spec import Compiler, GrammarSpec

MOST_MEMORY = 2 << 30
"""Bytes of address space that a check may take."""
LARGEST_GRAMMAR = 128 << 20
"""Bytes of a compiled grammar."""
STACK = 4 << 20
"""Bytes: half of what the engine's threads have, so what fits here fits there."""
NUM_STEPS = 48
SLOWEST_STEP = 0.5
"""Tokens that are generated as a trial, and the seconds that the slowest of them may cost."""
IDLE_SECONDS = 600.0


def main() -> None:
    """Answer until the other end closes, or nobody has asked for a while."""
    link = Connection(os.dup(0))
    try:
        settings = pickle.loads(link.recv_bytes())
        sys.path[:] = settings["sys_path"]
        vocabulary = pickle.loads(link.recv_bytes())
    except EOFError:
        return
    try:
        compiler = Compiler(vocabulary)
    except ImportError as error:
        link.send_bytes(pickle.dumps(f"it needs the package xgrammar ({one_line(error)})"))
        return
    trial = Trial(compiler, vocabulary.tokens, vocabulary.stop_token_ids)
    if sys.platform == "linux":
        used = resource.getpagesize() * int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (used + MOST_MEMORY, used + MOST_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(STACK)
    link.send_bytes(pickle.dumps(None))
    while link.poll(IDLE_SECONDS):
        try:
            spec = pickle.loads(link.recv_bytes())
        except EOFError:
            return
        link.send_bytes(pickle.dumps(_within(settings["cpu_seconds"], trial, spec)))


def _within(seconds: float, trial: Trial, spec: GrammarSpec) -> str | None:
    """The trial's verdict. The process ends if it takes longer: nothing in it can be interrupted otherwise."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 60 * seconds)
    verdict: list[str | None] = []
    thread = threading.Thread(target=lambda: verdict.append(trial(spec)))
    thread.start()
    thread.join()
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return verdict[0] if verdict else "structured_outputs: it cannot be compiled"


class Trial:
    """Compiles a spec and generates a few random tokens with it."""

    def __init__(self, compiler: Compiler, tokens: list[bytes], stop_token_ids: list[int]) -> None:
        self._compiler = compiler
        self._stops = set(stop_token_ids)
        self._vocab_size = len(tokens)

    def __call__(self, spec: GrammarSpec) -> str | None:
        """What is wrong, in one line; None if nothing is."""
        try:
            compiled = self._compiler.compile(spec)
            if compiled.memory_size_bytes > LARGEST_GRAMMAR:
                size = compiled.memory_size_bytes >> 20
                return f"structured_outputs: compiled, it takes {size} MiB, and at most {LARGEST_GRAMMAR >> 20} are supported"
            return self._generate(compiled)
        except ValueError as error:
            return str(error)
        except MemoryError:
            return "structured_outputs: compiling it takes too much memory; make it simpler"
        except Exception as error:
            return f"structured_outputs: it cannot be compiled: {one_line(error)}"

    def _generate(self, compiled: Any) -> str | None:
        import numpy as np

        from vllm.v1.structured_output.masks import num_words, unpack_tokens

        words, draw = np.empty((1, num_words(self._vocab_size)), np.int32), random.Random(0)
        matcher = self._compiler.matcher(compiled)
        for step in range(NUM_STEPS):
            start = time.thread_time()
            matcher.fill_next_token_bitmask(words, 0)
            allowed = unpack_tokens(words[0], self._vocab_size)
            if not len(allowed):
                where = "nothing" if step == 0 else "after a few tokens nothing"
                return f"structured_outputs: {where} that this tokenizer can write satisfies the constraint"
            token = int(allowed[draw.randrange(len(allowed))])
            if token in self._stops and len(allowed) > len(self._stops):
                token = next(int(other) for other in allowed if other not in self._stops)
            matcher.accept_token(token)
            if time.thread_time() - start > SLOWEST_STEP:
                return "structured_outputs: it can be read in too many ways, so that each token would take too long; make it simpler"
            if matcher.is_terminated():
                break
        return None


if __name__ == "__main__":
    main()
