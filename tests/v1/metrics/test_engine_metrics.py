"""The numbers of an engine: each token and request counted once, whatever happens to it."""

import types

import pytest
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

from vllm.config import ModelConfig, VllmConfig
from vllm.config.checkpoint import TINY
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.messages import EngineCoreInfo, EngineCoreOutput, SchedulerStats
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.metrics.engine_metrics import Distribution, EngineMetrics, steps
from vllm.v1.metrics.reader import Counter, Gauge, Histogram
from vllm.v1.metrics.throughput_log import ThroughputLog

NAMES = [
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "prompt_tokens_total",
    "generation_tokens_total",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "num_preemptions_total",
    "request_success_total",
    "cache_config_info",
    "iteration_tokens_total",
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_inference_time_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "spec_decode_num_drafts_total",
    "spec_decode_num_draft_tokens_total",
    "spec_decode_num_accepted_tokens_total",
    "spec_decode_num_accepted_tokens_per_pos_total",
]


@pytest.fixture
def config():
    return VllmConfig.create(
        ModelConfig(model=str(TINY), served_model_name='a "model"', max_model_len=300), device="cpu"
    )


@pytest.fixture
def metrics(config):
    return EngineMetrics(config)


def values(metrics):
    """name -> value, or (count, sum) of a histogram."""
    found = {}
    for metric in metrics.snapshot():
        key = metric.name.removeprefix("vllm:")
        if reason := metric.labels.get("finished_reason"):
            key += ":" + reason
        found[key] = (metric.count, metric.sum) if isinstance(metric, Histogram) else metric.value
    return found


def test_distribution():
    distribution = Distribution([1.0, 2.0, 5.0])
    for value in (0, 1, 1.5, 2, 5.0, 5.1, 100):
        distribution.observe(value)
    read = distribution.read("x", {"a": "b"}, "Help.")
    assert read.buckets == {"1.0": 2, "2.0": 4, "5.0": 5, "+Inf": 7}
    assert (read.count, read.sum, read.labels) == (7, pytest.approx(114.6), {"a": "b"})


def test_steps():
    assert steps(0.001, 0.02, (2.5, 5)) == [0.001, 0.0025, 0.005, 0.01]
    assert steps(1, 300, (2, 5)) == [1, 2, 5, 10, 20, 50, 100, 200]


class Story:
    """Requests on their way, with a clock."""

    def __init__(self, config, metrics):
        self.inputs = InputProcessor(config, None)
        self.outputs = OutputProcessor(None, metrics)
        self.now = 100.0

    def add(self, name, num_prompt_tokens=10, **params):
        request = self.inputs.process(
            name, [1] * num_prompt_tokens, SamplingParams(detokenize=False, **params), arrival_time=self.now
        )
        self.outputs.add_request(request)

    def step(self, *outputs, after=1.0):
        self.now += after
        self.outputs.receive(outputs, self.now)


def test_the_times_of_a_request(config, metrics):
    story = Story(config, metrics)
    story.add("r", 10)
    story.step(EngineCoreOutput("r", [1], scheduled_time=102.0), after=5.0)  # 105
    story.step(EngineCoreOutput("r", [2, 3]))
    story.step(EngineCoreOutput("r", [4], "stop"), after=2.0)  # 108
    found = values(metrics)
    assert found["time_to_first_token_seconds"] == (1, 5.0)
    assert found["request_queue_time_seconds"] == (1, 2.0)
    assert found["request_prefill_time_seconds"] == (1, 3.0)
    assert found["request_decode_time_seconds"] == (1, 3.0)
    assert found["request_inference_time_seconds"] == (1, 6.0)
    assert found["e2e_request_latency_seconds"] == (1, 8.0)
    assert found["inter_token_latency_seconds"] == (2, 3.0)
    assert found["request_time_per_output_token_seconds"] == (1, 1.0)
    assert found["request_prompt_tokens"] == (1, 10) and found["request_generation_tokens"] == (1, 4)
    assert (found["prompt_tokens"], found["generation_tokens"]) == (10, 4)
    assert (found["request_success:stop"], found["request_success:length"], found["request_success:abort"]) == (1, 0, 0)


def test_aborted_requests_count_what_they_got_and_no_times(config, metrics):
    story = Story(config, metrics)
    for name in ("never", "some", "engine"):
        story.add(name, 7)
    story.step(EngineCoreOutput("some", [1], scheduled_time=100.0))
    story.step(EngineCoreOutput("some", [2]), EngineCoreOutput("engine", [], "abort"))
    story.outputs.abort(["never", "some", "some", "nobody"])
    story.step(EngineCoreOutput("some", [3]), EngineCoreOutput("never", [1]))  # on their way when the abort was sent
    found = values(metrics)
    assert (found["prompt_tokens"], found["generation_tokens"]) == (7, 2)
    assert found["request_success:abort"] == 3 and found["request_success:stop"] == 0
    assert found["request_generation_tokens"] == (3, 2)
    assert found["e2e_request_latency_seconds"] == found["request_decode_time_seconds"] == (0, 0)


def test_several_sequences_are_one_request(config, metrics):
    story = Story(config, metrics)
    story.add("r", 10, n=2, temperature=1.0)
    story.step(EngineCoreOutput("0_r", [1], scheduled_time=100.0))
    story.step(EngineCoreOutput("0_r", [1], "stop"), EngineCoreOutput("1_r", [1], scheduled_time=101.5))
    story.step(EngineCoreOutput("1_r", [1], "length"))
    found = values(metrics)
    assert (found["prompt_tokens"], found["generation_tokens"]) == (10, 4)
    assert found["time_to_first_token_seconds"] == (1, 1.0) and found["inter_token_latency_seconds"] == (2, 2.0)
    assert found["request_prompt_tokens"] == (1, 10) and found["request_generation_tokens"] == (1, 4)
    assert sum(found[f"request_success:{reason}"] for reason in ("stop", "length", "abort")) == 1


def test_gauges_follow_the_core_and_the_front_end(metrics):
    metrics.step(SchedulerStats(3, 1, 0.5, num_preemptions=2, num_step_tokens=64), num_unfinished=7)
    found = values(metrics)
    assert (found["num_requests_running"], found["num_requests_waiting"], found["kv_cache_usage_perc"]) == (3, 4, 0.5)
    assert found["num_preemptions"] == 2 and found["iteration_tokens_total"] == (1, 64)
    metrics.queue_length(2)
    assert (metrics.num_running, metrics.num_waiting) == (2, 0)
    metrics.step(SchedulerStats(), num_unfinished=0)
    assert (metrics.num_running, metrics.num_waiting, metrics.step_tokens.sum) == (0, 0, 64)


def test_drafts(metrics):
    """All zero until there are any; then each place in a draft has its own count."""
    [first] = [m for m in metrics.snapshot() if m.name.endswith("accepted_tokens_per_pos")]
    assert (first.value, first.labels["position"]) == (0, "0")
    stats = SchedulerStats(
        num_drafts=4, num_draft_tokens=12, num_accepted_tokens=5, num_accepted_tokens_per_pos=[3, 1, 1]
    )
    metrics.step(stats, num_unfinished=0)
    found = values(metrics)
    assert [found[f"spec_decode_num_{name}"] for name in ("drafts", "draft_tokens", "accepted_tokens")] == [4, 12, 5]
    places = [m for m in metrics.snapshot() if m.name.endswith("accepted_tokens_per_pos")]
    assert [(m.labels["position"], m.value) for m in places] == [("0", 3), ("1", 1), ("2", 1)]


def test_prometheus_text(metrics):
    metrics.engine_is_ready(EngineCoreInfo(num_blocks=11, block_size=16, num_slots=3))
    metrics.first_token(10, 0.02)
    metrics.step(SchedulerStats(num_step_tokens=3), num_unfinished=0)
    text = metrics.render().decode()
    assert metrics.content_type.startswith("text/plain")
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    series = {sample.name for sample in samples}
    for name in NAMES:
        assert f"vllm:{name}" in series or f"vllm:{name}_bucket" in series, name
    assert all(s.labels["model_name"] == 'a "model"' and s.labels["engine"] == "0" for s in samples)
    assert not any(s.name.endswith("_created") for s in samples)
    by_name = {sample.name: sample for sample in samples}
    assert by_name["vllm:prompt_tokens_total"].value == 10
    assert by_name["vllm:time_to_first_token_seconds_count"].value == 1
    assert by_name["vllm:iteration_tokens_total_sum"].value == 3
    info = by_name["vllm:cache_config_info"].labels
    assert (info["num_gpu_blocks"], info["block_size"]) == ("11", "16") and "gpu_memory_utilization" in info
    [bucket] = [s for s in samples if s.name == "vllm:time_to_first_token_seconds_bucket" and s.labels["le"] == "0.025"]
    assert bucket.value == 1


def test_engines_do_not_share_a_registry(config):
    first, second = EngineMetrics(config), EngineMetrics(config, engine="1")
    first.first_token(5, 0.1)
    assert 'prompt_tokens_total{engine="0",model_name="a \\"model\\""} 5.0' in first.render().decode()
    assert 'prompt_tokens_total{engine="1",model_name="a \\"model\\""} 0.0' in second.render().decode()
    assert first.registry is first.registry is not second.registry is not REGISTRY


def test_snapshot_needs_no_prometheus(metrics):
    kinds = {type(metric) for metric in metrics.snapshot()}
    assert kinds == {Counter, Gauge, Histogram}
    assert metrics._registry is None


def test_throughput_log(caplog):
    numbers = types.SimpleNamespace(
        prompt_tokens=0, generation_tokens=0, num_running=2, num_waiting=1, kv_cache_usage=0.25
    )
    clock = types.SimpleNamespace(now=1000.0)
    log = ThroughputLog(numbers, clock=lambda: clock.now)

    def work(seconds):
        for _ in range(seconds):
            log.step()
            numbers.prompt_tokens += 4
            numbers.generation_tokens += 10
            clock.now += 1

    with caplog.at_level("INFO", logger="vllm"):
        work(10)
        assert not caplog.messages
        work(1)
        words = "prompts 4.0 tokens/s, generation 10.0 tokens/s; 2 running, 1 waiting; KV pages 25.0 % used"
        assert len(caplog.messages) == 1 and words in caplog.messages[0]
        clock.now += 3600
        numbers.generation_tokens += 10**6
        work(11)
        assert len(caplog.messages) == 2 and "generation 10.0 tokens/s" in caplog.messages[1]
