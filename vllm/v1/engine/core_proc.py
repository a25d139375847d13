"""An engine core in a process of its own: `python -m vllm.v1.engine.core_proc`, started by core_client with a socket as stdin.

Two ways lead to the front end. That socket, the link, carries the configuration, "ready", a beat a second, and why the engine
died; and its end is how each side learns that the other is gone, however it went. ZeroMQ carries commands and outputs.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import signal
import socket
import sys
import threading
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.engine.pulse import SECONDS_A_BEAT, Pulse

if TYPE_CHECKING:
    from vllm.v1.engine.messages import Command

logger = init_logger(__name__)

_telling = threading.Lock()

EXPECTED_ERRORS = (FileNotFoundError, ValueError)
"""What a start-up raises, in one line, where the user asked for something impossible."""


def main() -> None:
    """Run an engine until the front end goes away."""
    # Ctrl-C and systemd's SIGTERM reach every process of a service. Who is served to the end is the front end's decision.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    link = socket.socket(fileno=os.dup(0))
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)  # compilers that the engine starts must not keep the link open
    os.close(null)

    stream = link.makefile("rb")
    surroundings = pickle.load(stream)
    os.chdir(surroundings["cwd"])
    sys.path[:] = surroundings["sys_path"]
    try:
        settings = pickle.load(stream)
        threading.Thread(target=_end_with_front_end, args=(link, settings["folder"]), daemon=True).start()
        _serve(link, **settings)
    except EXPECTED_ERRORS as error:
        kind = next(kind for kind in EXPECTED_ERRORS if isinstance(error, kind))
        _tell(link, refused=[kind.__name__, str(error)])
    except BaseException as error:
        logger.exception("The engine failed")
        _tell(link, died=f"the engine failed: {describe(error)}")
    _leave(1)


def _end_with_front_end(link: socket.socket, folder: str) -> None:
    with contextlib.suppress(OSError):
        link.recv(
            1
        )  # nothing is ever sent here: it returns when the other end closes, or raises if that left things unread
    shutil.rmtree(folder, ignore_errors=True)  # the front end's, if it came to nothing before it could remove it
    _leave(0)


def _leave(code: int) -> None:
    """End the process at once: there is nothing to save, and a step may be under way in another thread."""
    try:
        for end in (_end_progress_bars, sys.stderr.flush, sys.stdout.flush):
            with contextlib.suppress(OSError):  # a pipe whose reader has gone, as `vllm serve | tee` leaves it
                end()
    finally:
        os._exit(code)  # whatever went wrong with last words: an engine must not outlive its front end


def _end_progress_bars() -> None:
    """Leave the line to whoever speaks next: an error of the front end would stand behind the bar otherwise."""
    tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


def _tell(link: socket.socket, **message: Any) -> None:
    with contextlib.suppress(OSError), _telling:  # nobody is there to be told
        link.sendall(json.dumps(message).encode() + b"\n")


def _beat(link: socket.socket, pulse: Pulse) -> None:
    """Say every second how the engine's thread gets on, from a thread that never waits for it."""
    while True:
        time.sleep(SECONDS_A_BEAT)
        _tell(link, beat=pulse.read())


def _serve(link: socket.socket, config: Any, core_class: type | None, folder: str) -> None:
    """Build the core, say so, and run it. Never returns."""
    import zmq

    if core_class is None:
        from vllm.v1.engine.core import EngineCore as core_class
    from vllm.v1.engine.core_loop import run_core_loop
    from vllm.v1.engine.serialization import decode_command, encode_outputs

    core = core_class(config)
    context = zmq.Context()
    commands, outputs = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    for end in (commands, outputs):
        end.set_hwm(0)  # the front end bounds what it sends, and thereby what comes back
    outputs.set(zmq.IMMEDIATE, 1)  # it is writable when it is connected, not before
    commands.connect(commands_address(folder))
    outputs.connect(outputs_address(folder))
    outputs.poll(flags=zmq.POLLOUT)  # the front end removes the sockets' names once the engine is ready

    def receive(wait: bool) -> list[Command]:
        received = [decode_command(commands.recv())] if wait else []
        while commands.getsockopt(zmq.EVENTS) & zmq.POLLIN:
            received.append(decode_command(commands.recv()))
        return received

    pulse = Pulse()
    _tell(link, ready=asdict(core.info))
    threading.Thread(target=_beat, args=(link, pulse), daemon=True).start()
    try:
        run_core_loop(core, receive, lambda message: outputs.send(encode_outputs(message)), pulse)
    except EXPECTED_ERRORS as error:  # nobody asked for this one
        raise RuntimeError(describe(error)) from error


def commands_address(folder: str) -> str:
    return f"ipc://{folder}/commands"


def outputs_address(folder: str) -> str:
    return f"ipc://{folder}/outputs"


def describe(error: BaseException) -> str:
    """An exception in one line."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


if __name__ == "__main__":
    main()
