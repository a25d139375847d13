"""The front end's hold on an engine core: in another process, or in a thread of this one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pickle
import queue
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq

import vllm
from vllm import envs
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.engine.core_proc import commands_address, describe, outputs_address
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.messages import (
    AbortRequests,
    AddRequests,
    CallCore,
    Command,
    EngineCoreInfo,
    EngineCoreOutputs,
    EngineCoreRequest,
)
from vllm.v1.engine.pulse import Pulse, why_stalled
from vllm.v1.engine.serialization import decode_outputs, encode_command

logger = init_logger(__name__)

SECONDS_TO_LEAVE = 3.0
"""How long an engine may take to end by itself."""

_ROOT = Path(vllm.__file__).parents[1]
_LONGEST_IPC_PATH = 90  # the system's limit is 107 bytes
_MESSAGES_AT_ONCE = 16  # then the event loop gets a turn, or a fast engine would keep the streams from being read


class CoreClient(ABC):
    """One engine core, seen from an event loop. Everything but the constructor belongs to that loop's thread.

    Args:
        core_class: builds the core from the configuration; None is the real one.
    """

    @abstractmethod
    def __init__(self, config: VllmConfig, core_class: type | None = None) -> None: ...

    @abstractmethod
    async def start(
        self, on_outputs: Callable[[EngineCoreOutputs], None], on_death: Callable[[str], None]
    ) -> EngineCoreInfo:
        """Wait until the core is ready. From then on outputs, and at most one death with its reason, are reported.

        Raises:
            ValueError, FileNotFoundError: what the core raised: the model cannot be loaded or does not fit.
            EngineDeadError: it could not start for any other reason.
        """

    @abstractmethod
    def send(self, command: Command) -> None:
        """Pass a command on without waiting. Raises ValueError where a request cannot be passed on."""

    @abstractmethod
    def why_stalled(self) -> str | None:
        """What is wrong with a core that has started and does not get on; None of one that does."""

    @abstractmethod
    def shutdown(self) -> None:
        """End the core and give everything back. Nothing is reported any more. May be called again."""

    def add_requests(self, requests: list[EngineCoreRequest]) -> None:
        self.send(AddRequests(requests))

    def abort_requests(self, request_ids: list[str]) -> None:
        if request_ids:
            self.send(AbortRequests(request_ids))

    def call(self, call_id: int, method: str) -> None:
        """Have the core call one of its CORE_METHODS; the answer comes with the outputs."""
        self.send(CallCore(call_id, method))


def make_core_client(config: VllmConfig, core_class: type | None = None) -> CoreClient:
    """A client of the kind that VLLM_ENABLE_V1_MULTIPROCESSING says. A process starts to load its model at once."""
    kind = ProcessClient if envs.VLLM_ENABLE_V1_MULTIPROCESSING else ThreadClient
    return kind(config, core_class)


class ProcessClient(CoreClient):
    """A core in a process of its own; see core_proc for the two ways to it."""

    def __init__(self, config: VllmConfig, core_class: type | None = None) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ready: asyncio.Future[EngineCoreInfo] | None = None
        self._is_starting = True
        self._error: Exception | None = None
        self._reason: str | None = None
        self._received = b""
        self._on_gpu = config.parallel_config.device == "cuda"
        self._pulse = (0.0, 0.0)
        self._beat_time = time.monotonic()
        self._held = _Held()
        weakref.finalize(self, self._held.release)  # also when the program ends without a shutdown
        try:
            self._process = self._held.process = self._spawn(config, core_class)
        except BaseException:
            self._held.release()
            raise

    def _spawn(self, config: VllmConfig, core_class: type | None) -> subprocess.Popen:
        held = self._held
        held.folder = tempfile.mkdtemp(prefix="vllm-")
        if len(held.folder) > _LONGEST_IPC_PATH:
            os.rmdir(held.folder)
            held.folder = tempfile.mkdtemp(prefix="vllm-", dir="/tmp")
        held.context = zmq.Context()
        self._commands, self._outputs = held.context.socket(zmq.PUSH), held.context.socket(zmq.PULL)
        for end in (self._commands, self._outputs):
            held.sockets.append(end)
            end.set_hwm(0)
        self._commands.bind(commands_address(held.folder))
        self._outputs.bind(outputs_address(held.folder))

        # A plain subprocess, because multiprocessing would import the caller's main module again, web server and all.
        self._link, theirs = socket.socketpair()
        held.link = self._link
        surroundings = pickle.dumps({"cwd": os.getcwd(), "sys_path": sys.path})
        settings = pickle.dumps({"config": config, "core_class": core_class, "folder": held.folder})
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "vllm.v1.engine.core_proc"], cwd=_ROOT, stdin=theirs, start_new_session=True
            )
        with contextlib.suppress(OSError):  # it has died already: `start` will say how
            self._link.sendall(surroundings + settings)
        return process

    async def start(
        self, on_outputs: Callable[[EngineCoreOutputs], None], on_death: Callable[[str], None]
    ) -> EngineCoreInfo:
        self._on_outputs, self._on_death = on_outputs, on_death
        self._loop = asyncio.get_running_loop()
        self._ready = self._loop.create_future()
        self._link.setblocking(False)
        self._loop.add_reader(self._link.fileno(), self._read_link)
        info = await self._ready
        while self._error is None and not self._commands.poll(0, zmq.POLLOUT):  # ZeroMQ's own threads take a moment
            await asyncio.sleep(0.001)
        if self._error is not None:  # it is gone again
            raise self._error
        self._is_starting = False
        self._loop.add_reader(self._outputs.getsockopt(zmq.FD), self._read_outputs)
        self._read_outputs()
        self._held.remove_folder()  # both ends are connected: the names have served
        return info

    def send(self, command: Command) -> None:
        with contextlib.suppress(zmq.Again):  # it has just died: the link, which says how, has not been read yet
            self._commands.send(encode_command(command), zmq.NOBLOCK)

    def why_stalled(self) -> str | None:
        self._read_link()  # this process may itself have stood still, with beats waiting
        return why_stalled(*self._pulse, time.monotonic() - self._beat_time, self._on_gpu)

    def shutdown(self) -> None:
        if self._loop is not None and not self._loop.is_closed() and not self._held.released:
            self._loop.remove_reader(self._link.fileno())
            self._loop.remove_reader(self._outputs.getsockopt(zmq.FD))
            if self._is_starting:
                self._end(EngineDeadError("the engine was shut down"))
        self._held.release()

    def _read_outputs(self) -> None:
        # ZeroMQ's descriptor tells of changes only: whoever is called must read until nothing is left, or come again.
        for _ in range(_MESSAGES_AT_ONCE):
            if self._held.released or not self._outputs.getsockopt(zmq.EVENTS) & zmq.POLLIN:
                return
            self._on_outputs(decode_outputs(self._outputs.recv(zmq.NOBLOCK)))
        self._loop.call_soon(self._read_outputs)

    def _read_link(self) -> None:
        if self._held.released:
            return
        try:
            data = self._link.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        *lines, self._received = (self._received + data).split(b"\n")
        for line in lines:
            self._learn(**json.loads(line))
        if not data:
            self._loop.remove_reader(self._link.fileno())
            self._end(EngineDeadError(self._reason or self._how_it_ended()))

    def _learn(
        self,
        beat: list[float] | None = None,
        ready: dict | None = None,
        refused: list[str] | None = None,
        died: str | None = None,
    ) -> None:
        self._beat_time = time.monotonic()
        if beat is not None:
            self._pulse = tuple(beat)
        elif ready is not None:
            if not self._ready.cancelled():  # as Ctrl-C does to whoever waits
                self._ready.set_result(EngineCoreInfo(**ready))
        elif refused is not None:
            kind, text = refused
            self._end({"FileNotFoundError": FileNotFoundError, "ValueError": ValueError}[kind](text))
        else:
            self._reason = died

    def _end(self, error: Exception) -> None:
        if not self._is_starting:
            return self._on_death(str(error))
        self._error = error
        if not self._ready.done():
            self._ready.set_exception(error)

    def _how_it_ended(self) -> str:
        try:
            code = self._process.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            return "the engine process closed its connection"
        if code < 0:
            return f"the engine process was killed by signal {-code} ({signal.Signals(-code).name})"
        return f"the engine process ended with exit code {code}"


class _Held:
    """What must be given back, whichever way the client goes."""

    def __init__(self) -> None:
        self.link: socket.socket | None = None
        self.process: subprocess.Popen | None = None
        self.context: zmq.Context | None = None
        self.sockets: list[zmq.Socket] = []  # a context waits for all of its sockets to be closed
        self.folder: str | None = None
        self.released = False

    def release(self) -> None:
        if self.released:
            return
        self.released = True
        if self.link is not None:
            self.link.close()  # which ends the process
        if self.process is not None:
            try:
                self.process.wait(timeout=SECONDS_TO_LEAVE)
            except subprocess.TimeoutExpired:
                logger.warning("The engine process does not end by itself; killing it")
                self.process.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(timeout=SECONDS_TO_LEAVE)
        if self.context is not None:
            for end in self.sockets:
                end.close(linger=0)
            self.context.term()
        self.remove_folder()

    def remove_folder(self) -> None:
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder = None


class ThreadClient(CoreClient):
    """A core in a thread of this process: easier to debug, but its steps and the server's work delay each other."""

    def __init__(self, config: VllmConfig, core_class: type | None = None) -> None:
        self._make = lambda: _core_class(core_class)(config)
        self._on_gpu = config.parallel_config.device == "cuda"
        self._pulse = Pulse()
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False

    async def start(
        self, on_outputs: Callable[[EngineCoreOutputs], None], on_death: Callable[[str], None]
    ) -> EngineCoreInfo:
        self._on_outputs, self._on_death = on_outputs, on_death
        self._loop = asyncio.get_running_loop()
        self._ready = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, name="engine core", daemon=True)
        self._thread.start()
        return await self._ready

    def send(self, command: Command) -> None:
        self._commands.put(command)

    def why_stalled(self) -> str | None:
        return why_stalled(*self._pulse.read(), 0.0, self._on_gpu)

    def shutdown(self) -> None:
        self._closed = True
        self._commands.put(None)
        if self._thread is not None:
            self._answer(None, EngineDeadError("the engine was shut down"))
            self._thread.join(SECONDS_TO_LEAVE)

    def _run(self) -> None:
        from vllm.v1.engine.core_loop import run_core_loop

        try:
            core = self._make()
            self._in_loop(self._answer, core.info, None)
        except (ValueError, FileNotFoundError) as error:
            return self._in_loop(self._answer, None, error)
        except BaseException as error:
            logger.exception("The engine cannot start")
            text = f"the engine could not start: {describe(error)}"
            return self._in_loop(self._answer, None, EngineDeadError(text))
        try:
            run_core_loop(core, self._receive, lambda outputs: self._in_loop(self._on_outputs, outputs), self._pulse)
        except BaseException as error:
            logger.exception("The engine failed")
            self._in_loop(self._on_death, f"the engine failed: {describe(error)}")

    def _receive(self, wait: bool) -> list[Command | None]:
        commands = [self._commands.get()] if wait else []
        while not self._commands.empty():
            commands.append(self._commands.get())
        return commands

    def _answer(self, info: EngineCoreInfo | None, error: Exception | None) -> None:
        if self._ready.done():
            return  # nobody waits any more
        if error is None:
            self._ready.set_result(info)
        else:
            self._ready.set_exception(error)

    def _in_loop(self, function: Callable[..., None], *args: Any) -> None:
        if self._closed:
            return
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the loop is closed, and with it whoever wanted to know
            self._commands.put(None)


def _core_class(core_class: type | None) -> type:
    if core_class is None:
        from vllm.v1.engine.core import EngineCore as core_class
    return core_class
