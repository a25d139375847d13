"""Hostile constraints are refused in bounded time, and what comes after them works."""

import asyncio
import contextlib
import json
import threading
import time

import pytest

from tests.v1.structured_output.vocabularies import VOCABULARY, large_vocabulary
from vllm.sampling_params import StructuredOutputsParams as Params
from vllm.v1.structured_output import checker as checker_module
from vllm.v1.structured_output.checker import GrammarChecker

GOOD = Params(regex="[0-9]+")


def nested(levels: int) -> dict:
    schema: dict = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


HOSTILE = {
    "repetitions of repetitions": Params(regex="((a{1,100}){1,100}){1,100}"),
    "parentheses": Params(regex="(" * 50000 + "a" + ")" * 50000),
    "parentheses of a grammar": Params(grammar="root ::= " + "(" * 50000 + '"a"' + ")" * 50000),
    "lookahead": Params(regex="(?=a)b"),
    "a reference back": Params(regex="(a)\\1"),
    "nothing matches": Params(regex="[^\\s\\S]"),
    "not a grammar": Params(grammar="{{{{"),
    "no rule": Params(grammar='root ::= "a" nope'),
    "no root": Params(grammar='x ::= "a"'),
    "a schema that is itself": Params(json={"$ref": "#"}),
    "a circle": Params(json={"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}),
    "not a type": Params(json={"type": "integr"}),
    "nowhere": Params(json={"$ref": "#/$defs/nope"}),
    "a numeral too large": Params(json={"type": "integer", "minimum": -(10**40)}),
    "not a format": Params(structural_tag={"type": "structural_tag", "format": {"type": "nonsense"}}),
}
FINE = {
    "levels": Params(json=nested(15)),
    "many properties": Params(json={"type": "object", "properties": {f"k{i}": {"type": "string"} for i in range(500)}}),
    "an exponent in a classic": Params(regex="(x+x+)+y"),
    "another classic": Params(regex="((a*)*)*b"),
    "branches of branches": Params(
        json={
            "$defs": {
                **{f"d{i}": {"anyOf": [{"type": "array", "items": {"$ref": f"#/$defs/d{i + 1}"}}, {"type": "null"}]} for i in range(25)},
                "d25": {"type": "string"},
            },
            "$ref": "#/$defs/d0",
        }
    ),
    "a billion items": Params(json={"type": "array", "items": {"type": "integer"}, "minItems": 10**9}),
    "left recursion": Params(grammar='root ::= root "a" | "a"'),
    "choices": Params(choice=["yes", "né\"o\n", "\\"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def checker():
    checker = GrammarChecker(lambda: large_vocabulary(60_000))
    checker.check(GOOD)
    yield checker
    checker.shutdown()


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_constraints_are_refused(checker, name):
    start = time.monotonic()
    with pytest.raises(ValueError) as error:
        checker.check(HOSTILE[name])
    assert "\n" not in str(error.value) and len(str(error.value)) < 400 and "/cpp/" not in str(error.value)
    assert time.monotonic() - start < checker_module.WALL_SECONDS + 10
    start = time.monotonic()
    with pytest.raises(ValueError):
        checker.check(HOSTILE[name])
    assert time.monotonic() - start < 0.5


@pytest.mark.parametrize("name", FINE)
def test_what_only_looks_hostile_passes(checker, name):
    checker.check(FINE[name])


@pytest.mark.parametrize("regex", [".{1,100000}x", "|".join("a" * i for i in range(1, 500))])
def test_what_is_costly_gets_an_answer_in_bounded_time(checker, regex):
    start = time.monotonic()
    with contextlib.suppress(ValueError):
        checker.check(Params(regex=regex))
    assert time.monotonic() - start < checker_module.WALL_SECONDS + 10
    checker.check(Params(regex=f"after {len(regex)}"))


def test_one_that_takes_too_long_ends_its_process_only(monkeypatch):
    monkeypatch.setattr(checker_module, "CPU_SECONDS", 0.3)
    checker = GrammarChecker(lambda: large_vocabulary(60_000))
    try:
        checker.check(GOOD)
        before = checker._process._process.pid
        with pytest.raises(ValueError, match=r"takes more than 0.3 s"):
            checker.check(Params(regex=".{1,100000}x"))
        checker.check(Params(regex="after[0-9]"))
        assert checker._process._process.pid != before
    finally:
        checker.shutdown()


def test_an_event_loop_goes_on_meanwhile(checker):
    async def run() -> int:
        check = asyncio.ensure_future(checker.check_async(Params(regex="(new){1,2000}[a-z]{1,3000}")))
        ticks = 0
        while not check.done():
            await asyncio.sleep(0.001)
            ticks += 1
        check.exception()
        start = time.monotonic()
        await checker.check_async(GOOD)
        assert time.monotonic() - start < 0.1
        with pytest.raises(ValueError, match="must have an object"):
            await checker.check_async(Params(json={"items": 3}))
        return ticks

    assert asyncio.run(run()) > 1


def test_each_constraint_is_checked_once():
    loaded = []
    checker = GrammarChecker(lambda: loaded.append(1) or VOCABULARY)
    try:
        for _ in range(3):
            checker.check(GOOD)
            checker.check(Params(json={"type": "integer"}))
            checker.check(Params(json=json.dumps({"type": "integer"}, indent=1)))
        assert loaded == [1] and len(checker._verdicts) == 2
        checker._process._process.kill()
        checker._process._process.wait()
        checker.check(GOOD)
        checker.check(Params(regex="a"))
    finally:
        checker.shutdown()
    assert checker._process._process is None


@pytest.mark.parametrize("when", ["before the process is started", "while it starts"])
def test_an_end_comes_before_the_check_under_way(when):
    """Which then ends too, and leaves no process behind."""
    loading, go_on, errors = threading.Event(), threading.Event(), []

    def load():
        loading.set()
        assert go_on.wait(30)
        return VOCABULARY

    def check():
        try:
            checker.check(GOOD)
        except Exception as error:
            errors.append(error)

    checker = GrammarChecker(load)
    thread = threading.Thread(target=check)
    thread.start()
    assert loading.wait(30)
    if when == "while it starts":
        go_on.set()
        while checker._process._process is None:
            time.sleep(0.001)
    checker.shutdown()
    go_on.set()
    thread.join(30)
    assert not thread.is_alive() and checker._process._process is None
    assert [type(error) for error in errors] == [ValueError], errors
    checker.check(GOOD)
    checker.shutdown()


def test_a_process_that_cannot_start_is_an_error_of_one_line(monkeypatch):
    monkeypatch.setattr(checker_module.sys, "executable", "/bin/false")
    checker = GrammarChecker(lambda: VOCABULARY)
    with pytest.raises(ValueError, match="does not work here"):
        checker.check(GOOD)
