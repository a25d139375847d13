"""Engine cores that misbehave, each in one way. They are imported by the engine's process, so they live in a module."""

import contextlib
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

from tqdm import tqdm

from vllm.benchmarks.stub_core import StubCore
from vllm.v1.engine.messages import EngineCoreInfo


class RefusingCore(StubCore):
    """The user asked for something impossible."""

    def __init__(self, config):
        raise ValueError("--max-model-len 5 is odd; use 6")


class FilelessCore(StubCore):
    def __init__(self, config):
        raise FileNotFoundError("no weights in /nowhere")


class LoadingCore(StubCore):
    """A model that takes a quarter of an hour to be loaded."""

    def __init__(self, config):
        with tqdm(total=1000, desc="Loading weights"):
            time.sleep(1000)


class StickyCore(StubCore):
    """Loading, with a progress bar that cannot be ended."""

    def __init__(self, config):
        bar = tqdm(total=1000, desc="Loading weights")
        bar.close = lambda: sys.exit("stuck")
        time.sleep(1000)


class BrokenCore(StubCore):
    def __init__(self, config):
        raise RuntimeError("the device is\nnot there")


class LeavingCore(StubCore):
    def __init__(self, config):
        os._exit(7)


class KilledCore(StubCore):
    def __init__(self, config):
        os.kill(os.getpid(), signal.SIGKILL)


class PacedCore(StubCore):
    seconds_a_step = 0.01


class FailingCore(PacedCore):
    """The third step of any request goes wrong."""

    def step(self):
        if any(count >= 2 for count in self._counts.values()):
            raise ValueError("out of luck")
        return super().step()


class StuckCore(StubCore):
    """A step that never ends."""

    seconds = 1000.0

    def step(self):
        time.sleep(self.seconds)
        return []


class BusyCore(StubCore):
    """A step that computes for a while."""

    def step(self):
        end = time.monotonic() + 3
        while time.monotonic() < end:
            sum(range(10_000))
        return super().step()


class LateCore(StubCore):
    """Its outputs reach the front end's socket later than its commands, as happens on a busy machine."""

    def __init__(self, config):
        super().__init__(config)
        (name,) = Path(tempfile.gettempdir()).glob("vllm-*/outputs")
        hidden = name.rename(name.with_name("hidden"))
        threading.Timer(0.5, lambda: hidden.exists() and hidden.rename(name)).start()


class VanishingCore(StubCore):
    """It dies when it is ready, and before its commands have reached it."""

    def __init__(self, config):
        super().__init__(config)
        (name,) = Path(tempfile.gettempdir()).glob("vllm-*/commands")
        name.rename(name.with_name("hidden"))
        threading.Timer(1, os._exit, [7]).start()


class PrintingCore(PacedCore):
    """Has something to say to an output that may have been closed."""

    def __init__(self, config):
        super().__init__(config)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                print("ready", file=stream)


class CallableCore(StubCore):
    """Has methods to be called between the steps, each of which ends in its own way."""

    def reset_prefix_cache(self):
        return True

    def start_profile(self):
        raise ValueError("it has been started")

    def stop_profile(self):
        raise OSError("the disk is full")


class LosingCore(StubCore):
    """Something is lost when the engine falls idle."""

    def check_idle(self):
        if self.worked:
            raise RuntimeError("1 page lost")

    worked = False

    def step(self):
        self.worked = True
        return super().step()


class TinyPoolCore(PacedCore):
    """Room for 32 tokens; and it drops requests that come with the token 13, as a core must not have to."""

    def __init__(self, config):
        super().__init__(config)
        self.info = EngineCoreInfo(num_blocks=3, block_size=16, num_slots=3)

    def add_request(self, request):
        if 13 in request.prompt_token_ids:
            raise ValueError("13 is not welcome")
        super().add_request(request)


class TellingCore(StubCore):
    """Says what surrounds it, in the one message that it may send before it runs."""

    def __init__(self, config):
        loaded = {name.partition(".")[0] for name in sys.modules}
        raise ValueError(repr((os.getpid(), os.getcwd(), sys.path, os.readlink("/proc/self/fd/0"), sorted(loaded))))
