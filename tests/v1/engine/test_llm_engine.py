"""The engine on the real bundled checkpoint: nothing that happens around a request changes what it answers."""

import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm import LLM, SamplingParams
from vllm.benchmarks.tiny_tasks import generate
from vllm.model_executor.layers.mamba.gdn_linear_attn import DECODE, IN_PROJ, set_gdn_variants

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
AHEAD = pytest.mark.parametrize("ahead", [False, True], ids=["in_step", "ahead"])
LONG = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)  # crosses pages, so that pools run out


def make_llm(tiny_model, **overrides) -> LLM:
    settings = {"max_model_len": 256, "max_num_seqs": 8, "dtype": "float32", "use_tqdm_on_load": False} | overrides
    return LLM(model=str(tiny_model), **settings)


def assert_idle_and_balanced(llm: LLM) -> None:
    engine = llm.llm_engine
    assert not engine.has_unfinished_requests and not engine.core.has_unfinished_requests
    engine.core.scheduler.assert_balanced()
    assert engine.core.scheduler.kv_cache_usage == 0
    engine.core.step()  # the worker learns of the last finished rows with the next step
    assert not engine.core.worker.runner.batch.sequences


@pytest.fixture(scope="module")
def prompts(tiny_model):
    rng = random.Random(0)
    items = [item for kind in ("add2", "reverse", "count", "tool") for item in generate(kind, 4)]
    tokenizer = make_llm(tiny_model).get_tokenizer()
    texts = [
        tokenizer.apply_chat_template(i.messages, tools=i.tools, tokenize=False, add_generation_prompt=True)
        for i in items
    ]
    tokens = [tokenizer.encode(text)[:180] for text in texts]
    return tokens + [[rng.randrange(900) for _ in range(n)] for n in (1, 2, 15, 16, 17, 33, 100)]


@pytest.fixture(scope="module")
def alone_long(tiny_model, prompts):
    """What each prompt is answered when it has the engine to itself and is prefilled in one step."""
    llm = make_llm(tiny_model, max_num_seqs=1)
    return [llm.generate([prompt], LONG, use_tqdm=False)[0].outputs[0].token_ids for prompt in prompts]


@pytest.fixture(scope="module")
def alone(alone_long):
    return [token_ids[: GREEDY.max_tokens] for token_ids in alone_long]


@pytest.mark.parametrize(("budget", "ahead"), [(8, False), (19, False), (64, True), (2048, False), (2048, True)])
def test_chunks_of_any_size_and_any_neighbours_give_the_same_tokens(tiny_model, prompts, alone, budget, ahead):
    llm = make_llm(tiny_model, max_num_batched_tokens=budget, async_scheduling=ahead)
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in outputs] == alone
    assert_idle_and_balanced(llm)


@AHEAD
def test_preempted_and_resumed_requests_give_the_same_tokens(tiny_model, prompts, alone_long, ahead):
    llm = make_llm(tiny_model, num_gpu_blocks_override=1 + 18, async_scheduling=ahead)
    outputs = llm.generate(prompts, LONG, use_tqdm=False)
    assert llm.llm_engine.core.scheduler.num_preemptions > 0
    assert [o.outputs[0].token_ids for o in outputs] == alone_long
    assert_idle_and_balanced(llm)


@pytest.mark.parametrize("block_size", [32, 64])
def test_larger_pages_give_the_same_tokens(tiny_model, prompts, alone, block_size):
    llm = make_llm(tiny_model, block_size=block_size)
    assert [o.outputs[0].token_ids for o in llm.generate(prompts, GREEDY, use_tqdm=False)] == alone


@pytest.mark.parametrize("decode", DECODE)
@pytest.mark.parametrize("in_proj", IN_PROJ)
def test_gdn_variants_give_the_same_tokens(tiny_model, prompts, alone, in_proj, decode):
    llm = make_llm(tiny_model, gdn_in_proj=in_proj, gdn_decode=decode, gdn_prefill_backend="torch")
    assert gdn_variants(llm) == {(in_proj, decode, "torch")}
    assert [o.outputs[0].token_ids for o in llm.generate(prompts[::3], GREEDY, use_tqdm=False)] == alone[::3]


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted")
def test_the_triton_prefill_gives_the_same_tokens(tiny_model, prompts, alone):
    """Prompts of 2, 17 and 100 tokens through Triton's interpreter."""
    llm = make_llm(tiny_model, gdn_prefill_backend="triton", max_num_batched_tokens=70)
    chosen = [-6, -3, -1]
    outputs = llm.generate([prompts[i] for i in chosen], GREEDY, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in outputs] == [alone[i] for i in chosen]


def test_gdn_variants_may_change_between_two_steps(tiny_model, prompts, alone_long):
    llm, draw = make_llm(tiny_model, max_num_batched_tokens=64), random.Random(1)
    engine, finished, used = llm.llm_engine, {}, set()
    for i, prompt in enumerate(prompts[:8]):
        engine.add_request(str(i), prompt, LONG)
    while engine.has_unfinished_requests:
        in_proj, decode = draw.choice(list(IN_PROJ)), draw.choice(list(DECODE))
        used.add(set_gdn_variants(gdn_model(llm), in_proj=in_proj, decode=decode))
        finished |= {o.request_id: o.outputs[0].token_ids for o in engine.step() if o.finished}
    assert [finished[str(i)] for i in range(8)] == alone_long[:8]
    assert len(used) == len(IN_PROJ) * len(DECODE)


def gdn_model(llm: LLM):
    return llm.llm_engine.core.worker.runner.model


def gdn_variants(llm: LLM) -> set[tuple[str, str, str]]:
    return {tuple(layer.variants) for layer in gdn_model(llm).stateful_layers().gdn}


def test_whole_prompts_only(tiny_model, prompts, alone):
    llm = make_llm(tiny_model, enable_chunked_prefill=False, max_num_batched_tokens=256)
    assert [o.outputs[0].token_ids for o in llm.generate(prompts, GREEDY, use_tqdm=False)] == alone


@pytest.fixture(scope="module")
def tight(tiny_model):
    """A pool that forces preemptions and a budget that cuts prompts, kept over examples: leaks would add up."""
    return {
        (policy, ahead): make_llm(
            tiny_model,
            max_num_seqs=4,
            max_num_batched_tokens=48,
            num_gpu_blocks_override=1 + 18,
            scheduling_policy=policy,
            async_scheduling=ahead,
        )
        for policy in ("fcfs", "priority")
        for ahead in (False, True)
    }


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_random_arrivals_and_aborts_change_no_answer_and_leak_nothing(tight, prompts, alone_long, data):
    llm = tight[data.draw(st.sampled_from(["fcfs", "priority"])), data.draw(st.booleans())]
    engine = llm.llm_engine
    engine.abort_requests([f"r{i}" for i in range(8)])  # an example that failed may have left some
    arrivals = st.tuples(st.integers(0, len(prompts) - 1), st.integers(0, 3))
    waiting = list(enumerate(data.draw(st.lists(arrivals, min_size=1, max_size=8))))
    started: dict[str, int] = {}
    finished: dict[str, list[int]] = {}
    aborted: set[str] = set()
    steps = 0
    while waiting or len(finished) + len(aborted) < len(started):
        steps += 1
        assert steps < 1000, "a request starves"
        while waiting and (len(finished) + len(aborted) == len(started) or data.draw(st.booleans())):
            number, (index, priority) = waiting.pop()
            started[f"r{number}"] = index
            engine.add_request(f"r{number}", prompts[index], LONG, priority)
        running = sorted(set(started) - set(finished) - aborted)
        if running and data.draw(st.integers(0, 9)) == 0:
            victim = data.draw(st.sampled_from(running))
            engine.abort_requests([victim])
            aborted.add(victim)
        for output in engine.step():
            assert output.request_id not in aborted
            if output.finished:
                finished[output.request_id] = output.outputs[0].token_ids
                assert finished[output.request_id] == alone_long[started[output.request_id]]
    assert set(finished) | aborted == set(started)
    assert_idle_and_balanced(llm)


@AHEAD
def test_a_seed_gives_the_same_text_whatever_the_neighbours(tiny_model, prompts, ahead):
    llm = make_llm(tiny_model, async_scheduling=ahead)
    params = SamplingParams(temperature=20.0, seed=7, max_tokens=12, ignore_eos=True)
    [alone] = llm.generate([prompts[0]], params, use_tqdm=False)
    free = SamplingParams(temperature=20.0, max_tokens=9, ignore_eos=True)
    crowd = llm.generate(prompts[:6], [free, free, free, params.clone(), free, free], use_tqdm=False)
    crowd_prompt = llm.generate([prompts[3]], params, use_tqdm=False)
    assert crowd[3].outputs[0].token_ids == crowd_prompt[0].outputs[0].token_ids
    small = make_llm(tiny_model, num_gpu_blocks_override=1 + 17)
    mixed = [params.clone() if i == 0 else free for i in range(12)]
    preempted = small.generate([prompts[i % 8] for i in range(12)], mixed, use_tqdm=False)
    assert preempted[0].outputs[0].token_ids == alone.outputs[0].token_ids
    other = llm.generate(
        [prompts[0]], SamplingParams(temperature=20.0, seed=8, max_tokens=12, ignore_eos=True), use_tqdm=False
    )
    assert other[0].outputs[0].token_ids != alone.outputs[0].token_ids


def test_n_completions_come_back_as_one_output(tiny_model, prompts):
    llm = make_llm(tiny_model)
    params = SamplingParams(n=3, temperature=20.0, seed=3, max_tokens=8, ignore_eos=True)
    [output] = llm.generate([prompts[0]], params, use_tqdm=False)
    assert [c.index for c in output.outputs] == [0, 1, 2]
    assert len({tuple(c.token_ids) for c in output.outputs}) == 3
    [single] = llm.generate(
        [prompts[0]], SamplingParams(temperature=20.0, seed=3, max_tokens=8, ignore_eos=True), use_tqdm=False
    )
    assert single.outputs[0].token_ids == output.outputs[0].token_ids


def test_logprobs_and_prompt_logprobs_do_not_depend_on_chunks_or_preemption(tiny_model, prompts):
    params = LONG.clone(logprobs=3, prompt_logprobs=2)
    chosen = prompts[:4] + prompts[-2:]
    whole = make_llm(tiny_model, max_num_seqs=1).generate(chosen, params, use_tqdm=False)
    tight = make_llm(tiny_model, max_num_batched_tokens=16, num_gpu_blocks_override=1 + 17, async_scheduling=True)
    cut = tight.generate(chosen, params, use_tqdm=False)
    assert tight.llm_engine.core.scheduler.num_preemptions > 0
    for a, b, prompt in zip(whole, cut, chosen, strict=True):
        assert len(a.prompt_logprobs) == len(b.prompt_logprobs) == len(prompt)
        assert a.prompt_logprobs[0] is None and b.prompt_logprobs[0] is None
        positions = list(zip(a.prompt_logprobs[1:], b.prompt_logprobs[1:], strict=True))
        positions += list(zip(a.outputs[0].logprobs, b.outputs[0].logprobs, strict=True))
        for at, (x, y) in enumerate(positions):
            token = prompt[at + 1] if at + 1 < len(prompt) else a.outputs[0].token_ids[at + 1 - len(prompt)]
            assert token in x and token in y
            assert x[token].logprob == pytest.approx(y[token].logprob, abs=1e-4)


@AHEAD
def test_stop_string_ends_the_request_and_frees_it(tiny_model, ahead):
    llm = make_llm(tiny_model, async_scheduling=ahead)
    text = llm.get_tokenizer().apply_chat_template(
        [{"role": "user", "content": "Count on from 17."}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,
    )
    [output] = llm.generate([text], SamplingParams(temperature=0, max_tokens=40, stop=["20"]), use_tqdm=False)
    assert output.outputs[0].text == "18 19 " and output.outputs[0].finish_reason == "stop"
    assert output.outputs[0].stop_reason == "20"
    assert_idle_and_balanced(llm)


@AHEAD
def test_an_abort_in_mid_step_leaves_nothing_under_way(tiny_model, prompts, ahead):
    llm = make_llm(tiny_model, async_scheduling=ahead)
    for i in range(3):
        llm.llm_engine.add_request(f"r{i}", prompts[i], LONG)
    for _ in range(4):
        llm.llm_engine.step()
    llm.llm_engine.abort_requests(["r0", "r2"])
    assert llm.llm_engine.has_unfinished_requests
    llm.llm_engine.step()
    llm.llm_engine.abort_requests(["r1"])
    assert_idle_and_balanced(llm)
