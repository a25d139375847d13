"""The trainer's network against transformers, and the bundled checkpoint's layout and knowledge."""

import json
from pathlib import Path

import pytest
import tiny_model
import torch
import train_tiny
from safetensors import safe_open
from tiny_data import BatchMaker, Encoder, Shape
from tiny_folder import load_parameters, save_folder
from tiny_score import TransformersDecoder, score

from vllm.benchmarks import tiny_tasks

FOLDER = Path(__file__).resolve().parents[2] / "vllm" / "assets" / "tiny-qwen3_5-moe"


@pytest.fixture(scope="module")
def text():
    return json.loads((FOLDER / "config.json").read_text())["text_config"]


@pytest.fixture(scope="module")
def decoder():
    return TransformersDecoder(FOLDER, torch.float32)


def test_chunk_rule_is_the_recurrence():
    torch.manual_seed(0)
    B, L, Hk, Hv, K = 2, 128, 2, 4, 16
    q, k = (torch.nn.functional.normalize(torch.randn(B, L, Hk, K), dim=-1) for _ in range(2))
    v, g, beta = torch.randn(B, L, Hv, K), -0.2 * torch.rand(B, L, Hv), torch.rand(B, L, Hv)
    inputs = [x.requires_grad_() for x in (q, k, v, g, beta)]

    S, outputs = torch.zeros(B, Hv, K, K), []
    q_v, k_v = (x.repeat_interleave(Hv // Hk, 2) for x in (q, k))
    for t in range(L):
        S = S * g[:, t].exp()[..., None, None]
        d = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhkv,bhk->bhv", S, k_v[:, t]))
        S = S + torch.einsum("bhk,bhv->bhkv", k_v[:, t], d)
        outputs.append(torch.einsum("bhkv,bhk->bhv", S, q_v[:, t]))
    expected, got = torch.stack(outputs, 1), tiny_model.chunk_delta_rule(*inputs)

    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    seed = torch.randn_like(expected)
    for a, b in zip(torch.autograd.grad(got, inputs, seed), torch.autograd.grad(expected, inputs, seed), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_network_is_transformers_network(text, decoder, monkeypatch):
    encoder = Encoder()
    ids = torch.tensor([(encoder.item_prompt(item) * 3)[:128] for item in tiny_tasks.generate("tool", 2)])
    weights = {name: value.float() for name, value in load_parameters(FOLDER, text).items()}
    monkeypatch.setattr(tiny_model.torch, "bfloat16", torch.float32)  # every rounding in the network becomes a no-op
    with torch.no_grad():
        hidden, _ = tiny_model.language_model(weights, text, ids)
        drafted, _ = tiny_model.mtp_model(weights, text, ids, hidden)
        expected = decoder.model(input_ids=ids).logits
        draft = decoder._draft(ids)
    torch.testing.assert_close(hidden @ weights["lm_head.weight"].T, expected, atol=2e-3, rtol=1e-3)
    assert torch.equal((drafted @ weights["lm_head.weight"].T).argmax(-1)[:, :-1], draft[:, :-1])


def test_folder_layout(text):
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 10_000_000
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        names = set(file.keys())
        for name, shape in tiny_model.parameter_shapes(text).items():
            tensor = file.get_tensor(name)
            assert (tuple(tensor.shape), tensor.dtype) == (shape, tiny_model.saved_dtype(name))
            assert torch.isfinite(tensor.float()).all()
            if tensor.dim() == 1 and "norm" in name and "linear_attn" not in name:
                assert tensor.float().abs().mean() > 0.05  # leaving out `1 + w` or w must show
    rest = names - set(tiny_model.parameter_shapes(text))
    assert rest
    assert all(name.startswith("model.visual.") for name in rest)


def test_the_checkpoint_knows_its_tasks(decoder):
    result = score(decoder, 0.02)
    assert min(result["kinds"].values()) == 1.0, result["failures"]
    assert result["mtp_acceptance"] > 0.9


def test_batches_are_reproducible_and_hold_no_held_out_sum():
    maker = BatchMaker(3, Shape(24, 4))
    first, again, other = maker.batch(5), BatchMaker(3, Shape(24, 4)).batch(5), maker.batch(6)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert (first[0] != other[0]).any()
    for row in first[0]:
        for line in maker.encoder.tokenizer.decode(row.tolist()).split("\n"):
            sides = line.replace(" ", "").split("=")[0].split("+")
            if len(sides) == 2 and all(side.isdigit() for side in sides):
                a, b = sorted(map(int, sides))
                assert not tiny_tasks.is_held_out(f"{a}+{b}")


def test_a_step_lowers_the_loss_and_the_folder_survives_a_round_trip(tmp_path, text):
    argv = ["--out", str(tmp_path), "--steps", "4", "--device", "cpu", "--short-rows", "8", "--long-rows", "1"]
    trainer = train_tiny.Trainer(train_tiny.parse(argv))
    batch = BatchMaker(0, Shape(8, 1)).batch(0)
    losses = []
    for int4 in (False, False, True):
        trainer.step(batch, 1e-3, int4)
        losses.append(trainer.losses[0].item())
    assert losses[2] < losses[0]
    save_folder(tmp_path, trainer.params, seed=0)
    saved = load_parameters(tmp_path, text)
    for name, value in trainer.params.items():
        assert torch.equal(saved[name], value.detach().to(tiny_model.saved_dtype(name)).float())


@pytest.mark.parametrize("rounding", [tiny_model.fake_int4, tiny_model.fake_fp8])
def test_rounding_error_is_that_of_the_format(rounding):
    torch.manual_seed(0)
    weight = torch.randn(16, 64)
    error = (rounding(weight) - weight).norm() / weight.norm()
    assert 0.01 < error < 0.12
    assert torch.equal(rounding(rounding(weight)), rounding(weight)) or rounding is tiny_model.fake_int4
