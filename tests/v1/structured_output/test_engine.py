"""Constrained requests through the whole engine, on the bundled checkpoint at temperatures at which it writes noise."""

import json
import re

import jsonschema
import pytest

from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams as Structured
from vllm.tool_parsers import ToolParserManager
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.engine.serialization import decode_command, encode_command
from vllm.v1.structured_output.tool_grammar import tool_call_constraint

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["a", "b c"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
        "point": {"type": "object", "properties": {"x": {"type": "number", "minimum": 0, "maximum": 9}}, "required": ["x"]},
    },
    "required": ["name", "age", "kind", "tags"],
}  # fmt: skip
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"unit": {"enum": ["C", "F"]}, "days": {"type": "integer", "maximum": 99, "minimum": 0}},
            "required": ["unit"],
        },
    },
}
PROMPTS = ["12+34=", "Count from 3 to 6:", 'Reverse the word "stone".', "{"]
JSON = Structured(json=SCHEMA)


def engine(model, max_model_len=512, **limits) -> LLM:
    return LLM(model=str(model), max_model_len=max_model_len, use_tqdm_on_load=False, **limits)


@pytest.fixture(scope="module")
def llm(tiny_model):
    llm = engine(tiny_model, max_num_seqs=8)
    yield llm
    llm.llm_engine.grammar_checker.shutdown()


def generate(llm, prompts, params):
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert not llm.llm_engine.core.has_unfinished_requests
    llm.llm_engine.core.check_idle()
    return outputs


def noise(structured, seed, **changes) -> SamplingParams:
    defaults = {"temperature": 3.0, "top_p": 0.95, "max_tokens": 120}
    return SamplingParams(seed=seed, structured_outputs=structured, **{**defaults, **changes})


def valid(text: str) -> bool:
    jsonschema.Draft202012Validator(SCHEMA).validate(json.loads(text))
    return True


CHECKS = {
    "schema": (JSON, valid),
    "schema in one line": (Structured(json=SCHEMA, disable_any_whitespace=True), lambda t: valid(t) and "\n" not in t),
    "schema as text": (Structured(json=json.dumps(SCHEMA)), valid),
    "regex": (Structured(regex=r"(\d{1,3}\.){3}\d{1,3}"), lambda t: re.fullmatch(r"(\d{1,3}\.){3}\d{1,3}", t)),
    "choice": (Structured(choice=["yes", "no, never", "né\"o\n"]), lambda t: t in ("yes", "no, never", "né\"o\n")),
    "grammar": (Structured(grammar='root ::= pair{2,3}\npair ::= "<" [a-c]{1,4} ">"'), lambda t: re.fullmatch(r"(<[a-c]{1,4}>){2,3}", t)),
    "object": (Structured(json_object=True), lambda t: isinstance(json.loads(t), dict)),
    "tag": (
        Structured(structural_tag={"structures": [{"begin": "<n>", "schema": {"type": "integer"}, "end": "</n>"}], "triggers": ["<n>"]}),
        lambda t: all(re.fullmatch(r"\s*-?\d+\s*", part.partition("</n>")[0]) for part in t.split("<n>")[1:]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKS)
def test_whatever_is_sampled_has_the_form(llm, name):
    structured, check = CHECKS[name]
    params = [noise(structured, seed) for seed in range(12)]
    outputs = generate(llm, PROMPTS * 3, params)
    ended = [o.outputs[0] for o in outputs if o.outputs[0].finish_reason == "stop"]
    assert len(ended) >= (1 if name in ("object", "tag") else 5), [o.outputs[0].text for o in outputs]
    for completion in ended:
        assert check(completion.text), completion.text
    assert all(o.outputs[0].finish_reason in ("stop", "length") for o in outputs)
    if name not in ("object", "tag"):
        assert len({completion.text for completion in ended}) > 1


@pytest.mark.parametrize("format_name", ["qwen3_coder", "hermes"])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_that_must_be_made_is_made(llm, format_name, choice):
    structured = tool_call_constraint([TOOL], choice, format_name, parallel=False)
    for output in generate(llm, PROMPTS * 3, [noise(structured, seed) for seed in range(12)]):
        parser = ToolParserManager.get_tool_parser(format_name)([TOOL])
        if output.outputs[0].finish_reason == "stop":
            [call] = parser.extract_tool_calls(output.outputs[0].text).tool_calls
            assert call.name == "weather"
            jsonschema.validate(json.loads(call.arguments), TOOL["function"]["parameters"])
    assert any(o.outputs[0].finish_reason == "stop" for o in generate(llm, PROMPTS, noise(structured, 5)))


def test_thinking_is_free_and_what_follows_has_the_form(llm):
    params = noise(Structured(json=SCHEMA, begin_after="</think>"), 3, temperature=1.0, max_tokens=300, ignore_eos=True)
    chats = [[{"role": "user", "content": f"What is {i}+34?"}] for i in range(6)]
    outputs = llm.chat(chats, params, use_tqdm=False)
    ended = 0
    for output in outputs:
        _, found, text = output.outputs[0].text.partition("</think>")
        if output.outputs[0].finish_reason == "stop":
            assert found and valid(text), output.outputs[0].text
            ended += 1
    assert ended >= 3


def test_neighbours_change_nothing(llm):
    """A request gets the same tokens alone and among others, constrained ones get theirs, and free ones do not notice them."""
    free = [SamplingParams(temperature=1.0, seed=seed, max_tokens=30) for seed in range(4)]
    bound = [noise(structured, seed) for seed, (structured, _) in enumerate([*CHECKS.values()][:4])]
    together = generate(llm, PROMPTS * 2, free + bound)
    alone = [generate(llm, [prompt], params)[0] for prompt, params in zip(PROMPTS * 2, free + bound, strict=True)]
    assert [o.outputs[0].token_ids for o in together] == [o.outputs[0].token_ids for o in alone]


def test_preemption_and_short_steps_change_nothing(llm, tiny_model):
    params = [noise(structured, seed) for seed, (structured, _) in enumerate([*CHECKS.values()][:6])]
    prompts = [prompt * 4 for prompt in PROMPTS] + PROMPTS[:2]
    expected = [o.outputs[0].token_ids for o in generate(llm, prompts, params)]
    small = engine(tiny_model, 192, max_num_seqs=8, num_gpu_blocks_override=14, max_num_batched_tokens=8)
    small.llm_engine.grammar_checker = llm.llm_engine.grammar_checker
    assert [o.outputs[0].token_ids for o in generate(small, prompts, params)] == expected
    assert small.llm_engine.core.scheduler.num_preemptions > 0


def test_several_answers_to_one_prompt(llm):
    [output] = generate(llm, PROMPTS[:1], noise(JSON, 1, n=6))
    texts = [completion.text for completion in output.outputs if completion.finish_reason == "stop"]
    assert len(set(texts)) > 2 and all(map(valid, texts))


def test_the_form_decides_when_a_text_ends(llm):
    yes = Structured(choice=["yes"])
    for changes in (
        {},
        {"ignore_eos": True},
        {"min_tokens": 40},
        {"min_tokens": 40, "ignore_eos": True},
        {"temperature": 0.0},
    ):
        [output] = generate(llm, PROMPTS[:1], noise(yes, 1, **changes))
        assert (output.outputs[0].text, output.outputs[0].finish_reason) == ("yes", "stop"), changes


def test_the_form_wins_over_what_would_leave_nothing(llm):
    ids = llm.get_tokenizer().encode("yes")
    for changes in (
        {"logit_bias": dict.fromkeys(ids, -100.0)},
        {"allowed_token_ids": [5]},
        {"bad_words": ["yes", "y", "e", "s"]},
    ):
        [output] = generate(llm, PROMPTS[:1], noise(Structured(choice=["yes"]), 1, **changes))
        assert (output.outputs[0].text, output.outputs[0].finish_reason) == ("yes", "stop")
    [output] = generate(
        llm, PROMPTS[:1], noise(Structured(choice=["yes", "no"]), 1, allowed_token_ids=llm.get_tokenizer().encode("no"))
    )
    assert output.outputs[0].text == "no"


def test_stops_and_lengths_cut(llm):
    digits = Structured(regex="[0-9]{40}")
    [output] = generate(llm, PROMPTS[:1], noise(digits, 1, max_tokens=7))
    assert output.outputs[0].finish_reason == "length" and re.fullmatch("[0-9]{7,}", output.outputs[0].text)
    [output] = generate(llm, PROMPTS[:1], noise(Structured(regex="[0-4]+5[0-9]{40}"), 1, stop="5"))
    assert output.outputs[0].finish_reason == "stop" and re.fullmatch("[0-4]+", output.outputs[0].text)
    end = llm.get_tokenizer().encode("5")
    [output] = generate(llm, PROMPTS[:1], noise(Structured(regex="[0-4]+5[0-9]{40}"), 1, stop_token_ids=end))
    assert output.outputs[0].finish_reason == "stop"


def test_log_probabilities_are_those_of_the_model(llm):
    [output] = generate(llm, PROMPTS[:1], noise(Structured(choice=["maybe"]), 1, logprobs=2))
    [first] = generate(llm, PROMPTS[:1], SamplingParams(temperature=0, max_tokens=1, logprobs=2))
    scores = output.outputs[0].logprobs
    assert len(scores) == len(output.outputs[0].token_ids)
    assert list(scores[0])[1:] == list(first.outputs[0].logprobs[0])[:2]


def test_impossible_constraints_are_refused_and_the_engine_goes_on(llm):
    for structured in (
        Structured(regex="("),
        Structured(json={"type": "array", "contains": {}}),
        Structured(json={"$ref": "#"}),
    ):
        with pytest.raises(ValueError) as error:
            generate(llm, PROMPTS[:1], noise(structured, 1))
        assert "\n" not in str(error.value)
    assert not llm.llm_engine.has_unfinished_requests
    [output] = generate(llm, PROMPTS[:1], noise(Structured(choice=["ok"]), 1))
    assert output.outputs[0].text == "ok"


def test_a_request_that_waits_for_its_grammar_holds_nobody_up(llm, monkeypatch):
    core, steps = llm.llm_engine.core, LLMEngine.step
    held = core.grammars._cache.constraint
    import threading

    gate = threading.Event()
    monkeypatch.setattr(core.grammars._cache, "constraint", lambda params: (gate.wait(20), held(params))[1])
    llm.llm_engine.add_request("bound", PROMPTS[0], noise(Structured(choice=["later"]), 1))
    llm.llm_engine.add_request("dropped", PROMPTS[0], noise(Structured(choice=["never"]), 1))
    llm.llm_engine.add_request("free", PROMPTS[0], SamplingParams(max_tokens=3, ignore_eos=True))
    done = []
    for _ in range(4):
        done += [o.request_id for o in steps(llm.llm_engine) if o.finished]
    assert done == ["free"] and core.take_stats().num_waiting == 2 and core.has_unfinished_requests
    assert steps(llm.llm_engine) == []
    llm.llm_engine.abort_requests(["dropped"])
    gate.set()
    while llm.llm_engine.has_unfinished_requests:
        done += [o.outputs[0].text for o in steps(llm.llm_engine) if o.finished]
    assert done == ["free", "later"] and not core.has_unfinished_requests
    core.check_idle()


def test_an_abort_leaves_nothing_behind(llm):
    llm.llm_engine.add_request("gone", PROMPTS[0], noise(JSON, 1))
    core = llm.llm_engine.core
    while not core.scheduler.running:
        llm.llm_engine.step()
    llm.llm_engine.abort_requests(["gone"])
    assert not core.has_unfinished_requests
    generate(llm, PROMPTS[:1], SamplingParams(max_tokens=2))
    assert not core.grammars._live


def test_a_text_that_cannot_go_on_is_aborted(llm, monkeypatch):
    core = llm.llm_engine.core
    llm.llm_engine.add_request("lost", PROMPTS[0], noise(JSON, 1))
    while not core.scheduler.running:
        llm.llm_engine.step()
    monkeypatch.setattr(core.scheduler.running.first.constraint, "accept", lambda token_id: False)
    [output] = [o for o in llm.llm_engine.step() if o.finished]
    assert output.outputs[0].finish_reason == "abort"
    core.check_idle()


def test_parameters_cross_to_the_engine_process():
    from vllm.v1.engine.messages import AddRequests, EngineCoreRequest

    for structured, _ in CHECKS.values():
        structured.begin_after = "</think>"
        request = EngineCoreRequest("a", [1], SamplingParams(structured_outputs=structured), 0.0)
        [received] = decode_command(encode_command(AddRequests([request]))).requests
        assert received.sampling_params.structured_outputs == structured
        structured.begin_after = None
        assert SamplingParams(structured_outputs=structured).clone().structured_outputs == structured


def test_the_async_engine_checks_at_the_door(tiny_model):
    import asyncio

    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    async def run() -> None:
        engine = AsyncLLM(EngineArgs(model=str(tiny_model), max_model_len=256, max_num_seqs=8).create_engine_config())
        try:
            await engine.start()
            with pytest.raises(ValueError, match="regular expression cannot be compiled"):
                await engine.add_request(PROMPTS[0], noise(Structured(regex="("), 1), "bad")
            assert engine.num_unfinished_requests == 0

            async def ask(i: int) -> str:
                async for output in engine.generate(PROMPTS[0], noise(JSON, i), f"good {i}"):
                    last = output
                return last.outputs[0].text if last.outputs[0].finish_reason == "stop" else ""

            texts = await asyncio.gather(*(ask(i) for i in range(12)))
            assert sum(map(bool, texts)) >= 6 and all(map(valid, filter(None, texts)))
        finally:
            engine.shutdown()
        with pytest.raises(EngineDeadError):
            await engine.add_request(PROMPTS[0], noise(JSON, 1), "late")

    asyncio.run(run())
