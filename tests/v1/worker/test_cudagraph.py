"""Which batch sizes get a CUDA graph, and that graphs change no answer."""

import contextlib
import gc
import random
import weakref
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from tests.kernels.common import assert_close
from tests.v1.worker.static_prompts import ByHand, poisoned_pools, recorded_logits, runner_of, static_prompts
from vllm import LLM, SamplingParams
from vllm.benchmarks.tiny_tasks import generate
from vllm.config.compilation import PROMPT_SIZES, prompt_sizes
from vllm.sampling_params import StructuredOutputsParams
from vllm.utils.torch_utils import kept
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.worker.cudagraph import GraphCache, capture_order, capture_sizes, padded_size
from vllm.v1.worker.model_runner import ModelRunner
from vllm.v1.worker.prompt_batch import PromptBatch


@pytest.mark.parametrize("most", [1, 2, 7, 8, 9, 64, 100, 256, 1024])
def test_sizes_hold_every_batch_and_waste_little(most):
    sizes = capture_sizes(most)
    assert sizes[0] == 1 and sizes[-1] == most and list(sizes) == sorted(set(sizes))
    for count in range(1, most + 1):
        size = padded_size(sizes, count)
        assert size >= count
        assert size == count if count <= 8 else size <= count * 1.25
    assert padded_size(sizes, most + 1) is None
    assert len(sizes) <= 8 + 4 * max(0, (most - 1).bit_length() - 3)


def test_the_sizes_asked_for_are_taken_as_far_as_they_fit():
    assert capture_sizes(8, (16, 4, 1, 4)) == (1, 4)
    assert padded_size((1, 4), 5) is None
    assert padded_size((), 1) is None


@pytest.mark.parametrize("sizes", [(), (1,), (3, 7), capture_sizes(256)])
def test_every_size_is_captured_once_and_the_largest_first(sizes):
    early, later = capture_order(sizes, 8)
    assert sorted(early + later) == list(sizes)
    assert early == sorted(early, reverse=True) and early[:1] == list(sizes[-1:])
    assert all(size > 8 for size in later) and later == sorted(later)


def test_graphs_that_the_start_left_out_are_captured_one_size_at_a_time(monkeypatch):
    runner, captured = object.__new__(ModelRunner), []
    runner.prompt, runner.prompts = (object.__new__(PromptBatch) for _ in range(2))
    runner.prompt.sizes, runner.prompts.sizes, runner.decode = (16, 64, 512, 1024), (64, 2048), None
    runner.batch = SimpleNamespace(sampling=SimpleNamespace(plan="greedy"))
    runner._gdn_layers, runner._graph_sizes, runner.graphs = [], capture_sizes(16), {}
    monkeypatch.setattr(
        runner, "_capture", lambda batch, key, run: (captured.append(key), runner.graphs.update({key: 1}))
    )
    assert runner.capture_graphs() == (3, 9)
    assert captured[:3] == [("prompt", 1024), ("prompt", 64), ("prompt", 16)]
    assert captured[3:5] == [("forward", 16), ("sample", 16, "greedy")]
    assert captured[-2:] == [("forward", 1), ("sample", 1, "greedy")]
    captured.clear()
    runner.graphs["forward", 12] = 1  # a batch was faster
    while runner.has_graphs_to_capture:
        runner.capture_next_graphs()
    assert [key[:2] for key in captured] == [
        ("prompt", 512),
        ("prompts", 64),
        ("prompts", 2048),
        ("forward", 10),
        ("sample", 10),
        ("sample", 12),
        ("forward", 14),
        ("sample", 14),
    ]


@pytest.mark.gpu
def test_a_graph_does_again_what_was_recorded():
    x, y = torch.zeros(4, device="cuda"), torch.zeros(4, device="cuda")
    graphs = GraphCache(x.device)
    add = lambda: y.add_(x)
    add()
    graphs.capture("add", add)
    assert "add" in graphs and len(graphs) == 1
    x.fill_(2)
    graphs.replay("add")
    graphs.replay("add")
    assert y.tolist() == [4.0] * 4


@pytest.mark.gpu
def test_other_work_uses_the_memory_of_graphs_between_them():
    device, numbers = torch.device("cuda", 0), torch.arange(1 << 20, dtype=torch.float32, device="cuda")
    graphs, total = GraphCache(device), torch.zeros(1, device=device)
    double_and_add = lambda: total.copy_((2 * numbers).sum())
    with graphs.memory():
        double_and_add()
    graphs.capture("add", double_and_add)
    expected, size = float((2 * numbers).sum()), _memory_of(graphs)[0]
    assert size >= numbers.nbytes
    for _ in range(3):
        with graphs.memory():
            ones = torch.ones_like(numbers)  # where the graph has doubled numbers
            lasting = kept(lambda device: torch.ones(1 << 18, device=device), device)
            sum_of_ones = ones.sum()
            assert _memory_of(graphs)[1] >= ones.nbytes
        assert float(sum_of_ones) == 1 << 20
        del ones, sum_of_ones
        graphs.replay("add")
        assert float(total) == expected and lasting.all()
    assert _memory_of(graphs) == (size, 0)


class _Nothing:
    """Stands for a stream, a graph, or what routes memory to a pool."""

    wait_stream = capture_begin = capture_end = lambda *args, **kwargs: None
    __enter__ = __exit__ = lambda *args: None


@pytest.fixture
def without_gpu(monkeypatch):
    for owner, name in ((torch.cuda, "current_stream"), (torch.cuda, "stream"), (torch.cuda, "use_mem_pool")):
        monkeypatch.setattr(owner, name, lambda *args: _Nothing())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", _Nothing)
    graphs = object.__new__(GraphCache)
    graphs._graphs, graphs._pool, graphs._stream = {}, SimpleNamespace(id=(0, 1)), _Nothing()
    return graphs


def _garbage() -> weakref.ref:
    gc.collect()  # so that it is young when the collector comes by
    thing = _Nothing()
    thing.itself = thing
    return weakref.ref(thing)


def _collected(garbage: weakref.ref) -> bool:
    made = [[i] for i in range(10 * gc.get_threshold()[0])]
    return bool(made) and garbage() is None


def test_no_garbage_is_collected_where_memory_goes_to_graphs(without_gpu):
    """An engine may be garbage, and its memory pool must not end while another is in use."""
    found = []
    with without_gpu.memory():
        found.append(_collected(_garbage()))
    without_gpu.capture("key", lambda: found.append(_collected(_garbage())))
    assert found == [False, False] and "key" in without_gpu
    assert _collected(_garbage()) and gc.isenabled()
    with pytest.raises(KeyError), without_gpu.memory():
        raise KeyError
    assert gc.isenabled()
    gc.disable()
    try:
        with without_gpu.memory():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.gpu
def test_graphs_that_are_garbage_outlast_the_use_of_others_memory():
    device, x = torch.device("cuda", 0), torch.ones(1 << 20, device="cuda")
    old, new = GraphCache(device), GraphCache(device)
    old.capture("add", lambda: x.add_(x.clone()))
    with old.memory():
        x.clone()
    assert _memory_of(old)[0] >= x.nbytes
    pool_id = old.pool_id
    old.itself, garbage = old, weakref.ref(old)
    with new.memory():
        del old
        y = x + 1
        assert not _collected(garbage)
        y += 1
    gc.collect()
    assert garbage() is None and (y == 3).all()
    torch.cuda.empty_cache()  # in case the pool's end came before its graphs'
    assert all(tuple(s["segment_pool_id"]) != pool_id for s in torch.cuda.memory_snapshot())


def _memory_of(graphs: GraphCache) -> tuple[int, int]:
    """Bytes held for graphs, and those of tensors that live there."""
    segments = [s for s in torch.cuda.memory_snapshot() if tuple(s["segment_pool_id"]) == graphs.pool_id]
    return sum(s["total_size"] for s in segments), sum(s["active_size"] for s in segments)


@pytest.mark.gpu
@pytest.mark.parametrize("decode", ["auto", "fused"])
def test_steps_that_are_no_graphs_leave_nothing_in_the_memory_of_graphs(tiny_model, decode):
    """What stays there would be overwritten by the next graph."""
    options = {"max_model_len": 512, "max_num_seqs": 12, "max_num_batched_tokens": 512, "seed": 0}
    llm = LLM(str(tiny_model), use_tqdm_on_load=False, gdn_decode=decode, **options)
    kinds = [
        {"prompt_logprobs": 3},
        {"logprobs": 2, "frequency_penalty": 0.01, "repetition_penalty": 1.1, "min_tokens": 3},
        {"temperature": 0.9, "top_p": 0.9, "top_k": 20, "min_p": 0.01, "seed": 3},
        {"temperature": 0.7, "top_k": 1030, "seed": 4},
        {"logit_bias": {5: 1.0}, "bad_words": ["the"]},
        {"allowed_token_ids": list(range(50, 90))},
        {"structured_outputs": StructuredOutputsParams(choice=["yes", "no"])},
    ]
    params = [SamplingParams(**{"temperature": 0.0, "max_tokens": 6 + i} | kinds[i % len(kinds)]) for i in range(30)]
    prompts = [[(17 * i + 3 * j) % 500 + 20 for j in range(5 + 97 * i % 480)] for i in range(30)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert len(outputs) == 30
    gc.collect()
    size, live = _memory_of(llm.llm_engine.core.worker.runner.graphs)
    assert size > 0 and live == 0


GREEDY = SamplingParams(temperature=0.0, max_tokens=24)
DRAWN = SamplingParams(temperature=0.5, top_p=0.9, top_k=20, seed=3, max_tokens=24)
SCORED = SamplingParams(temperature=0.0, max_tokens=24, logprobs=2, frequency_penalty=0.01)


@pytest.mark.gpu
@pytest.mark.parametrize("params", [GREEDY, DRAWN, SCORED], ids=["greedy", "drawn", "scored"])
def test_graphs_and_eager_steps_give_the_same_tokens(tiny_model, params):
    """Of mixed lengths, so that sequences come and go and batches are padded; some end by themselves, some are cut."""
    items = [item for kind in ("add2", "reverse", "count") for item in generate(kind, 6)]
    changed = [params.clone(max_tokens=3 + 2 * i) for i in range(len(items))]
    texts = {}
    for name, options in {
        "eager": {"enforce_eager": True, "async_scheduling": False},
        "graphs": {"async_scheduling": False},
        "ahead": {},
        "few": {"compilation_config": {"cudagraph_capture_sizes": [2, 12]}},
        "none": {"compilation_config": {"cudagraph_mode": "NONE"}},
        "decode only": {"compilation_config": {"cudagraph_mode": "FULL_DECODE_ONLY"}},
    }.items():
        llm = LLM(str(tiny_model), max_model_len=256, max_num_seqs=12, use_tqdm_on_load=False, seed=0, **options)
        runner = llm.llm_engine.core.worker.runner
        # what the checkpoint was trained to answer, it is sure of, however bf16 rounds in a batch of another size
        template = partial(llm.get_tokenizer().apply_chat_template, tokenize=False, add_generation_prompt=True)
        prompts = [template(item.messages, enable_thinking=False) for item in items]
        outputs = llm.generate(prompts, changed, use_tqdm=False)
        texts[name] = [tuple(output.outputs[0].token_ids) for output in outputs]
        assert hasattr(runner, "graphs") == (name not in ("eager", "none"))
        if name in ("ahead", "decode only"):
            for in_proj, decode in (("serial", "unpacked"), ("dual_stream", "packed"), ("fused", "fused")):
                llm.llm_engine.set_gdn_variants(in_proj=in_proj, decode=decode)
                again = llm.generate(prompts, changed, use_tqdm=False)
                texts[f"{name} {in_proj}"] = [tuple(output.outputs[0].token_ids) for output in again]
    for name, tokens in texts.items():
        assert tokens == texts["eager"], name


def one_by_one(llm, prompts, params):
    return [tuple(llm.generate([prompt], params, use_tqdm=False)[0].outputs[0].token_ids) for prompt in prompts]


@pytest.mark.gpu
@pytest.mark.parametrize("params", [GREEDY, DRAWN, SCORED], ids=["greedy", "drawn", "scored"])
@pytest.mark.parametrize("budget", [2048, 32])
def test_prompts_in_graphs_give_the_same_tokens(tiny_model, params, budget):
    """One request at a time, so that every chunk is a step of its own; with the small budget prompts are cut."""
    items = [item for kind in ("add2", "reverse", "count") for item in generate(kind, 4)]
    limits = {"max_model_len": 256, "max_num_seqs": 4, "max_num_batched_tokens": budget}
    texts = {}
    for name, options in {"eager": {"enforce_eager": True}, "graphs": {}}.items():
        llm = LLM(str(tiny_model), use_tqdm_on_load=False, seed=0, **limits, **options)
        template = partial(llm.get_tokenizer().apply_chat_template, tokenize=False, add_generation_prompt=True)
        prompts = [template(item.messages, enable_thinking=False) for item in items]
        ask = partial(one_by_one, llm, prompts, params)
        runner = runner_of(llm)
        assert runner.prompt.sizes == (prompt_sizes(min(budget, 256)) if name == "graphs" else ())
        known = len(runner.graphs) if name == "graphs" else 0
        texts[name] = ask()
        if name == "graphs":
            # none but the sampler's, for what the requests ask
            assert len(runner.graphs) <= known + 1
            for in_proj, decode in (("serial", "unpacked"), ("dual_stream", "packed")):
                llm.llm_engine.set_gdn_variants(in_proj=in_proj, decode=decode)
                texts[in_proj] = ask()
            llm.llm_engine.set_gdn_variants(prefill="torch")  # asks the device for lengths: no graphs of it
            texts["torch"] = ask()
    for name, tokens in texts.items():
        assert tokens == texts["eager"], name


def check_against_kernels(runner, compute, n) -> list[tuple]:
    """`compute` leaves states and n sequences' hidden rows. A graph's, and logits, are those of its kernels launched one by one, and those of
    the unpadded step but for rounding. Returns what graphs there were."""
    with recorded_logits(runner) as logits:
        runner._prompts_in_graphs = False
        want = [*compute(), logits[-1].float()]
        runner._prompts_in_graphs = True
    found = []
    for graphs in (True, False):
        with contextlib.nullcontext() if graphs else static_prompts(runner, PROMPT_SIZES) as asked:
            states = compute()
        with torch.inference_mode():
            found.append([*states, runner.model.compute_logits(runner._hidden[:n]).float()])
    for graph, kernels, unpadded in zip(*found, want):
        assert_close(graph, kernels, 1e-3, "graph and kernels")
        assert_close(graph, unpadded, 4e-2, "graph and the step without padding")
    return asked


@pytest.mark.gpu
@pytest.mark.parametrize(
    "chunks", [*([n + d] for n in PROMPT_SIZES for d in (-1, 0)), [1], [100, 30, 7], [64, 64, 1, 5]]
)
def test_a_graph_of_a_prompt_computes_what_its_kernels_do(prompt_llm, chunks):
    """Among pages and slots of NaN."""
    runner, n = runner_of(prompt_llm), sum(chunks)
    rng = random.Random(n)
    token_ids, pages = [rng.randrange(5, 800) for _ in range(n)], rng.sample(range(1, 140), -(-n // 16))

    def compute():
        with poisoned_pools(runner) as pools:
            sequence = ByHand(runner, token_ids, pages, 3)
            for k in chunks:
                sequence.step(k)
            row = runner.batch.sequences["r"].row
            assert (int(runner.batch.num_computed[row]), int(runner.batch.sampling.num_generated[row])) == (n, 1)
            sequence.finish()
            for pool in pools["slots"]:
                others = [i for i in range(pool.shape[0]) if i != 3]
                assert pool[3].isfinite().all() and pool[others].isnan().all()
            states = [pool[3].float() for pool in pools["slots"]]
            untouched = [i for i in range(1, pools["pages"][0].shape[0]) if i not in pages]
            assert all(pool[untouched].isnan().all() for pool in pools["pages"])
        return states

    check_against_kernels(runner, compute, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[3, 60], [100, 1, 30, 64], [600, 440, 7], [513, 500, 400, 600]], ids=str)
def test_a_graph_of_several_prompts_computes_what_its_kernels_do(prompt_llm, lengths):
    """Among pages and slots of NaN."""
    runner, n = runner_of(prompt_llm), len(lengths)
    rng = random.Random(sum(lengths))
    spare = rng.sample(range(1, 144), 143)
    slots = list(range(1, n + 1))
    new = []
    for slot, length in zip(slots, lengths):
        pages = [spare.pop() for _ in range(-(-length // 16))]
        token_ids = [rng.randrange(5, 800) for _ in range(length)]
        new.append(NewRequestData(str(slot), token_ids, length, GREEDY, pages, slot, 0))
    ids = [request.request_id for request in new]

    def compute():
        with poisoned_pools(runner) as pools:
            runner.execute(SchedulerOutput(dict(zip(ids, lengths)), new)).result()
            rows = [runner.batch.sequences[name].row for name in ids]
            assert runner.batch.num_computed[rows].tolist() == lengths
            runner.execute(SchedulerOutput(finished_request_ids=ids))
            for pool in pools["slots"]:
                assert pool[slots].isfinite().all() and pool[n + 1 :].isnan().all()
            assert all(pool[spare].isnan().all() for pool in pools["pages"])
            return [pool[slots].float() for pool in pools["slots"]]

    asked = check_against_kernels(runner, compute, n)
    assert asked == [("prompts", padded_size(PROMPT_SIZES, sum(lengths))), ("sample", n)]


@pytest.fixture(scope="module")
def prompt_llm(tiny_model):
    limits = {"max_model_len": 2200, "max_num_seqs": 4, "num_gpu_blocks_override": 144}  # all pages are looked through
    return LLM(str(tiny_model), use_tqdm_on_load=False, **limits)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[100], [100, 3, 20]], ids=str)
def test_prompts_in_a_graph_do_not_wait_for_the_device(prompt_llm, lengths):
    core = prompt_llm.llm_engine.core
    for _ in range(2):  # what happens once happens the first time
        for i, n in enumerate(lengths):
            prompt_llm.llm_engine.add_request(f"r{i}", {"prompt_token_ids": list(range(5, 5 + n))}, GREEDY)
        scheduled = core.scheduler.schedule()
        assert list(scheduled.num_scheduled_tokens.values()) == lengths
        torch.cuda.set_sync_debug_mode("error")
        try:
            core._under_way.append((scheduled, core.worker.execute(scheduled)))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        while prompt_llm.llm_engine.has_unfinished_requests:
            prompt_llm.llm_engine.step()


@pytest.mark.gpu
def test_decoding_in_graphs_does_not_wait_for_the_device(tiny_model):
    llm = LLM(str(tiny_model), max_model_len=256, max_num_seqs=4, use_tqdm_on_load=False)
    core = llm.llm_engine.core
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    llm.generate(["12+34="] * 3, params, use_tqdm=False)
    for i in range(3):
        llm.llm_engine.add_request(f"r{i}", {"prompt_token_ids": [5, 6, 7, i]}, params)
    for _ in range(3):
        llm.llm_engine.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        scheduled = core.scheduler.schedule()
        assert set(scheduled.num_scheduled_tokens.values()) == {1}
        core._under_way.append((scheduled, core.worker.execute(scheduled)))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    while llm.llm_engine.has_unfinished_requests:
        llm.llm_engine.step()
