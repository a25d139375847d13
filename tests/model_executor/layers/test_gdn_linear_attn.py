"""One Gated DeltaNet layer against its definition, token by token in float64, in every variant."""

import pytest
import torch

from tests.model_executor.layers.gdn_layer import D, build, definition, run, sequence, step_of
from vllm.forward_context import PAD_SLOT_ID
from vllm.model_executor.layers.mamba.gdn_linear_attn import DECODE, IN_PROJ, PREFILL


@pytest.mark.parametrize("in_proj", IN_PROJ)
@pytest.mark.parametrize("gate", ["silu", "sigmoid"])
def test_prompt_is_the_definition(in_proj, gate):
    layer, x = build(in_proj, output_gate_type=gate), sequence(70)
    y = run(layer, x, prefills=[(3, 70, False)])
    want, window, state = definition(layer, x)
    torch.testing.assert_close(y.double(), want, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(layer.conv_state[3].double(), window, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(layer.ssm_state[3].double(), state, atol=1e-5, rtol=1e-4)
    for slot in (0, 1, 2, 4, 5):
        assert (layer.conv_state[slot] == 5).all() and (layer.ssm_state[slot] == -2).all()


@pytest.mark.parametrize("gate", ["silu", "sigmoid"])
@pytest.mark.parametrize("decode", DECODE)
@pytest.mark.parametrize("cuts", [(1,), (2, 3), (30, 64), tuple(range(1, 40))])
def test_cut_anywhere(cuts, decode, gate):
    layer, x = build(gdn={"gdn_decode": decode}, output_gate_type=gate), sequence(70)
    want, _, state = definition(layer, x)
    bounds, parts = [0, *cuts, 70], []
    for a, b in zip(bounds, bounds[1:]):
        work = {"decodes": [2]} if a and b - a == 1 else {"prefills": [(2, b - a, a > 0)]}
        parts.append(run(layer, x[a:b], **work))
    torch.testing.assert_close(torch.cat(parts).double(), want, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(layer.ssm_state[2].double(), state, atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted")
def test_interpreted_prefill_is_the_definition():
    """The Triton kernels of prompt chunks, run by Triton's interpreter on the CPU."""
    layer = build(gdn={"gdn_prefill_backend": "triton"})
    a, b = sequence(5, 1), sequence(67, 2)
    run(layer, torch.cat([a[:2], b[:65]]), prefills=[(4, 2, False), (1, 65, False)])
    y = run(layer, torch.cat([a[2:], b[65:]]), prefills=[(4, 3, True), (1, 2, True)])
    for rows, seq, slot in ((slice(0, 3), a, 4), (slice(3, 5), b, 1)):
        want, window, state = definition(layer, seq)
        torch.testing.assert_close(y[rows].double(), want[-(rows.stop - rows.start) :], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(layer.ssm_state[slot].double(), state, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(layer.conv_state[slot].double(), window, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("decode", DECODE)
@pytest.mark.parametrize("in_proj", IN_PROJ)
def test_mixed_rows_are_their_own(in_proj, decode):
    """Two decode, one padding row, two prompts (one goes on), two tokens of nobody: each as if it were alone."""
    layer = build(in_proj, gdn={"gdn_decode": decode})
    a, b, c, d = sequence(9, 1), sequence(5, 2), sequence(40, 3), sequence(66, 4)
    run(layer, torch.cat([a[:8], b[:4], c[:30]]), prefills=[(5, 8, False), (1, 4, False), (4, 30, False)])
    garbage = torch.full((1, D), float("nan"))
    x = torch.cat([a[8:], garbage, b[4:], c[30:], d, sequence(2, 9)])
    y = run(layer, x, decodes=[5, PAD_SLOT_ID, 1], prefills=[(4, 10, True), (2, 66, False)])
    for rows, seq, n in ((slice(0, 1), a, 1), (slice(2, 3), b, 1), (slice(3, 13), c, 10), (slice(13, 79), d, 66)):
        torch.testing.assert_close(y[rows].double(), definition(layer, seq)[0][-n:], atol=2e-5, rtol=1e-4)
    assert y[79:].isfinite().all()
    assert (layer.conv_state[[0, 3]] == 5).all() and (layer.ssm_state[[0, 3]] == -2).all()


@pytest.mark.gpu
@pytest.mark.parametrize("prefill", PREFILL)
@pytest.mark.parametrize("decode", DECODE)
@pytest.mark.parametrize("in_proj", IN_PROJ)
@pytest.mark.parametrize("ssm_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gpu(in_proj, decode, prefill, ssm_dtype):
    """bfloat16 activations; the float64 definition runs on the same rounded weights."""
    gdn = {"gdn_decode": decode, "gdn_prefill_backend": prefill}
    layer = build(in_proj, dtype=torch.bfloat16, ssm_dtype=ssm_dtype, device="cuda", gdn=gdn)
    layer.two_streams_outside_graphs = True
    x = sequence(90).bfloat16().cuda()
    want, _, _ = definition(layer, x)
    y = torch.cat(
        [
            run(layer, x[:70], prefills=[(3, 70, False)]),
            run(layer, x[70:80], prefills=[(3, 10, True)]),
            *(run(layer, x[i : i + 1], decodes=[3]) for i in range(80, 90)),
        ]
    )
    error = (y.double().cpu() - want).abs().mean() / want.abs().mean()
    assert error < 0.02


@pytest.mark.gpu
@pytest.mark.parametrize("decode", [*DECODE, "auto"])
@pytest.mark.parametrize("in_proj", IN_PROJ)
def test_gpu_graph(in_proj, decode):
    """A captured decode step, replayed over many tokens with a row of nobody beside it, is the definition; capturing never waits."""
    layer = build(in_proj, device="cuda", gdn={"gdn_decode": decode})
    tokens = torch.stack([sequence(40, 1), sequence(40, 2), sequence(40, 3)], dim=1).cuda()  # [40, 3, D]
    x = torch.zeros(3, D, device="cuda")
    for slot in (2, 5):
        layer.conv_state[slot], layer.ssm_state[slot] = 0, 0
    work = {"decodes": [5, PAD_SLOT_ID, 2]}
    run(layer, x, decodes=[1, 3, 4])  # compiles kernels
    graph, step = torch.cuda.CUDAGraph(), step_of(layer, x, **work)
    with torch.cuda.graph(graph):
        torch.cuda.set_sync_debug_mode("error")
        try:
            y = step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    got = []
    for t in range(40):
        x.copy_(tokens[t])
        graph.replay()
        got.append(y.clone())
    got = torch.stack(got).cpu()
    for row in (0, 2):
        torch.testing.assert_close(got[:, row].double(), definition(layer, tokens[:, row])[0], atol=1e-4, rtol=1e-3)
