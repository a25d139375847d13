"""Imports go down: entrypoints, v1/engine, v1/core, v1/worker, model_executor, ops, and at the bottom what all of them use."""

import pytest

import vllm
from tests.structure.tree import ROOT, imports, module_name, package_files

# A module may import what has its own rank or a lower one. The longest matching prefix counts.
RANK = {
    "vllm": 0,
    "vllm.version": 0,
    "vllm.envs": 0,
    "vllm.logger": 0,
    "vllm.utils": 0,
    "vllm.config": 1,
    # Plain data that one layer hands to the next
    "vllm.sampling_params": 2,
    "vllm.outputs": 2,
    "vllm.forward_context": 2,
    "vllm.v1": 2,
    "vllm.v1.outputs": 2,
    "vllm.v1.request": 2,
    "vllm.v1.engine.messages": 2,
    "vllm.v1.core.sched.output": 2,
    "vllm.v1.core.memory_plan": 2,
    # Kernels, then what is built of them
    "vllm._custom_ops": 3,
    "vllm.model_executor.layers.fla": 3,
    "vllm.model_executor.layers.mamba.ops": 3,
    "vllm.model_executor.layers.fused_moe.ops": 3,
    "vllm.model_executor.layers.quantization.ops": 3,
    "vllm.model_executor.layers.ops": 3,
    "vllm.distributed": 3,
    "vllm.model_executor": 4,
    "vllm.model_executor.layers": 4,
    "vllm.model_executor.models": 5,
    "vllm.model_executor.model_loader": 6,
    # The engine
    "vllm.v1.attention": 7,
    "vllm.v1.sample": 7,
    "vllm.v1.spec_decode": 7,
    "vllm.v1.structured_output": 7,
    "vllm.v1.worker": 7,
    "vllm.v1.core": 8,
    "vllm.v1.metrics": 8,
    "vllm.engine": 9,
    "vllm.v1.engine": 9,
    # What users call
    "vllm.reasoning": 10,
    "vllm.tool_parsers": 10,
    "vllm.entrypoints": 10,
    "vllm.benchmarks": 10,
}

# The scheduler decides on the CPU from lengths and counts: it must not reach for what runs on the device.
NEVER = {
    "vllm.v1.core": ("vllm.v1.worker", "vllm.v1.attention", "vllm.v1.sample", "vllm.model_executor", "torch", "triton"),
    "vllm.config": ("triton", "transformers"),
}

# Libraries of the HTTP server. The in-process engine does without them.
WEB = ("fastapi", "starlette", "uvicorn", "uvloop", "httptools", "sse_starlette", "pydantic", "prometheus_client")
WEB_HOME = ("vllm.entrypoints.openai", "vllm.v1.metrics", "vllm.benchmarks.http_client")


def within(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def resolve(target: str) -> str:
    """A public name of the package stands for the module it comes from."""
    head, _, name = target.rpartition(".")
    return vllm._HOME[name] if head == "vllm" and name in vllm._HOME else target


def rank(module: str) -> int:
    known = [prefix for prefix in RANK if within(module, prefix)]
    return RANK[max(known, key=len)]


def has_rank(module: str) -> bool:
    return any(within(module, prefix) for prefix in RANK if prefix not in ("vllm", "vllm.v1")) or module in RANK


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    found = []
    for line, written in imports(source, module, is_package):
        target = resolve(written)
        problem = None
        if within(target, "vllm") and rank(target) > rank(module):
            problem = "is above it"
        for prefix, banned in NEVER.items():
            if within(module, prefix) and any(within(target, other) for other in banned):
                # plain data is let through: it imports nothing of the device either
                if within(target, "vllm") and rank(target) <= 2:
                    continue
                problem = f"must stay out of {prefix}"
        if any(within(target, web) for web in WEB) and not any(within(module, home) for home in WEB_HOME):
            problem = "belongs to the HTTP server"
        if problem:
            found.append(f"{module}:{line} imports {target}, which {problem}")
    return found


def test_imports_go_down():
    found = []
    for path in package_files():
        found += violations(path.read_text(), module_name(path), path.name == "__init__.py")
    assert not found, "\n".join(found)


def test_every_module_has_a_rank():
    unknown = [name for path in package_files() if not has_rank(name := module_name(path))]
    assert not unknown, f"give these a place in RANK: {unknown}"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("vllm.v1.core.sched.scheduler", "from vllm.v1.worker.model_runner import ModelRunner"),
        ("vllm.v1.core.block_pool", "def f():\n    import torch"),
        ("vllm.v1.core.block_pool", "from ..sample import sampler"),
        ("vllm.v1.worker.gpu_worker", "from vllm.v1.core.sched.scheduler import Scheduler"),
        ("vllm.v1.worker.gpu_worker", "from vllm import LLM"),
        ("vllm.model_executor.layers.linear", "from vllm.model_executor.models import registry"),
        ("vllm.model_executor.layers.fla.ops.chunk", "from vllm.model_executor.layers.linear import Linear"),
        ("vllm.config.model", "import vllm.v1.engine.core"),
        ("vllm.utils.torch_utils", "from importlib import import_module\nimport_module('vllm.config')"),
        ("vllm.entrypoints.llm", "def f():\n    from fastapi import FastAPI"),
    ],
)
def test_an_import_that_goes_up_is_seen(module, source):
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("vllm.entrypoints.llm", "from vllm.v1.engine.llm_engine import LLMEngine\nimport torch"),
        ("vllm.v1.worker.model_runner", "from vllm.v1.core.sched.output import SchedulerOutput"),
        ("vllm.v1.core.sched.scheduler", "from vllm.v1.core.sched.output import SchedulerOutput"),
        ("vllm.v1.core.sched.scheduler", "if TYPE_CHECKING:\n    from vllm.v1.worker.model_runner import ModelRunner"),
        ("vllm.entrypoints.openai.api_server", "from fastapi import FastAPI"),
        ("vllm.v1.worker.gpu_worker", "from .model_runner import ModelRunner"),
    ],
)
def test_an_import_that_goes_down_is_not(module, source):
    assert violations(source, module) == []


def test_relative_imports_resolve():
    source = "from . import a\nfrom ..b import c\nfrom .d.e import f"
    assert [i.target for i in imports(source, "p.q.m")] == ["p.q.a", "p.b.c", "p.q.d.e.f"]
    assert [i.target for i in imports(source, "p.q", is_package=True)] == ["p.q.a", "p.b.c", "p.q.d.e.f"]
    assert (ROOT / "vllm").is_dir()
