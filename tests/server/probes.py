"""What a server says about itself, and what it takes."""

import contextlib
import re
import time

import psutil

_SAMPLE = re.compile(r"^vllm:(\w+)(?:\{([^}]*)\})? (\S+)$", re.MULTILINE)


def metric(server, name: str, **labels: str) -> float:
    """The sum of a metric's samples that have these labels."""
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    found = [
        float(value)
        for sample, given, value in _SAMPLE.findall(server.http.get("/metrics").text)
        if sample == name and all(label in given for label in wanted)
    ]
    assert found, f"no metric vllm:{name} with {labels}"
    return sum(found)


def held(server) -> dict[str, float]:
    """What requests hold; all zero on a server with nothing to do."""
    return {
        "load": server.http.get("/load").json()["server_load"],
        **{
            name: metric(server, name)
            for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        },
    }


def until(condition, seconds: float, what=lambda: "it") -> float:
    """Wait for something that is true soon; how long it took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() < start + seconds, f"{what()} did not come true within {seconds} s"
        time.sleep(0.02)
    return time.monotonic() - start


def until_idle(server, seconds: float = 1.0) -> float:
    """Wait until requests hold nothing; how long it took."""
    return until(
        lambda: not any(held(server).values()), seconds, lambda: f"an idle server, which is at {held(server)},"
    )


def resident(server) -> dict[str, int]:
    """Megabytes of memory of the server's process and of the engine's."""
    processes = {"server": psutil.Process(server.process.pid), "engine": server.engine()}
    return {name: process.memory_info().rss >> 20 for name, process in processes.items()}


def work(server) -> float:
    """Seconds of the processor's time that the server, and whatever it has started, have used so far."""
    process = psutil.Process(server.process.pid)
    seconds = sum(process.cpu_times()[:4])  # with what those used that have ended
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            seconds += sum(child.cpu_times()[:2])
    return seconds


def works(server) -> None:
    """A good request gets its right answer."""
    done = server.complete("12+34=", stop="\n", max_tokens=4)
    assert done["choices"][0]["text"] == "46", done
