"""Norms, activation and rotary embedding against their formulas, one number at a time where that is short enough."""

import math

import pytest
import torch

from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm, RMSNormGated
from vllm.model_executor.layers.rotary_embedding import apply_rotary, get_rope


@pytest.mark.parametrize(("cls", "offset"), [(RMSNorm, 0.0), (GemmaRMSNorm, 1.0)])
def test_rms_norm(cls, offset, seed):
    norm = cls(8, eps=1e-5)
    norm.weight.normal_()
    x = torch.randn(3, 2, 8)
    y = norm(x)
    for row in ((0, 0), (2, 1)):
        root = math.sqrt(sum(v**2 for v in x[row].tolist()) / 8 + 1e-5)
        want = [v / root * (offset + w) for v, w in zip(x[row].tolist(), norm.weight.tolist())]
        torch.testing.assert_close(y[row], torch.tensor(want))
    z = torch.randn(3, 2, 8)
    normed, total = norm(x.clone(), z.clone())
    assert torch.equal(total, x + z) and torch.equal(normed, norm(x + z))


def test_rms_norm_starts_neutral():
    x = torch.randn(4, 16)
    assert torch.equal(RMSNorm(16)(x), GemmaRMSNorm(16)(x))


def test_rms_norm_computes_in_float32(seed):
    norm = GemmaRMSNorm(64, dtype=torch.bfloat16)
    norm.weight.normal_()
    x = torch.randn(5, 64).bfloat16() * 100
    want = GemmaRMSNorm(64)
    want.weight.copy_(norm.weight)
    assert torch.equal(norm(x), want(x.float()).bfloat16())


@pytest.mark.parametrize("activation", ["silu", "swish", "sigmoid"])
def test_rms_norm_gated(activation, seed):
    norm = RMSNormGated(8, eps=1e-6, activation=activation)
    norm.weight.normal_()
    x, z = torch.randn(5, 4, 8), torch.randn(5, 4, 8)
    gate = torch.sigmoid(z) if activation == "sigmoid" else z * torch.sigmoid(z)
    want = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight * gate
    torch.testing.assert_close(norm(x, z), want)


def test_silu_and_mul(seed):
    x = torch.randn(3, 10)
    gate, up = x[:, :5], x[:, 5:]
    torch.testing.assert_close(SiluAndMul()(x), gate / (1 + (-gate).exp()) * up)


def test_rope_number_by_number(seed):
    rope = get_rope(16, 8, base=1000.0)
    x, positions = torch.randn(3, 2, 16), torch.tensor([0, 5, 77])
    y = apply_rotary(x, rope.cos_sin(positions))
    for t, p in enumerate(positions.tolist()):
        for h in range(2):
            for j in range(4):
                angle = p * 1000.0 ** (-2 * j / 8)
                a, b = x[t, h, j].item(), x[t, h, 4 + j].item()
                assert y[t, h, j].item() == pytest.approx(a * math.cos(angle) - b * math.sin(angle), abs=1e-5)
                assert y[t, h, 4 + j].item() == pytest.approx(b * math.cos(angle) + a * math.sin(angle), abs=1e-5)
    assert torch.equal(y[..., 8:], x[..., 8:])
    assert torch.equal(y[0], x[0])


def test_rope_forward_takes_heads_flat_or_apart(seed):
    rope = get_rope(16, 8)
    q, k, positions = torch.randn(3, 4, 16), torch.randn(3, 2, 16), torch.tensor([3, 1, 9])
    apart = rope(positions, q, k)
    flat = rope(positions, q.flatten(1), k.flatten(1))
    for a, b in zip(apart, flat):
        assert torch.equal(a.flatten(1), b)


def test_scores_depend_on_distance_alone(seed):
    rope = get_rope(32, 32)
    q, k = torch.randn(1, 1, 32), torch.randn(1, 1, 32)
    scores = [
        (apply_rotary(q, rope.cos_sin(torch.tensor([p + 7]))) * apply_rotary(k, rope.cos_sin(torch.tensor([p])))).sum()
        for p in (0, 3, 1000)
    ]
    torch.testing.assert_close(scores[0], scores[1])
    torch.testing.assert_close(scores[0], scores[2], atol=1e-3, rtol=1e-3)


def test_interleaved_axes_of_the_published_models(seed):
    """Sections [11, 11, 10] of 32 frequencies: t h w t h w ..., and t for what is left."""
    rope = get_rope(256, 64, base=1e7, mrope_section=(11, 11, 10))
    want = [{1: 1, 2: 2}.get(j % 3, 0) if j < 33 and not (j % 3 == 2 and j >= 30) else 0 for j in range(32)]
    assert rope.axis.tolist() == want
    assert [want.count(a) for a in range(3)] == [11, 11, 10]
    positions = torch.randint(0, 500, (3, 6))
    got = rope.cos_sin(positions)
    for j in range(32):
        one = get_rope(256, 64, base=1e7).cos_sin(positions[want[j]])
        assert torch.equal(got[:, [j, 32 + j]], one[:, [j, 32 + j]])


def test_rope_says_what_is_wrong():
    with pytest.raises(ValueError, match="rotary_dim must be even and at most head_size 16; got 20"):
        get_rope(16, 20)
    with pytest.raises(ValueError, match="must add up to rotary_dim / 2 = 8"):
        get_rope(16, 16, mrope_section=(3, 3, 3))
