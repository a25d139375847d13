import math
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm.config import load_hf_config, parse_hf_config, parse_quantization, preset_names, resolve_model
from vllm.v1.core.memory_plan import (
    EDITED_LOGITS,
    RUNTIME_RESERVE,
    GiB,
    MemoryPlanError,
    context_ceiling,
    format_bytes,
    kv_bytes_per_token,
    plan,
    plan_pools,
    state_bytes_per_slot,
    weight_bytes,
    workspace_bytes,
)

MiB = 1 << 20
CONFIG = load_hf_config(resolve_model("preset:qwen3.5-35b-a3b-awq-4bit"))
TEXT = CONFIG.text
QUANT = parse_quantization(CONFIG.quantization)
SLOT = 30 * (32 * 128 * 128 * 4 + 8192 * 3 * 2)  # 2 MiB fp32 and a window of three bf16 columns, 30 layers
TOKEN = 10 * 2 * 2 * 256 * 2  # 10 layers, keys and values, 2 heads of 256, bf16
PAGE = 16 * TOKEN


def test_a_slot_and_a_token_of_the_35b():
    assert state_bytes_per_slot(TEXT) == SLOT == 64_389_120
    assert kv_bytes_per_token(TEXT) == TOKEN == 20_480
    assert state_bytes_per_slot(TEXT, "float32", "float32") == 30 * (2 * MiB + 8192 * 3 * 4)
    assert state_bytes_per_slot(TEXT, "bfloat16", "bfloat16") == 30 * (1 * MiB + 8192 * 3 * 2)
    assert kv_bytes_per_token(TEXT, "float32") == 2 * TOKEN
    assert kv_bytes_per_token(TEXT, "fp8_e4m3") == TOKEN // 2


def test_weights_of_the_quantised_35b():
    found = weight_bytes(TEXT, "bfloat16", QUANT)
    # The bytes one decoding step reads, measured on the real layout: GDN projections, head, attention, shared expert, router.
    assert found["GDN"] == pytest.approx(2.02e9, rel=5e-3)
    assert found["lm_head"] == pytest.approx(1.017e9, rel=1e-3)
    assert found["attention"] == pytest.approx(0.545e9, rel=1e-3)
    assert found["shared expert"] == pytest.approx(0.252e9, rel=2e-3)
    assert found["router"] == pytest.approx(0.042e9, rel=1e-2)
    assert found["routed experts"] == 40 * 256 * 3 * 512 * 2048 * (4 / 8 + 2 / 32)
    plain = weight_bytes(TEXT)
    assert {name for name in plain if plain[name] != found[name]} == {"routed experts"}
    assert plain["routed experts"] == 40 * 256 * 3 * 512 * 2048 * 2


def test_quantised_linear_layers_of_other_kinds():
    config = {**CONFIG.quantization, "ignore": ["lm_head", "re:.*in_proj_[ab]$"]}
    found = weight_bytes(TEXT, "bfloat16", parse_quantization(config))
    qkvzo = 2048 * (8192 + 4096 + 4096)
    plain = weight_bytes(TEXT)
    assert plain["GDN"] - found["GDN"] == pytest.approx(30 * qkvzo * (2 - 0.5625), abs=100)
    assert found["lm_head"] == plain["lm_head"] and found["embeddings"] == plain["embeddings"]
    assert found["attention"] < 0.3 * plain["attention"]
    everything = {**CONFIG.quantization, "ignore": []}
    assert weight_bytes(TEXT, "bfloat16", parse_quantization(everything))["lm_head"] < plain["lm_head"] / 3


def test_tied_embeddings_have_no_head():
    text = load_hf_config(resolve_model("preset:qwen3.5-0.8b")).text
    assert weight_bytes(text)["lm_head"] == 0
    assert weight_bytes(text)["embeddings"] == 248320 * 1024 * 2


def test_pools():
    budget = 65 * SLOT + 1000 * PAGE + PAGE - 1
    sizes = plan_pools(TEXT, budget, max_model_len=15_984, max_num_seqs=64)
    assert (sizes.num_slots, sizes.num_blocks) == (65, 1000)
    assert (sizes.bytes_per_slot, sizes.bytes_per_block) == (SLOT, PAGE)
    assert sizes.kv_bytes + sizes.state_bytes <= budget


def test_never_more_pages_than_can_be_used():
    sizes = plan_pools(TEXT, 100 * GiB, max_model_len=1000, max_num_seqs=4)
    assert sizes.num_blocks == 1 + 4 * 63
    assert sizes.num_slots == 5


def test_too_long_a_context_names_what_fits():
    budget = 65 * SLOT + 1000 * PAGE
    with pytest.raises(MemoryPlanError) as caught:
        plan_pools(TEXT, budget, max_model_len=262144, max_num_seqs=64)
    message = str(caught.value)
    assert "--max-model-len 262144 needs 5.0 GiB" in message
    assert "--max-model-len 15984" in message and "15,984 tokens" in message
    assert "--gpu-memory-utilization" in message and "--max-num-seqs" not in message and "\n" not in message
    assert plan_pools(TEXT, budget, max_model_len=15984, max_num_seqs=64)


def test_fewer_sequences_can_make_room():
    budget = 65 * SLOT + 15_000 * PAGE
    with pytest.raises(MemoryPlanError, match=r"--max-num-seqs (\d+) ") as caught:
        plan_pools(TEXT, budget, max_model_len=262144, max_num_seqs=64)
    seqs = int(str(caught.value).split("--max-num-seqs ")[1].split()[0])
    assert plan_pools(TEXT, budget, max_model_len=262144, max_num_seqs=seqs)
    with pytest.raises(MemoryPlanError):
        plan_pools(TEXT, budget, max_model_len=262144, max_num_seqs=seqs + 1)


def test_too_many_sequences_name_what_fits():
    with pytest.raises(MemoryPlanError, match=r"--max-num-seqs 256 needs .* --max-num-seqs 15 is the most") as caught:
        plan_pools(TEXT, GiB, max_model_len=16, max_num_seqs=256)
    assert "\n" not in str(caught.value)
    assert plan_pools(TEXT, GiB, max_model_len=16, max_num_seqs=15)
    with pytest.raises(MemoryPlanError):
        plan_pools(TEXT, GiB, max_model_len=16, max_num_seqs=16)


def test_no_room_at_all():
    with pytest.raises(MemoryPlanError, match="too little for even one sequence"):
        plan_pools(TEXT, SLOT, max_model_len=16, max_num_seqs=1)
    with pytest.raises(MemoryPlanError, match="too little"):
        plan_pools(TEXT, -GiB, max_model_len=16, max_num_seqs=1)


def test_override():
    sizes = plan_pools(TEXT, 0, max_model_len=160, max_num_seqs=2, num_gpu_blocks_override=11)
    assert (sizes.num_blocks, sizes.num_slots) == (11, 3)
    with pytest.raises(MemoryPlanError, match=r"--num-gpu-blocks-override 10: .*at least 11"):
        plan_pools(TEXT, 0, max_model_len=160, max_num_seqs=2, num_gpu_blocks_override=10)


@settings(max_examples=200, deadline=None)
@given(
    budget=st.integers(0, 40 * GiB),
    length=st.integers(1, 262144),
    seqs=st.integers(1, 512),
    block_size=st.sampled_from([16, 32, 64, 128]),
)
def test_books_balance(budget, length, seqs, block_size):
    """Either everything fits into the budget, with room for one sequence of full length, or the error's advice fits."""

    def pools(length, seqs):
        return plan_pools(TEXT, budget, max_model_len=length, max_num_seqs=seqs, block_size=block_size)

    try:
        sizes = pools(length, seqs)
    except MemoryPlanError as error:
        message = str(error)
        if "--max-model-len" in message:
            shorter = int(message.split(": --max-model-len ")[1].split()[0].rstrip(","))
            assert 0 < shorter < length
            assert pools(shorter, seqs)
        elif "is the most" in message:
            fewer = int(message.split("; --max-num-seqs ")[1].split()[0])
            assert fewer < seqs
            assert pools(min(length, block_size), fewer)
        return
    assert sizes.kv_bytes + sizes.state_bytes <= budget
    assert sizes.num_slots == seqs + 1
    needed = math.ceil(length / block_size)
    assert needed <= sizes.num_blocks - 1 <= seqs * needed


@settings(max_examples=100, deadline=None)
@given(budget=st.integers(0, 60 * GiB), seqs=st.integers(1, 256))
def test_ceiling_is_exact(budget, seqs):
    tokens = context_ceiling(TEXT, budget, seqs)
    used = (1 + seqs) * SLOT + PAGE + seqs * tokens // 16 * PAGE
    assert tokens % 16 == 0
    if tokens:
        assert used <= budget
    if tokens < TEXT.max_position_embeddings:
        assert used + seqs * PAGE > budget


def test_models_without_one_of_the_two_layers():
    raw = CONFIG.raw
    linear = parse_hf_config(raw, {"text_config": {"num_hidden_layers": 3}}).text
    assert kv_bytes_per_token(linear) == 0
    assert context_ceiling(linear, GiB, 4) == 262144
    assert plan_pools(linear, GiB, max_model_len=100, max_num_seqs=4).num_blocks == 1 + 4 * 7
    full = parse_hf_config(raw, {"text_config": {"num_hidden_layers": 1, "layer_types": ["full_attention"]}}).text
    assert state_bytes_per_slot(full) == 0
    assert plan_pools(full, GiB, max_model_len=100, max_num_seqs=4).num_slots == 5


def test_workspace_grows_with_the_step():
    small = workspace_bytes(TEXT, max_num_batched_tokens=512, max_num_seqs=1)
    assert small < workspace_bytes(TEXT, max_num_batched_tokens=8192, max_num_seqs=1)
    assert small < workspace_bytes(TEXT, max_num_batched_tokens=512, max_num_seqs=512)
    many = workspace_bytes(TEXT, max_num_batched_tokens=4096, max_num_seqs=64)
    assert (
        many - workspace_bytes(TEXT, max_num_batched_tokens=4096, max_num_seqs=1) == 63 * 32 * 128 * 128 * 2
    )  # a state each
    logits = 256 * 248320 * 2 + 16 * EDITED_LOGITS
    assert 0 <= workspace_bytes(TEXT, max_num_batched_tokens=1, max_num_seqs=256) - logits < 1 << 20
    few = workspace_bytes(TEXT, max_num_batched_tokens=1, max_num_seqs=4)
    assert few < workspace_bytes(TEXT, max_num_batched_tokens=1, max_num_seqs=256) - 252 * 248320 * 2


def test_a_quantised_weight_is_dequantised_for_many_tokens():
    """Of the 27B the largest is gate and up, [34816 x 5120]; experts never are."""
    dense = load_hf_config(resolve_model("preset:qwen3.6-27b")).text
    quant = parse_quantization({"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"})
    limits = {"max_num_batched_tokens": 512, "max_num_seqs": 1}
    copy = workspace_bytes(dense, **limits, quant=quant) - workspace_bytes(dense, **limits)
    assert copy == 2 * 34816 * 5120
    experts_alone = parse_quantization(load_hf_config(resolve_model("preset:qwen3.5-35b-a3b-awq-4bit")).quantization)
    assert workspace_bytes(TEXT, **limits, quant=experts_alone) == workspace_bytes(TEXT, **limits)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_plans(name, request):
    if name == "tiny":
        request.getfixturevalue("tiny_model")
    config = load_hf_config(resolve_model(f"preset:{name}"))
    text, quant = config.text, parse_quantization(config.quantization)
    need = sum(weight_bytes(text, "bfloat16", quant).values())
    found = plan(
        text,
        device_bytes=int(need / 0.9) + 32 * GiB,
        utilization=0.9,
        max_model_len=min(32768, text.max_position_embeddings),
        max_num_seqs=16,
        quant=quant,
    )
    assert found.problem is None and found.weight_total == need
    pools = found.pools
    used = need + found.workspace + RUNTIME_RESERVE + pools.kv_bytes + pools.state_bytes
    assert used <= 0.9 * found.device_bytes
    assert "sequences of" in found.describe() and len(found.describe().splitlines()) == 3


def test_a_plan_that_does_not_fit_says_so():
    small = plan(TEXT, device_bytes=24 * GiB, utilization=0.9, max_model_len=4096, max_num_seqs=8, quant=QUANT)
    assert small.pools is None and "leave nothing of 24.0 GiB x 0.9" in small.problem
    assert small.problem in small.describe()
    longer = plan(
        TEXT,
        device_bytes=32 * GiB,
        utilization=0.9,
        max_model_len=262144,
        max_num_seqs=64,
        quant=QUANT,
    )
    assert "--max-model-len" in longer.problem


def test_bytes_asked_for_replace_the_budget():
    found = plan(
        TEXT, device_bytes=GiB, utilization=0.9, max_model_len=1600, max_num_seqs=1, kv_cache_memory_bytes=4 * GiB
    )
    assert found.budget == 4 * GiB and found.pools.num_blocks == 101


@pytest.mark.parametrize(("count", "text"), [(5, "5 B"), (1536, "1.5 KiB"), (64_389_120, "61.4 MiB"), (GiB, "1.0 GiB")])
def test_format_bytes(count, text):
    assert format_bytes(count) == text


def test_torch_is_not_imported():
    code = "import sys, vllm.v1.core.memory_plan; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
