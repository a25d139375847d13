"""The front door's check: can this constraint be compiled, and used, at a bearable cost?

Schemas and expressions come from clients, and some make a compiler run for ever, take all memory or overflow the stack. So each
new one is compiled in a process of its own, which ends itself when it takes too long, and a few masks are made with it. What
passes is compiled again by the engine, which then knows that it can be.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import vllm
from vllm.logger import init_logger
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.structured_output.spec import GrammarSpec, Vocabulary, spec_of

logger = init_logger(__name__)

CPU_SECONDS = 8.0
"""What compiling a constraint and trying it may take."""
WALL_SECONDS = 30.0
"""How long anybody waits for that where the processor is busy with other things."""
SECONDS_TO_START = 120.0
MOST_VERDICTS = 4096

_ROOT = Path(vllm.__file__).parents[1]
_ENDED_ITSELF = (-signal.SIGPROF, -signal.SIGALRM)


class GrammarChecker:
    """Says whether a constraint can be used. For any thread; checks run one at a time, and each constraint is checked once.

    The process starts with the first constraint and stays for the next ones.

    Args:
        load_vocabulary: of the model's tokenizer; called once, before the process is started.

    Attributes:
        num_pending: calls of `check_async` that wait for an answer.
    """

    def __init__(self, load_vocabulary: Callable[[], Vocabulary]) -> None:
        self._load_vocabulary = load_vocabulary
        self._lock = threading.Lock()
        self._verdicts: OrderedDict[bytes, str | None] = OrderedDict()
        self._process = _CheckerProcess()
        self._threads: ThreadPoolExecutor | None = None
        self.num_pending = 0
        weakref.finalize(self, self._process.stop)

    def check(self, params: StructuredOutputsParams) -> None:
        """Return if texts can be generated under this constraint; it may take seconds.

        Raises:
            ValueError: they cannot; one line says why.
        """
        spec = spec_of(params)
        digest = spec.digest
        if not self._is_known(digest):
            with self._lock:
                if not self._is_known(digest):
                    self._check_new(spec, digest)

    async def check_async(self, params: StructuredOutputsParams) -> None:
        """`check` for an event loop, which goes on meanwhile."""
        spec = spec_of(params)
        if self._is_known(spec.digest):
            return
        if self._threads is None:
            self._threads = ThreadPoolExecutor(1, thread_name_prefix="grammar check")
        self.num_pending += 1
        try:
            await asyncio.get_running_loop().run_in_executor(self._threads, self.check, params)
        finally:
            self.num_pending -= 1

    def shutdown(self) -> None:
        """End the process; may be called again. A later check starts a new one."""
        self._process.stop()
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
            self._threads = None

    def _is_known(self, digest: bytes) -> bool:
        """Whether the constraint has passed before. Raises ValueError if it has failed."""
        if digest not in self._verdicts:
            return False
        if (error := self._verdicts.get(digest)) is not None:
            raise ValueError(error)
        return True

    def _check_new(self, spec: GrammarSpec, digest: bytes) -> None:
        try:
            error, lasting = self._process.check(spec, self._load_vocabulary), True
        except TimeoutError:
            error, lasting = (
                f"structured_outputs: no answer within {WALL_SECONDS:g} s whether it can be compiled",
                False,
            )
        if lasting:
            self._verdicts[digest] = error
            if len(self._verdicts) > MOST_VERDICTS:
                self._verdicts.popitem(last=False)
        if error is not None:
            raise ValueError(error)


class _CheckerProcess:
    """The process, started when it is needed and started anew when it is gone.

    Checks come one at a time, in whichever thread; `stop` may come in another one meanwhile, and ends the check under way.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # of the three below
        self._process: subprocess.Popen | None = None
        self._link: Connection | None = None
        self._num_stops = 0
        self._vocabulary: bytes | None = None

    def check(self, spec: GrammarSpec, load_vocabulary: Callable[[], Vocabulary]) -> str | None:
        """What is wrong with a spec, in one line; None if nothing is. Raises TimeoutError, also where it is stopped."""
        num_stops = self._num_stops
        if self._vocabulary is None:
            self._vocabulary = pickle.dumps(load_vocabulary())
        for _ in range(2):  # the process may have ended since the last check
            process, link = self._running() or self._start(num_stops)
            try:
                link.send_bytes(pickle.dumps(spec))
                break
            except OSError:
                self._end(process, link)
        else:
            raise ValueError("structured output does not work here: its checks cannot be started")
        try:
            if link.poll(WALL_SECONDS):
                return pickle.loads(link.recv_bytes())
        except (EOFError, OSError) as error:
            if self._num_stops != num_stops:
                raise TimeoutError from error
            code = process.wait()
            self._end(process, link)
            if code in _ENDED_ITSELF:
                return f"structured_outputs: compiling or using it takes more than {CPU_SECONDS:g} s; make it simpler"
            return "structured_outputs: compiling it takes too much memory or nests too deeply; make it simpler"
        self._end(process, link)
        raise TimeoutError

    def stop(self) -> None:
        with self._lock:
            self._num_stops += 1
            process, link = self._process, self._link
        if process is not None:
            self._end(process, link)

    def _running(self) -> tuple[subprocess.Popen, Connection] | None:
        with self._lock:
            return None if self._process is None else (self._process, self._link)

    def _end(self, process: subprocess.Popen, link: Connection) -> None:
        process.kill()
        process.wait()
        with self._lock:  # two threads may end the same one
            link.close()
            if self._process is process:
                self._process = self._link = None

    def _start(self, num_stops: int) -> tuple[subprocess.Popen, Connection]:
        ours, theirs = socket.socketpair()
        with theirs, self._lock:
            if self._num_stops != num_stops:
                ours.close()
                raise TimeoutError
            process = self._process = subprocess.Popen(
                [sys.executable, "-m", "vllm.v1.structured_output.checker_proc"],
                cwd=_ROOT,
                stdin=theirs,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            )
            link = self._link = Connection(ours.detach())
        error = "they do not start"
        with contextlib.suppress(EOFError, OSError):
            link.send_bytes(pickle.dumps({"sys_path": sys.path, "cpu_seconds": CPU_SECONDS}))
            link.send_bytes(self._vocabulary)
            if link.poll(SECONDS_TO_START):
                error = pickle.loads(link.recv_bytes())
        if error is None:
            return process, link
        self._end(process, link)
        if self._num_stops != num_stops:
            raise TimeoutError
        logger.error("The checks of structured output cannot be run: %s", error)
        raise ValueError(f"structured output does not work here: {error}")
