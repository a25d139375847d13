"""The whole network against transformers: the same logits, however the work is cut into steps and whoever shares them."""

import copy
from itertools import product

import pytest
import torch

from tests.checkpoints import reference_model, save_checkpoint
from tests.models.driver import Driver, Seq
from tests.models.families import load
from vllm.config import ModelConfig, VllmConfig
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.mamba.gdn_linear_attn import DECODE, IN_PROJ, set_gdn_variants
from vllm.model_executor.model_loader import load_model

TOLERANCE = 1e-4  # on logits of deviation 0.7; measured 2e-5


def greedy_reference(model, tokens: list[int], count: int) -> list[int]:
    """transformers' own greedy continuation, through its caches."""
    with torch.inference_mode():
        out = model.generate(torch.tensor([tokens]), max_new_tokens=count, do_sample=False, eos_token_id=None)
    return out[0, len(tokens) :].tolist()


def test_prompt(family, prompt):
    driver = Driver(family.load())
    got = driver.prefill(driver.add(prompt))
    assert got.shape == (200, 512)
    torch.testing.assert_close(got, family.logits(prompt), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("in_proj", IN_PROJ)
def test_greedy(family, prompt, in_proj):
    driver = Driver(family.load(gdn_in_proj=in_proj))
    want = greedy_reference(family.reference, prompt[:50], 64)
    assert driver.greedy(driver.add(prompt[:50]), 64) == want
    assert len(set(want)) > 20, "a model that repeats itself proves little"


def test_every_gdn_variant(family, prompt):
    """One prompt chunk, then token by token; the variants change on one loaded model."""
    driver, want = Driver(family.load()), family.logits(prompt[:48])
    for in_proj, decode in product(IN_PROJ, DECODE):
        assert set_gdn_variants(driver.model, in_proj, decode, "torch") == (in_proj, decode, "torch")
        seq = driver.add(prompt[:48])
        got = driver.prefill(seq, tuple(range(32, 48)))
        driver.finish(seq)
        torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    "cuts", [(1,), (2,), (3,), (15, 16, 17), (63, 64, 65), (64, 128), (199,), (100, 101, 102, 150)]
)
def test_prefill_cut_anywhere(families, prompt, cuts):
    for name in ("moe", "next"):
        driver = Driver(families[name].load())
        got = driver.prefill(driver.add(prompt), cuts)
        torch.testing.assert_close(got, families[name].logits(prompt), atol=TOLERANCE, rtol=0)


def test_token_by_token(families, prompt):
    """Decoding the prompt itself is the recurrence; prefill is the chunked form."""
    driver = Driver(families["moe"].load())
    got = driver.prefill(driver.add(prompt[:80]), tuple(range(1, 80)))
    torch.testing.assert_close(got, families["moe"].logits(prompt[:80]), atol=TOLERANCE, rtol=0)


def test_batched_prefill(family, prompt):
    pieces = [prompt[:1], prompt[10:75], prompt[40:43], prompt[:128], prompt[100:]]
    driver = Driver(family.load())
    seqs = [driver.add(piece) for piece in pieces]
    got = driver.step([(seq, len(seq.tokens)) for seq in seqs])
    for piece, logits in zip(pieces, got):
        torch.testing.assert_close(logits, family.logits(piece), atol=TOLERANCE, rtol=0)


def test_mixed_batches_and_padding(family, prompt):
    """Sequences that decode beside others' prompt chunks, with rows of nobody in between; slots and pages are used again."""
    wants = {name: family.logits(tokens) for name, tokens in (("a", prompt[:60]), ("b", prompt[60:190]))}
    driver = Driver(family.load(), num_slots=4, num_blocks=24)
    a, b, c = driver.add(prompt[:60]), driver.add(prompt[60:190]), driver.add(prompt[5:30])
    got: dict[str, list[torch.Tensor]] = {"a": [], "b": []}

    def step(*work: tuple[Seq, int], **padding):
        for (seq, _), logits in zip(work, driver.step(list(work), **padding)):
            if seq is not c:
                got["a" if seq is a else "b"].append(logits)

    step((a, 40))
    step((a, 1), (b, 70), pad_decodes=2)
    step((a, 1), (b, 1), (c, 25), pad_decodes=1, pad_tokens=3)
    driver.finish(c)
    step((a, 1), (b, 1), pad_decodes=6)
    c = driver.add(prompt[90:120])  # a slot and pages that are no longer clean
    step((a, 1), (b, 30), (c, 30), pad_tokens=5)
    for _ in range(16):
        step((a, 1), (b, 1))
    step((b, 12), pad_decodes=1)
    for name, logits in got.items():
        torch.testing.assert_close(torch.cat(logits), wants[name], atol=TOLERANCE, rtol=0)
    c.computed, c.tokens = 0, prompt[90:120]
    torch.testing.assert_close(driver.step([(c, 30)])[0], family.logits(prompt[90:120]), atol=TOLERANCE, rtol=0)


def test_greedy_with_neighbours(family, prompt):
    want = [greedy_reference(family.reference, prompt[i : i + 20], 16) for i in (0, 20, 40)]
    driver = Driver(family.load())
    seqs = [driver.add(prompt[i : i + 20]) for i in (0, 20, 40)]
    logits = driver.step([(seq, 20) for seq in seqs])
    for _ in range(16):
        for seq, y in zip(seqs, logits):
            seq.tokens.append(int(y[-1].argmax()))
        logits = driver.step([(seq, 1) for seq in seqs], pad_decodes=1)
    assert [seq.tokens[20:] for seq in seqs] == want


def test_padding_leaves_every_state_alone(families, prompt):
    driver = Driver(families["moe"].load())
    seq = driver.add(prompt[:30])
    driver.prefill(seq)
    layers = driver.model.stateful_layers()
    kept = [layer.ssm_state.clone() for layer in layers.gdn], [layer.conv_state.clone() for layer in layers.gdn]
    pages = [torch.stack(layer.kv_cache)[:, 1:].clone() for layer in layers.attention]
    driver.step([], pad_decodes=3)
    for layer, ssm, conv in zip(layers.gdn, *kept):
        assert torch.equal(layer.ssm_state, ssm) and torch.equal(layer.conv_state, conv)
    for layer, before in zip(layers.attention, pages):
        assert torch.equal(torch.stack(layer.kv_cache)[:, 1:], before)


def test_mrope_positions_of_text_are_plain(families, prompt):
    driver = Driver(families["moe"].load())
    seq = driver.add(prompt[:20])
    ids, positions, context = driver.context([(seq, 20)])
    with torch.inference_mode(), set_forward_context(context):
        plain = driver.model(ids, positions)
        three = driver.model(ids, positions.expand(3, -1))
    assert torch.equal(plain, three)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("dense", {"attention_bias": True}),
        ("dense", {"tie_word_embeddings": True, "num_attention_heads": 2, "num_key_value_heads": 1}),
        ("moe", {"layer_types": ["full_attention", "linear_attention"] * 2, "num_experts_per_tok": 5}),
        ("next", {"mlp_only_layers": [1], "intermediate_size": 96, "linear_num_value_heads": 8}),
        ("dense", {"linear_num_key_heads": 4, "linear_value_head_dim": 16, "hidden_size": 96}),
    ],
    ids=lambda v: v if isinstance(v, str) else next(iter(v)),
)
def test_other_shapes(tmp_path, prompt, name, changes):
    reference = reference_model(name, **changes)
    driver = Driver(load(save_checkpoint(reference, tmp_path, experts="each")))
    with torch.inference_mode():
        want = reference(input_ids=torch.tensor([prompt])).logits[0]
    got = driver.prefill(driver.add(prompt), (97, 198, 199))
    torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=0)


def test_load_from_the_engines_configuration(tiny_model, prompt):
    config = VllmConfig.create(ModelConfig(model=str(tiny_model)), device="cpu")
    model = load_model(config, "cpu")
    layers = model.stateful_layers()
    text = config.model_config.hf_config.text
    assert (len(layers.attention), len(layers.gdn)) == (text.num_attention_layers, text.num_gdn_layers)
    assert layers.attention[0].kv_shape(7, 16) == (7, 16, text.num_key_value_heads, text.head_dim)
    assert layers.gdn[0].state_shapes()["conv_state"] == (text.conv_dim, text.linear_conv_kernel_dim - 1)
    driver = Driver(model)
    assert driver.prefill(driver.add(prompt[:9])).dtype == torch.float32


def test_bundled_checkpoint(tiny_model, prompt):
    import transformers

    reference = transformers.AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    driver = Driver(load(tiny_model))
    with torch.inference_mode():
        want = reference(input_ids=torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(driver.prefill(driver.add(prompt)), want, atol=TOLERANCE, rtol=0)
    assert driver.greedy(driver.add(prompt[:40]), 64) == greedy_reference(reference, prompt[:40], 64)


def row_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Median over tokens of the mean error of a token's logits. A token whose router flips to another expert in bfloat16 is far off
    in any implementation, so the maximum says little."""
    return (got.float().cpu() - want).abs().mean(-1).median().item()


@pytest.fixture(scope="module")
def bfloat16_error(families, prompt) -> dict[str, float]:
    """What transformers' own bfloat16 loses against float32: 0.017 to 0.032 on logits of deviation 0.7."""
    errors = {}
    for name, family in families.items():
        with torch.inference_mode():
            got = copy.deepcopy(family.reference).bfloat16()(input_ids=torch.tensor([prompt])).logits[0]
        errors[name] = row_error(got, family.logits(prompt))
    return errors


@pytest.mark.parametrize("cuts", [(), tuple(range(150, 200))], ids=["whole", "stepwise"])
@pytest.mark.parametrize("ssm_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bfloat16(family, prompt, bfloat16_error, cuts, ssm_dtype):
    driver = Driver(family.load(dtype=torch.bfloat16), ssm_dtype=ssm_dtype)
    got = driver.prefill(driver.add(prompt), cuts)
    assert row_error(got, family.logits(prompt)) < 1.2 * bfloat16_error[family.name]


@pytest.mark.gpu
@pytest.mark.parametrize("cuts", [(), (64, 100), tuple(range(150, 200))], ids=["whole", "chunks", "stepwise"])
def test_gpu_bfloat16(family, prompt, bfloat16_error, cuts):
    driver = Driver(family.load(torch.bfloat16, "cuda"))
    for variants in product(IN_PROJ, DECODE, ["triton"]):
        set_gdn_variants(driver.model, *variants)
        seq = driver.add(prompt)
        got = driver.prefill(seq, cuts)
        driver.finish(seq)
        assert row_error(got, family.logits(prompt)) < 1.5 * bfloat16_error[family.name], variants


@pytest.mark.gpu
def test_gpu_float32(family, prompt):
    torch.backends.cuda.matmul.allow_tf32 = False
    driver = Driver(family.load(torch.float32, "cuda"))
    got = driver.prefill(driver.add(prompt), (64, 65, 66, 150)).cpu()
    # kernels may multiply in tf32 inside a chunk
    torch.testing.assert_close(got, family.logits(prompt), atol=2e-2, rtol=0)


@pytest.mark.gpu
def test_gpu_mixed_batch_and_padding(family, prompt, bfloat16_error):
    driver = Driver(family.load(torch.bfloat16, "cuda"))
    a, b = driver.add(prompt[:60]), driver.add(prompt[60:190])
    first = driver.step([(a, 50)], pad_tokens=6)[0]
    mixed = driver.step([(a, 1), (b, 100)], pad_decodes=3, pad_tokens=2)
    then = [driver.step([(a, 1), (b, 1)], pad_decodes=6) for _ in range(9)]
    got = {"a": [first, mixed[0], *(y for y, _ in then)], "b": [mixed[1], *(y for _, y in then)]}
    for key, tokens in (("a", prompt[:60]), ("b", prompt[60 : 60 + 109])):
        assert row_error(torch.cat(got[key]), family.logits(tokens)) < 1.5 * bfloat16_error[family.name]


@pytest.mark.gpu
@pytest.mark.parametrize("variants", list(product(IN_PROJ, DECODE)), ids="-".join)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gpu_decode_never_waits(family, prompt, dtype, variants):
    """A decode forward enqueues work and reads nothing back."""
    driver = Driver(family.load(dtype, "cuda", gdn_in_proj=variants[0], gdn_decode=variants[1]))
    seqs = [driver.add(prompt[i : i + 20]) for i in (0, 20, 40)]
    driver.step([(seq, 20) for seq in seqs])
    for seq in seqs:
        seq.tokens.append(5)
    driver.step([(seq, 1) for seq in seqs], pad_decodes=1)  # compiles kernels
    for seq in seqs:
        seq.tokens.append(6)
    ids, positions, context = driver.context([(seq, 1) for seq in seqs], pad_decodes=1)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.inference_mode(), set_forward_context(context):
            logits = driver.model.compute_logits(driver.model(ids, positions))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert logits.isfinite().all()


@pytest.mark.gpu
def test_gpu_prefill_never_waits(families, prompt):
    driver = Driver(families["moe"].load(torch.bfloat16, "cuda"))
    warm, seqs = driver.add(prompt), [driver.add(prompt[:150]), driver.add(prompt[50:90])]
    driver.prefill(warm, (70,))
    ids, positions, context = driver.context([(seq, len(seq.tokens)) for seq in seqs])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.inference_mode(), set_forward_context(context):
            hidden = driver.model(ids, positions)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert hidden.isfinite().all()
