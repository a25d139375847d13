"""What callers read: every kind of output, n sequences, stop strings, log-probabilities, and nothing left behind."""

import random
import types

import pytest

from vllm.config import ModelConfig
from vllm.config.checkpoint import TINY
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.input_processor import InputProcessor, ProcessedRequest
from vllm.v1.engine.messages import EngineCoreOutput, EngineCoreRequest
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.engine.tokenizer import load_tokenizer
from vllm.v1.outputs import TokenLogprobs

CUMULATIVE, DELTA, FINAL_ONLY = RequestOutputKind


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY)


@pytest.fixture
def processors(tokenizer):
    text = types.SimpleNamespace(vocab_size=1024)
    model = ModelConfig(hf_config=types.SimpleNamespace(text=text), max_model_len=4096, model_path=str(TINY))
    return InputProcessor(types.SimpleNamespace(model_config=model), tokenizer), OutputProcessor(tokenizer)


def added(processors, request_id="r", prompt="Hello world", **params):
    request = processors[0].process(request_id, prompt, SamplingParams(**params), arrival_time=1.0)
    processors[1].add_request(request)
    return request


def assert_idle(outputs):
    assert not outputs.has_unfinished_requests and outputs.num_unfinished_requests == 0
    assert outputs._requests == {} and outputs._sequences == {}


def run(outputs, engine_id, ids, *, finish="length", stop_reason=None, size=1):
    """Feed ids in steps of `size`; all RequestOutputs, and what must be aborted."""
    results, aborted = [], []
    for start in range(0, len(ids), size):
        last = start + size >= len(ids)
        reason = finish if last else None
        step = EngineCoreOutput(engine_id, ids[start : start + size], reason, stop_reason if last else None)
        made, stopped = outputs.process([step], now=2.0 + start)
        results += made
        aborted += stopped
    return results, aborted


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("kind", RequestOutputKind)
def test_kinds(processors, tokenizer, kind, size):
    ids = tokenizer.encode("The weather is 😀 and 你好 again")
    text = tokenizer.decode(ids)
    added(processors, output_kind=kind)
    results, aborted = run(processors[1], "r", ids, size=size)
    assert aborted == [] and [r.finished for r in results] == [False] * (len(results) - 1) + [True]
    assert all(r.request_id == "r" and r.prompt == "Hello world" and len(r.outputs) == 1 for r in results)
    completions = [r.outputs[0] for r in results]
    if kind is FINAL_ONLY:
        assert len(results) == 1
    if kind is DELTA:
        assert "".join(c.text for c in completions) == text and [t for c in completions for t in c.token_ids] == ids
    else:
        assert completions[-1].text == text and completions[-1].token_ids == ids
        assert all(text.startswith(c.text) and ids[: len(c.token_ids)] == c.token_ids for c in completions)
    assert completions[-1].finish_reason == "length" and completions[-1].finished
    assert all(c.finish_reason is None for c in completions[:-1])
    assert_idle(processors[1])


def test_earlier_outputs_do_not_change(processors, tokenizer):
    ids = tokenizer.encode("one two three four")
    added(processors, logprobs=0)
    seen = []
    for i, token_id in enumerate(ids):
        step = EngineCoreOutput("r", [token_id], None, new_logprobs=[TokenLogprobs([token_id], [-0.5], 1)])
        (result,), _ = processors[1].process([step])
        seen.append(result.outputs[0])
        assert [len(c.token_ids) for c in seen] == list(range(1, i + 2)) == [len(c.logprobs) for c in seen]


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_several_sequences(processors, tokenizer, kind):
    request = added(processors, n=3, output_kind=kind, seed=1)
    texts = ["alpha beta gamma delta", "x", "some more words"]
    ids = [tokenizer.encode(text) for text in texts]
    results = []
    for step in range(max(map(len, ids))):
        outputs = [
            EngineCoreOutput(child.request_id, [own[step]], "length" if step == len(own) - 1 else None)
            for child, own in zip(request.children, ids)
            if step < len(own)
        ]
        made, _ = processors[1].process(reversed(outputs))
        assert len(made) <= 1
        results += made
    assert [r.finished for r in results] == [False] * (len(results) - 1) + [True]
    if kind is DELTA:
        found = [["", []] for _ in texts]
        for completion in (c for r in results for c in r.outputs):
            found[completion.index][0] += completion.text
            found[completion.index][1] += completion.token_ids
        assert found == [[text, own] for text, own in zip(texts, ids)]
    else:
        assert [c.index for c in results[0].outputs] == [0, 1, 2]
        assert [c.text for c in results[-1].outputs] == texts
        assert [c.token_ids for c in results[-1].outputs] == ids
        assert len(results) == 1 if kind is FINAL_ONLY else len(results) == max(map(len, ids))
    assert_idle(processors[1])


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("size", [1, 4])
def test_stop_string(processors, tokenizer, include, size):
    """Across tokens; what comes after it is gone, also from tokens and log-probabilities."""
    ids = [tokenizer.encode(char, add_special_tokens=False)[0] for char in "abc-END-xyz"]
    added(processors, stop=["END"], include_stop_str_in_output=include, logprobs=0)
    outputs, aborted = processors[1], []
    for start in range(0, len(ids), size):
        scores = [TokenLogprobs([i], [-1.0], 1) for i in ids[start : start + size]]
        made, stopped = outputs.process([EngineCoreOutput("r", ids[start : start + size], new_logprobs=scores)])
        aborted += stopped
        if made and made[0].finished:
            completion = made[0].outputs[0]
    assert aborted == ["r"]
    assert completion.text == ("abc-END" if include else "abc-")
    assert completion.token_ids == ids[:7] and len(completion.logprobs) == 7 and completion.cumulative_logprob == -7
    assert (completion.finish_reason, completion.stop_reason) == ("stop", "END")
    assert_idle(outputs)


def test_stop_string_in_the_last_token_allowed(processors, tokenizer):
    """The engine has ended the sequence already: nothing to abort."""
    ids = tokenizer.encode("one END", add_special_tokens=False)
    added(processors, stop=["END"])
    results, aborted = run(processors[1], "r", ids, finish="length")
    assert (
        aborted == [] and results[-1].outputs[0].stop_reason == "END" and results[-1].outputs[0].finish_reason == "stop"
    )
    assert_idle(processors[1])


def test_deltas_never_show_a_part_of_a_stop_string(processors, tokenizer):
    ids = [tokenizer.encode(char, add_special_tokens=False)[0] for char in "ENxENDyy"]
    added(processors, stop=["END"], output_kind=DELTA)
    deltas = []
    for token_id in ids:
        made, _ = processors[1].process([EngineCoreOutput("r", [token_id])])
        deltas += [r.outputs[0].text for r in made]
    assert deltas == ["", "", "ENx", "", "", ""]


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ({}, "Hi"),
        ({"include_stop_str_in_output": True}, "Hi"),
        ({"include_stop_str_in_output": True, "skip_special_tokens": False}, "Hi<|im_end|>"),
    ],
)
def test_end_of_sequence(processors, tokenizer, params, text):
    ids = [*tokenizer.encode("Hi"), tokenizer.eos_token_id]
    added(processors, **params)
    completion = run(processors[1], "r", ids, finish="stop")[0][-1].outputs[0]
    assert completion.text == text and completion.token_ids == ids
    assert (completion.finish_reason, completion.stop_reason) == ("stop", None)


def test_stop_token(processors, tokenizer):
    ids = tokenizer.encode("Hello world again", add_special_tokens=False)
    for include, text in ((False, tokenizer.decode(ids[:-1])), (True, tokenizer.decode(ids))):
        added(processors, include_stop_str_in_output=include)
        completion = run(processors[1], "r", ids, finish="stop", stop_reason=ids[-1])[0][-1].outputs[0]
        assert completion.text == text and completion.token_ids == ids and completion.stop_reason == ids[-1]


def test_half_a_character_at_the_end(processors, tokenizer):
    ids = tokenizer.encode("a😀", add_special_tokens=False)
    added(processors, output_kind=DELTA)
    results, _ = run(processors[1], "r", ids[:-1], finish="length")
    assert "".join(r.outputs[0].text for r in results) == "a\ufffd"


def test_without_detokenisation(processors, tokenizer):
    added(processors, detokenize=False, logprobs=0)
    step = EngineCoreOutput(
        "r", [5, 6], "length", new_logprobs=[TokenLogprobs([5], [-1.0], 1), TokenLogprobs([6], [-1.0], 1)]
    )
    completion = processors[1].process([step])[0][0].outputs[0]
    assert completion.text == "" and completion.token_ids == [5, 6] and completion.logprobs[0][5].decoded_token is None


def test_logprobs(processors, tokenizer):
    added(processors, logprobs=2)
    chosen_first = TokenLogprobs([7, 7, 9], [-0.5, -0.5, -1.5], 1)
    chosen_far = TokenLogprobs([8, 7, 9], [-4.0, -0.25, -2.0], 11)
    step = EngineCoreOutput("r", [7, 8], "length", new_logprobs=[chosen_first, chosen_far])
    completion = processors[1].process([step])[0][0].outputs[0]
    assert completion.cumulative_logprob == -4.5
    first, far = completion.logprobs
    assert [(t, p.logprob, p.rank, p.decoded_token) for t, p in first.items()] == [
        (7, -0.5, 1, tokenizer.decode([7])),
        (9, -1.5, 2, tokenizer.decode([9])),
    ]
    assert [(t, p.rank) for t, p in far.items()] == [(8, 11), (7, 1), (9, 2)]


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_prompt_logprobs_come_in_chunks(processors, kind):
    added(processors, prompt=[5, 6, 7, 8], prompt_logprobs=1, output_kind=kind)
    scores = [TokenLogprobs([t, 1], [-1.0, -0.1], 2) for t in (6, 7, 8)]
    assert processors[1].process([EngineCoreOutput("r", [], new_prompt_logprobs=scores[:2])]) == ([], [])
    first, _ = processors[1].process([EngineCoreOutput("r", [9], new_prompt_logprobs=scores[2:])])
    last, _ = processors[1].process([EngineCoreOutput("r", [9], "length")])
    found = [result.prompt_logprobs for result in first + last]
    expected = [None, {6, 1}, {7, 1}, {8, 1}]
    shown = [entry if entry is None else set(entry) for entry in next(f for f in found if f)]
    assert shown == expected
    assert [f is not None for f in found] == {CUMULATIVE: [True, True], DELTA: [True, False], FINAL_ONLY: [True]}[kind]


def test_prompt_logprobs_not_asked_for(processors):
    added(processors)
    assert run(processors[1], "r", [1])[0][0].prompt_logprobs is None


def test_metrics(processors):
    added(processors)
    processors[1].process([EngineCoreOutput("r", [1], scheduled_time=1.5, num_cached_tokens=16)], now=2.0)
    (result,), _ = processors[1].process([EngineCoreOutput("r", [1], "length")], now=3.0)
    metrics = result.metrics
    times = (metrics.arrival_time, metrics.first_scheduled_time, metrics.first_token_time, metrics.finished_time)
    assert times == (1.0, 1.5, 2.0, 3.0) and result.num_cached_tokens == 16


def test_abort_from_outside(processors):
    """By the caller's id, with all children; late outputs are passed over."""
    request = added(processors, n=2)
    added(processors, request_id="other")
    processors[1].process([EngineCoreOutput("0_r", [1], "length")])
    assert processors[1].abort(["r", "unknown", "r"]) == ["1_r"]
    assert processors[1].process([EngineCoreOutput(child.request_id, [1]) for child in request.children]) == ([], [])
    assert processors[1].num_unfinished_requests == 1
    assert processors[1].abort(["other"]) == ["other"]
    assert_idle(processors[1])


def test_abort_by_the_engine(processors):
    added(processors)
    (result,), aborted = processors[1].process([EngineCoreOutput("r", [], "abort")])
    assert result.finished and result.outputs[0].finish_reason == "abort" and aborted == []
    assert_idle(processors[1])


def test_ids_in_use(processors):
    added(processors)
    with pytest.raises(ValueError, match="'r' is in use"):
        added(processors)
    added(processors, request_id="0_x")
    with pytest.raises(ValueError, match="'x' is in use"):
        added(processors, request_id="x", n=2)
    processors[1].abort(["r", "0_x"])
    assert_idle(processors[1])


def test_books_balance_after_random_traffic(processors, tokenizer):
    """Requests of all kinds come, go, stop and are aborted in random order, and nothing stays."""
    rng = random.Random(0)
    outputs, engine, num_finished = processors[1], {}, 0
    for step in range(400):
        if rng.random() < 0.3 and step < 350:
            request = added(processors, request_id=f"r{step}", n=rng.choice([1, 1, 3]), output_kind=rng.choice(list(RequestOutputKind)),
                            stop=rng.choice([[], ["e"], ["th", "zz"]]))  # fmt: skip
            engine.update({child.request_id: rng.randrange(1, 12) for child in request.children})
        if rng.random() < 0.05 and engine:
            victim = rng.choice(sorted(engine)).split("_")[-1]
            for engine_id in outputs.abort([victim]):
                del engine[engine_id]
        made_now = []
        for engine_id in rng.sample(sorted(engine), k=rng.randint(0, len(engine))):
            engine[engine_id] -= 1
            made_now.append(EngineCoreOutput(engine_id, [rng.randrange(998)], None if engine[engine_id] else "length"))
            if not engine[engine_id]:
                del engine[engine_id]
        results, stopped = outputs.process(made_now)
        for engine_id in stopped:
            del engine[engine_id]
        assert set(outputs._sequences) == set(engine)
        num_finished += sum(result.finished for result in results)
    while engine:
        _, stopped = outputs.process([EngineCoreOutput(engine_id, [1], "length") for engine_id in list(engine)])
        engine.clear()
        assert stopped == []
    assert num_finished > 50
    assert_idle(outputs)


@pytest.mark.parametrize("interval", [1, 3, 7])
def test_tokens_that_are_told_together(interval):
    """The first at once, then so many at a time, and the last without waiting for more."""
    processor = OutputProcessor(None, stream_interval=interval)
    params = SamplingParams(max_tokens=100, detokenize=False, output_kind=RequestOutputKind.DELTA)
    children = [EngineCoreRequest("r", [1], params, 0.0)]
    processor.add_request(ProcessedRequest("r", None, [1], params, 0.0, children))
    told = []
    for token in range(12):
        outputs, _ = processor.process([EngineCoreOutput("r", [token], "length" if token == 11 else None)])
        told += [output.outputs[0].token_ids for output in outputs]
    assert [token for tokens in told for token in tokens] == list(range(12))
    sizes = [len(tokens) for tokens in told]
    assert sizes[0] == 1 and set(sizes[1:-1]) <= {interval} and sizes[-1] <= interval
