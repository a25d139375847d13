"""What an import really loads, and how long it takes, each seen in a fresh interpreter."""

import json
import subprocess
import sys
import time

import pytest

from tests.structure.tree import ROOT

HEAVY = {"torch", "transformers", "triton", "numpy"}
WEB = {
    *("fastapi", "starlette", "uvicorn", "uvloop", "httptools", "aiohttp", "httpx", "requests"),
    *("openai", "zmq", "websockets", "prometheus_client", "ray", "msgspec"),
}
# `from vllm import LLM` needs torch, but the tokenizer's and the hub's libraries (and the HTTP clients that these bring) only when a
# model is loaded.
LATER = {"transformers", "huggingface_hub", "tokenizers", "xgrammar", "tvm_ffi"}


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded(statement: str) -> set[str]:
    """Top-level packages that a statement loads, on top of what the interpreter starts with."""
    code = (
        f"import sys, json\nbefore = set(sys.modules)\n{statement}\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in set(sys.modules) - before})))"
    )
    return set(json.loads(python(code).splitlines()[-1]))


def seconds(code: str) -> float:
    return float(python(f"import time\nstart = time.perf_counter()\n{code}\nprint(time.perf_counter() - start)"))


def fastest(measure, enough: float, tries: int = 6) -> float:
    """Other work on the machine can only add time."""
    best = float("inf")
    for _ in range(tries):
        best = min(best, measure())
        if best < enough:
            break
    return best


def test_the_package_alone_is_light():
    assert not loaded("import vllm") & (HEAVY | WEB | LATER)
    assert fastest(lambda: seconds("import vllm"), 0.2) < 0.2


def test_data_classes_do_not_need_torch():
    for statement in ("from vllm import SamplingParams", "from vllm import RequestOutput, CompletionOutput"):
        assert not loaded(statement) & (HEAVY | WEB | LATER), statement


def test_flags_do_not_need_torch():
    """`vllm serve --help`, and a mistyped flag, answer at once."""
    assert not loaded("from vllm import EngineArgs") & ({"torch", "transformers", "triton"} | WEB)


def test_the_engine_needs_no_web_library():
    names = loaded("from vllm import LLM")
    assert "torch" in names
    assert not names & WEB, sorted(names & WEB)
    assert not names & LATER, sorted(names & LATER)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_the_command_answers_at_once(arguments):
    def run() -> float:
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "vllm.entrypoints.cli.main", *arguments], cwd=ROOT, capture_output=True
        )
        assert done.returncode == 0, done.stderr.decode()
        return time.perf_counter() - start

    assert fastest(run, 1.0) < 1.0


def test_every_public_name_is_there():
    python("import vllm\nfor name in vllm.__all__: getattr(vllm, name)\nassert set(vllm.__all__) <= set(dir(vllm))")


def test_an_unknown_name_is_an_attribute_error():
    python(
        "import vllm\ntry: vllm.Nothing\nexcept AttributeError as e: assert 'Nothing' in str(e)\nelse: raise SystemExit(1)"
    )


def test_a_loaded_module_is_seen():
    assert "json" not in loaded("pass") and "decimal" in loaded("import decimal")
