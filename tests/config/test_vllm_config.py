import dataclasses

import pytest

from vllm.config import (
    CacheConfig,
    CompilationConfig,
    GDNConfig,
    LoadConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    VllmConfig,
)

MODEL = "preset:qwen3.5-35b-a3b"


def create(device="cuda", **knobs):
    return VllmConfig.create(ModelConfig(model=MODEL), device=device, **knobs)


def test_defaults_on_a_gpu():
    config = create()
    assert config.model_config.dtype == "bfloat16"
    assert config.model_config.max_model_len == 262144
    assert config.model_config.served_model_name == MODEL
    assert config.model_config.quantization is None and config.quant_scheme is None
    assert config.model_config.tokenizer == config.model_config.model_path
    assert config.hf_config.architecture == "Qwen3_5MoeForConditionalGeneration"
    cache = config.cache_config
    assert (cache.kv_cache_dtype, cache.mamba_cache_dtype, cache.mamba_ssm_cache_dtype) == (
        *("bfloat16", "bfloat16", "float32"),
    )
    assert config.parallel_config.device == "cuda"


def test_defaults_on_a_cpu():
    config = VllmConfig.create(ModelConfig(model=MODEL), parallel_config=ParallelConfig(device="cpu"))
    cache = config.cache_config
    assert config.model_config.dtype == cache.kv_cache_dtype == cache.mamba_cache_dtype == "float32"
    assert config.parallel_config.device == "cpu"


def test_what_was_asked_for_stays():
    config = VllmConfig.create(
        ModelConfig(model=MODEL, dtype="float16", max_model_len=1000, served_model_name="m", tokenizer="/t"),
        cache_config=CacheConfig(mamba_cache_dtype="float32", mamba_ssm_cache_dtype="bfloat16"),
        gdn_config=GDNConfig(gdn_in_proj="serial"),
        device="cuda",
    )
    model, cache = config.model_config, config.cache_config
    assert (model.dtype, model.max_model_len, model.served_model_name, model.tokenizer) == ("float16", 1000, "m", "/t")
    assert (cache.kv_cache_dtype, cache.mamba_cache_dtype, cache.mamba_ssm_cache_dtype) == (
        *("float16", "float32", "bfloat16"),
    )
    assert config.gdn_config.gdn_in_proj == "serial"


def test_create_changes_nothing_it_was_given():
    model, cache = ModelConfig(model=MODEL), CacheConfig()
    VllmConfig.create(model, cache_config=cache, device="cpu")
    assert model == ModelConfig(model=MODEL) and cache == CacheConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.dtype = "float32"


def test_unresolved_values_are_refused():
    with pytest.raises(ValueError, match=r"VllmConfig\.create"):
        VllmConfig(model_config=ModelConfig(model=MODEL))


def test_quantised_checkpoint():
    config = VllmConfig.create(ModelConfig(model=MODEL + "-awq-4bit"), device="cuda")
    assert config.model_config.quantization == "compressed-tensors"
    assert [form.group for form in config.quant_scheme.formats] == [32]
    VllmConfig.create(ModelConfig(model=MODEL + "-awq-4bit", quantization="compressed-tensors"), device="cuda")
    with pytest.raises(ValueError, match=r"^--quantization awq: .*config\.json says compressed-tensors$"):
        VllmConfig.create(ModelConfig(model=MODEL + "-awq-4bit", quantization="awq"), device="cuda")


@pytest.mark.parametrize("asked", ["fp8", "fp8_e4m3"])
def test_keys_and_values_in_fp8(asked):
    assert create(cache_config=CacheConfig(kv_cache_dtype=asked)).cache_config.kv_cache_dtype == "fp8_e4m3"


def test_keys_and_values_as_the_checkpoint_asks():
    model = ModelConfig(model=MODEL + "-awq-4bit")
    assert VllmConfig.create(model, device="cuda").cache_config.kv_cache_dtype == "bfloat16"
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    overrides = {"quantization_config": {"kv_cache_scheme": scheme}}
    asking = dataclasses.replace(model, hf_overrides=overrides)
    assert VllmConfig.create(asking, device="cuda").cache_config.kv_cache_dtype == "fp8_e4m3"
    plain = CacheConfig(kv_cache_dtype="bfloat16")
    assert VllmConfig.create(asking, cache_config=plain, device="cuda").cache_config.kv_cache_dtype == "bfloat16"


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (
            lambda: VllmConfig.create(ModelConfig(model=MODEL, max_model_len=262145), device="cpu"),
            "max_position_embeddings 262144",
        ),
        (lambda: create(scheduler_config=SchedulerConfig(enable_chunked_prefill=False)), "--max-num-batched-tokens"),
        (lambda: create(cache_config=CacheConfig(kv_cache_dtype="float16")), "--kv-cache-dtype float16"),
        (
            lambda: VllmConfig.create(ModelConfig(model=MODEL, quantization="compressed-tensors"), device="cpu"),
            "weights are plain",
        ),
        (lambda: ModelConfig(dtype="int8"), "--dtype must be one of auto, bfloat16"),
        (lambda: ModelConfig(max_model_len=0), "--max-model-len must be at least 1"),
        (lambda: ModelConfig(max_logprobs=-2), "--max-logprobs must be at least -1"),
        (lambda: LoadConfig(load_format="gguf"), "--load-format"),
        (lambda: CacheConfig(gpu_memory_utilization=0), "--gpu-memory-utilization"),
        (lambda: CacheConfig(gpu_memory_utilization=1.5), "--gpu-memory-utilization"),
        (lambda: CacheConfig(block_size=24), "--block-size must be one of 16, 32, 64, 128; got 24"),
        (lambda: CacheConfig(num_gpu_blocks_override=1), "--num-gpu-blocks-override"),
        (lambda: SchedulerConfig(max_num_seqs=0), "--max-num-seqs must be at least 1"),
        (lambda: SchedulerConfig(max_num_seqs=256, max_num_batched_tokens=255), "--max-num-batched-tokens 255"),
        (lambda: SchedulerConfig(scheduling_policy="lifo"), "--scheduling-policy"),
        (lambda: ParallelConfig(tensor_parallel_size=2), "--tensor-parallel-size 2"),
        (lambda: GDNConfig(gdn_in_proj="dual"), "--gdn-in-proj"),
    ],
)
def test_errors_name_the_flag(make, word):
    with pytest.raises(ValueError) as caught:
        make()
    assert word in str(caught.value) and "\n" not in str(caught.value)


def test_whole_prompts_fit_a_step_without_chunks():
    config = create(scheduler_config=SchedulerConfig(enable_chunked_prefill=False, max_num_batched_tokens=262144))
    assert not config.scheduler_config.enable_chunked_prefill


def test_device_auto_follows_torch(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert ParallelConfig().resolve_device() == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ParallelConfig().resolve_device() == "cpu"
    with pytest.raises(ValueError, match="--device cuda"):
        ParallelConfig(device="cuda").resolve_device()


def test_overrides_reach_the_model():
    model = ModelConfig(model=MODEL, hf_overrides={"text_config": {"num_hidden_layers": 4}})
    assert VllmConfig.create(model, device="cpu").hf_config.text.num_hidden_layers == 4


def test_prompts_that_are_graphs():
    assert create().prompt_sizes(1)[-1] == 2048
    short = VllmConfig.create(ModelConfig(model=MODEL, max_model_len=100), device="cuda")
    assert short.prompt_sizes(1)[-2:] == (64, 100) and short.prompt_sizes(8)[-2:] == (512, 800)
    assert create(scheduler_config=SchedulerConfig(max_num_batched_tokens=300)).prompt_sizes(1)[-2:] == (256, 300)
    asked = CompilationConfig(compilation_config={"cudagraph_mode": "FULL_DECODE_ONLY"})
    assert create(compilation_config=asked).prompt_sizes(1) == create(device="cpu").prompt_sizes(2) == ()
