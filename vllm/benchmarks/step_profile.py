"""Where a decode step's time goes: kernels by component, from torch.profiler.

Hooks on the model's modules mark which component launches a kernel. Kernels of a CUDA graph are launched by nobody in particular: they are
attributed by name and grid, in the proportions of a run without graphs (`learn`, in a process of its own). On a CPU, operators stand for kernels.
"""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, record_function

from vllm.benchmarks.decode_run import greedy_params, random_prompts
from vllm.benchmarks.variants import RUN_TIME

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

COMPONENT, STEP = "component:", "bench step"
REST = "sampling and the rest"
_GPU_WORK = {"kernel", "gpu_memcpy", "gpu_memset"}
_LAUNCHES = {"cuda_runtime", "cuda_driver"}
_WARM_STEPS = 3
_MAX_KERNELS = 12

_COMPONENTS = [
    (r"linear_attn\.in_proj\w*$", "GDN in_proj"),
    (r"linear_attn\.out_proj$", "GDN out_proj"),
    (r"linear_attn(\.norm)?$", "GDN core"),
    (r"self_attn\.(qkv|o)_proj$", "attention projections"),
    (r"self_attn(\..*)?$", "attention"),
    (r"mlp\.(gate|shared_expert_gate)$", "router"),
    (r"mlp\.shared_expert$", "shared expert"),
    (r"mlp\.experts$", "routed experts"),
    (r"mlp$", "feed-forward"),
    (r"(^|_layer)norm$", "norms"),
    (r"embed_tokens$", "embeddings"),
    (r"lm_head$", "lm_head"),
]


@dataclass(frozen=True)
class Kernel:
    """One kernel (or CPU operator) that ran in a measured step."""

    name: str
    grid: str
    us: float
    component: str | None  # None: launched by a CUDA graph
    start: float | None = None  # us, on the GPU's clock


def component_of(path: str) -> str | None:
    """A module's path in the model -> its component; None: whatever its parent is."""
    return next((name for pattern, name in _COMPONENTS if re.search(pattern, path)), None)


def profile_steps(engine: LLMEngine, concurrency: int, input_len: int, steps: int = 8) -> tuple[list[Kernel], int]:
    """The kernels of decode steps of `concurrency` sequences, in the order they ran, and the number of steps. The engine must be idle.

    Raises:
        ValueError: --max-model-len leaves no room for steps in which all sequences decode.
    """
    config = engine.config
    vocab, cuda = config.hf_config.text.vocab_size, config.parallel_config.device == "cuda"
    output_len = config.model_config.max_model_len - input_len
    prompt_steps = -(-concurrency * input_len // config.scheduler_config.max_num_batched_tokens)
    steps = min(steps, output_len - prompt_steps - _WARM_STEPS - 1)
    if steps < 1:
        raise ValueError(
            f"{output_len} output tokens are too few to profile steps of {concurrency} sequences: raise --output-len"
        )
    params = greedy_params(output_len)
    ids = [f"profile-{i}" for i in range(concurrency)]
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    firsts = sum(engine.metrics.time_to_first_token.counts)
    try:
        for request_id, prompt in zip(ids, random_prompts(concurrency, input_len, vocab)):
            engine.add_request(request_id, {"prompt_token_ids": prompt}, params)
        while sum(engine.metrics.time_to_first_token.counts) - firsts < concurrency:
            engine.step()
        for _ in range(_WARM_STEPS):
            engine.step()
        with _marked(engine.core.worker.runner.model), torch.profiler.profile(activities=activities) as profile:
            for _ in range(steps):
                with record_function(STEP):
                    engine.step()
            if cuda:
                torch.cuda.synchronize()
    finally:
        engine.abort_requests(ids)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        return kernels_of(json.loads(path.read_text())), steps


@contextlib.contextmanager
def _marked(model: nn.Module) -> Iterator[None]:
    """While open, modules that are components record when they run."""
    open_ranges: list[record_function] = []

    def enter(name: str):
        def hook(module: nn.Module, args: Any) -> None:
            open_ranges.append(record_function(COMPONENT + name))
            open_ranges[-1].__enter__()

        return hook

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    handles = []
    for path, module in model.named_modules():
        if (name := component_of(path)) is not None:
            handles += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def kernels_of(trace: dict[str, Any]) -> list[Kernel]:
    """The kernels of a trace in Chrome's format, as torch.profiler writes it. Only what ran inside marked steps."""
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    marks = [event for event in events if event.get("cat") == "user_annotation"]
    work = sorted((event for event in events if event.get("cat") in _GPU_WORK), key=lambda event: event["ts"])
    if not work:
        return _cpu_kernels([event for event in events if event.get("cat") == "cpu_op"], marks)
    launches = {
        event["args"]["correlation"]: event
        for event in events
        if event.get("cat") in _LAUNCHES and "correlation" in event.get("args", {})
    }
    known = [
        (event, launches[event["args"]["correlation"]])
        for event in work
        if event["args"].get("correlation") in launches
    ]
    inside = _innermost([launch for _, launch in known], marks)
    found = []
    for (event, launch), (in_step, component) in zip(known, inside):
        if in_step:
            by_graph = "GraphLaunch" in launch["name"]
            grid = "x".join(map(str, event["args"].get("grid", ())))
            found.append(
                Kernel(event["name"], grid, event["dur"], None if by_graph else component or REST, event["ts"])
            )
    return found


def _cpu_kernels(operators: list[dict[str, Any]], marks: list[dict[str, Any]]) -> list[Kernel]:
    """Operators with the time that they spent in no other one."""
    found = []
    by_thread: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for event in operators:
        by_thread[event["tid"]].append(event)
    for thread in by_thread.values():
        thread.sort(key=lambda event: (event["ts"], -event["dur"]))
        own = [event["dur"] for event in thread]
        stack: list[int] = []
        for i, event in enumerate(thread):
            while stack and _end(thread[stack[-1]]) <= event["ts"]:
                stack.pop()
            if stack:
                own[stack[-1]] -= event["dur"]
            stack.append(i)
        for event, us, (in_step, component) in zip(thread, own, _innermost(thread, marks)):
            if in_step:
                found.append(Kernel(event["name"], "", max(us, 0.0), component or REST))
    return found


def _innermost(events: list[dict[str, Any]], marks: list[dict[str, Any]]) -> list[tuple[bool, str | None]]:
    """For each event: whether a step's mark holds it, and the innermost component's mark that does."""
    result: list[tuple[bool, str | None]] = [(False, None)] * len(events)
    marks_of: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for mark in marks:
        marks_of[mark["tid"]].append(mark)
    order = sorted(range(len(events)), key=lambda i: events[i]["ts"])
    for thread, own in marks_of.items():
        own.sort(key=lambda mark: (mark["ts"], -mark["dur"]))
        stack: list[dict[str, Any]] = []
        at = 0
        for i in order:
            if events[i]["tid"] != thread:
                continue
            now = events[i]["ts"]
            while at < len(own) and own[at]["ts"] <= now:
                stack.append(own[at])
                at += 1
            # A mark may end before one that was opened later and is over too.
            stack = [mark for mark in stack if _end(mark) > now]
            names = [mark["name"] for mark in stack if mark["name"].startswith(COMPONENT)]
            component = names[-1].removeprefix(COMPONENT) if names else None
            result[i] = (any(mark["name"] == STEP for mark in stack), component)
    return result


def _end(event: dict[str, Any]) -> float:
    return event["ts"] + event["dur"]


Learnt = dict[tuple[str, str], dict[str, float]]
"""(kernel, grid) -> share of its time by component."""


def learn(kernels: list[Kernel]) -> Learnt:
    """From a run without graphs. A kernel is looked up by name alone, under the grid "", where its grid was not seen."""
    us: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for kernel in kernels:
        for key in {(kernel.name, kernel.grid), (kernel.name, "")}:
            us[key][kernel.component or REST] += kernel.us
    return {
        key: {name: part / sum(parts.values()) for name, part in parts.items()}
        for key, parts in us.items()
        if sum(parts.values())
    }


def idle_share(kernels: list[Kernel]) -> float:
    """Of the time from the first kernel's start to the last one's end, what none of them covers. Kernels may overlap."""
    idle, begin, end = 0.0, None, 0.0
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        if begin is None:
            begin = end = kernel.start
        idle += max(kernel.start - end, 0.0)
        end = max(end, kernel.start + kernel.us)
    return idle / (end - begin) if begin is not None and end > begin else 0.0


def summarise(kernels: list[Kernel], steps: int, learnt: Learnt | None = None) -> dict[str, Any]:
    """Kernels a step and microseconds a step, by component and by kernel, largest first; of a GPU's, how much of the time it is idle."""
    learnt = learnt or {}
    total: dict[str, float] = defaultdict(float)
    count: dict[str, float] = defaultdict(float)
    inner: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(lambda: [0.0, 0.0]))
    for kernel in kernels:
        if kernel.component is not None:
            parts = {kernel.component: 1.0}
        else:
            parts = learnt.get((kernel.name, kernel.grid)) or learnt.get((kernel.name, "")) or {"unknown": 1.0}
        for name, part in parts.items():
            total[name] += part * kernel.us / steps
            count[name] += part / steps
            row = inner[name][kernel.name]
            row[0] += part / steps
            row[1] += part * kernel.us / steps
    busy = sum(total.values())
    components = []
    for name in sorted(total, key=total.__getitem__, reverse=True):
        rows = sorted(inner[name].items(), key=lambda item: -item[1][1])[:_MAX_KERNELS]
        components.append(
            {
                "name": name,
                "us_a_step": total[name],
                "share": total[name] / busy if busy else 0.0,
                "kernels_a_step": count[name],
                "kernels": [{"name": kernel, "calls_a_step": calls, "us_a_step": us} for kernel, (calls, us) in rows],
            }
        )
    found = {"steps": steps, "busy_us_a_step": busy, "kernels_a_step": sum(count.values()), "components": components}
    return found | ({"idle_share": idle_share(kernels)} if all(kernel.start is not None for kernel in kernels) else {})


def run_job(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """What `learn` needs for each of the variants, from an engine without CUDA graphs."""
    from vllm.entrypoints.llm import LLM

    engine = LLM(**spec["engine"], enforce_eager=True).llm_engine
    tables = []
    for settings in spec["settings"]:
        engine.set_gdn_variants(**{RUN_TIME[name]: value for name, value in settings.items() if name in RUN_TIME})
        learnt = learn(
            [kernel for n in spec["concurrency"] for kernel in profile_steps(engine, n, spec["input_len"])[0]]
        )
        tables.append([[name, grid, parts] for (name, grid), parts in learnt.items()])
    return tables


def learnt_from(table: list[Any]) -> Learnt:
    """One of `run_job`'s tables."""
    return {(name, grid): parts for name, grid, parts in table}
