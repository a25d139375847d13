"""The engine's process: how it starts, what it survives, and that it never outlives anybody."""

import ast
import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time

import psutil
import pytest
import zmq

from tests.structure.tree import ROOT
from tests.v1.engine.engines import assert_left_nothing, folders, make_config, resources, until
from tests.v1.engine.stub_cores import (
    BrokenCore,
    FailingCore,
    FilelessCore,
    KilledCore,
    LateCore,
    LeavingCore,
    LoadingCore,
    PacedCore,
    RefusingCore,
    StickyCore,
    StuckCore,
    TellingCore,
    VanishingCore,
)
from vllm.benchmarks.stub_core import StubCore
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.core_client import ProcessClient, ThreadClient, make_core_client
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.messages import EngineCoreRequest

pytestmark = pytest.mark.usefixtures("own_temp")

KINDS = [ProcessClient, ThreadClient]


class Session:
    """A client with what it reported."""

    def __init__(self, kind, core_class):
        self.client = kind(make_config(), core_class)
        self.messages, self.deaths = [], []

    async def __aenter__(self):
        try:
            await self.client.start(self.messages.append, self.deaths.append)
        except BaseException:
            self.client.shutdown()
            raise
        return self

    async def __aexit__(self, *_):
        self.client.shutdown()
        self.client.shutdown()

    def add(self, request_id, max_tokens=4):
        request = EngineCoreRequest(request_id, [1, 2, 3], SamplingParams(max_tokens=max_tokens), 0.0)
        self.client.add_requests([request])

    def outputs(self, request_id):
        return [o for message in self.messages for o in message.outputs if o.request_id == request_id]

    @property
    def process(self):
        return psutil.Process(self.client._process.pid)


def start_error(kind, core_class):
    async def main():
        async with Session(kind, core_class):
            pass

    before = resources()
    with pytest.raises(Exception) as caught:
        asyncio.run(main())
    assert_left_nothing(before)
    return caught.value


@pytest.mark.parametrize("kind", KINDS)
def test_requests_and_outputs(kind):
    async def main():
        async with Session(kind, StubCore) as session:
            for i in range(20):
                session.add(f"r{i}", max_tokens=1 + i)
            await until(lambda: all(o and o[-1].finish_reason for o in map(session.outputs, ids)), "outputs")
            for i, name in enumerate(ids):
                assert [t for o in session.outputs(name) for t in o.new_token_ids] == list(range(4, 5 + i))
            session.client.abort_requests(["nobody"])
            session.client.abort_requests([])
            assert not session.deaths

    ids = [f"r{i}" for i in range(20)]
    asyncio.run(main())


def test_an_engine_is_ready_when_its_outputs_can_be_heard():
    async def main():
        async with Session(ProcessClient, LateCore) as session:
            session.add("r")
            await until(lambda: session.outputs("r"), "the first output")

    asyncio.run(main())


@pytest.mark.parametrize("kind", KINDS)
def test_abort_between_steps(kind):
    async def main():
        async with Session(kind, PacedCore) as session:
            session.add("long", max_tokens=10**6)
            await until(lambda: session.outputs("long"), "the first output")
            session.client.abort_requests(["long"])
            await until(lambda: session.messages[-1].stats.num_running == 0, "the abort", seconds=1)
            count = len(session.messages)
            await asyncio.sleep(0.1)
            assert len(session.messages) == count, "an idle engine is silent"

    asyncio.run(main())


def test_an_idle_engine_does_not_spin():
    async def main():
        async with Session(ProcessClient, StubCore) as session:
            before = session.process.cpu_times()
            await asyncio.sleep(0.5)
            after = session.process.cpu_times()
            assert after.user + after.system - before.user - before.system < 0.1

    asyncio.run(main())


@pytest.mark.parametrize("kind", KINDS)
def test_errors_at_start_are_raised_here(kind, capfd, caplog):
    error = start_error(kind, RefusingCore)
    assert type(error) is ValueError and str(error) == "--max-model-len 5 is odd; use 6"
    error = start_error(kind, FilelessCore)
    assert type(error) is FileNotFoundError and str(error) == "no weights in /nowhere"
    assert "Traceback" not in capfd.readouterr().err + caplog.text
    error = start_error(kind, BrokenCore)
    assert type(error) is EngineDeadError and "RuntimeError: the device is" in str(error)
    assert "Traceback" in capfd.readouterr().err + caplog.text


def test_a_death_at_start_is_explained():
    error = start_error(ProcessClient, LeavingCore)
    assert type(error) is EngineDeadError and "exit code 7" in str(error)
    error = start_error(ProcessClient, KilledCore)
    assert type(error) is EngineDeadError and "SIGKILL" in str(error)


@pytest.mark.timeout(60)
def test_a_death_between_ready_and_the_first_command_is_one_at_start():
    error = start_error(ProcessClient, VanishingCore)
    assert type(error) is EngineDeadError and "exit code 7" in str(error)


def test_what_is_sent_to_an_engine_that_has_just_died_is_no_error():
    """Who sends cannot know yet; the death is told in a moment, with its reason."""

    async def main():
        async with Session(ProcessClient, PacedCore) as session:
            session.process.kill()
            session.client._process.wait()
            while session.client._commands.poll(0, zmq.POLLOUT):
                time.sleep(0.001)
            session.add("r")
            session.client.abort_requests(["r"])
            session.client.call(1, "reset_prefix_cache")
            assert not session.deaths
            await until(lambda: session.deaths, "the death", seconds=1)

    asyncio.run(main())


def loading_and_shut_down(core_class, capfd):
    """What an engine prints that is left while its progress bar is there."""

    def said():
        printed.append(capfd.readouterr().err)
        return "Loading weights" in "".join(printed)

    printed = []
    client = ProcessClient(make_config(), core_class)
    asyncio.run(until(said, "the progress bar", seconds=30))
    client.shutdown()
    assert client._process.returncode == 0, "it was killed"
    said()
    return "".join(printed)


def test_who_speaks_after_an_engine_that_was_loading_has_a_line_to_himself(capfd):
    assert loading_and_shut_down(LoadingCore, capfd).endswith("\n")


def test_a_progress_bar_that_cannot_be_ended_does_not_keep_an_engine(capfd):
    loading_and_shut_down(StickyCore, capfd)


def test_the_surroundings_are_those_of_the_parent(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "more"))
    pid, cwd, path, stdin, loaded = ast.literal_eval(str(start_error(ProcessClient, TellingCore)))
    assert pid != os.getpid() and cwd == str(tmp_path) and path == sys.path and stdin == os.devnull
    web = {"fastapi", "starlette", "uvicorn", "pydantic", "prometheus_client", "openai", "transformers", "pytest"}
    assert not web & set(loaded)


def test_a_killed_engine_is_noticed_at_once():
    async def main():
        async with Session(ProcessClient, PacedCore) as session:
            session.add("r", max_tokens=10**6)
            await until(lambda: session.outputs("r"), "the first output")
            session.process.kill()
            await until(lambda: session.deaths, "the death", seconds=1)
            assert session.deaths == ["the engine process was killed by signal 9 (SIGKILL)"]

    asyncio.run(main())


@pytest.mark.parametrize("kind", KINDS)
def test_a_failing_step_ends_the_engine_with_its_reason(kind, capfd, caplog):
    async def main():
        async with Session(kind, FailingCore) as session:
            session.add("r", max_tokens=10)
            await until(lambda: session.deaths, "the death")
            assert len(session.deaths) == 1 and "ValueError: out of luck" in session.deaths[0]
            if kind is ProcessClient:
                assert session.client._process.wait(5) == 1

    asyncio.run(main())
    # The other process has only its stderr; in this one the handler may write to an earlier test's.
    log = capfd.readouterr().err if kind is ProcessClient else caplog.text
    assert log.count("The engine failed") == 1 and "Traceback" in log


def test_signals_of_the_terminal_leave_the_engine_alone():
    async def main():
        async with Session(ProcessClient, PacedCore) as session:
            session.add("r", max_tokens=20)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
                session.process.send_signal(number)
            await until(lambda: session.outputs("r") and session.outputs("r")[-1].finish_reason, "the end")
            assert os.getsid(session.process.pid) != os.getsid(0)

    asyncio.run(main())


def test_a_step_that_never_ends_does_not_hold_the_end_up():
    async def main():
        async with Session(ProcessClient, StuckCore) as session:
            session.add("r")
            await asyncio.sleep(0.1)
            process, start = session.process, time.monotonic()
        assert time.monotonic() - start < 1 and not process.is_running()

    asyncio.run(main())


def test_shutdown_while_starting():
    async def main(kind):
        client = kind(make_config(), StubCore)
        starting = asyncio.ensure_future(client.start(print, print))
        await asyncio.sleep(0)
        client.shutdown()
        with pytest.raises(EngineDeadError, match="shut down"):
            await starting

    for kind in KINDS:
        before = resources()
        asyncio.run(main(kind))
        assert_left_nothing(before)


PARENT = """
    import asyncio, os, sys, time
    from tests.v1.engine.engines import make_config
    from tests.v1.engine.stub_cores import PrintingCore
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.core_client import ProcessClient
    from vllm.v1.engine.messages import EngineCoreRequest

    async def main():
        client = ProcessClient(make_config(), PrintingCore)
        if {started}:
            await client.start(lambda message: None, print)
            client.add_requests([EngineCoreRequest("r", [1], SamplingParams(max_tokens=10**6), 0.0)])
        os.write({report}, b"%d\\n" % client._process.pid)
        if {forget}:
            return
        time.sleep(100)

    asyncio.run(main())
"""


def is_gone(pid):
    """Orphans go to an init that may be slow to collect them: a zombie is gone for all that matters."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize(("started", "forget"), [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize("heard", [True, False])
def test_the_engine_goes_with_its_parent(monkeypatch, started, forget, heard):
    """Whether that is killed, during the start or later, or just ends without a word; and whoever read what both print may have gone."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    before = folders()
    report, reported = os.pipe()
    reader, printed = os.pipe()
    code = textwrap.dedent(PARENT).format(started=started, forget=forget, report=reported)
    if not heard:
        os.close(reader)
    parent = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=printed, stderr=printed, pass_fds=[reported]
    )
    for end in (printed, reported):
        os.close(end)
    try:
        pid = int(os.read(report, 20))
        if not forget:
            time.sleep(0.2)
            parent.kill()
        assert parent.wait(10) == (0 if forget else -signal.SIGKILL)
        asyncio.run(until(lambda: is_gone(pid), "the engine outlived its parent", seconds=10))
        assert folders() == before
    finally:
        parent.kill()
        for end in (report, *([reader] if heard else [])):
            os.close(end)


def test_a_long_temporary_folder_is_no_obstacle(monkeypatch, tmp_path):
    deep = tmp_path / ("x" * 90)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))

    async def main():
        async with Session(ProcessClient, StubCore) as session:
            session.add("r")
            await until(lambda: session.outputs("r"), "outputs")

    asyncio.run(main())
    assert not list(deep.iterdir())


def test_the_environment_chooses(monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    client = make_core_client(make_config(), StubCore)
    assert type(client) is ThreadClient
    client.shutdown()
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING")
    client = make_core_client(make_config(), StubCore)
    assert type(client) is ProcessClient
    client.shutdown()
