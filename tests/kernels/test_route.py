import pytest
import torch

from vllm.model_executor.layers.fused_moe.ops.route import max_blocks, route_torch, route_triton


def check(logits, E, top_k, block):
    got, want = route_triton(logits, E, top_k, block), route_torch(logits, E, top_k, block)
    torch.testing.assert_close(got.shares, want.shares, atol=1e-6, rtol=1e-5)
    assert torch.equal(got.block_expert * (got.block_rows > 0), want.block_expert * (want.block_rows > 0))
    assert torch.equal(got.block_rows, want.block_rows)
    rows = torch.arange(block, device=logits.device)[None, :] < want.block_rows[:, None]
    assert torch.equal(got.order.view(-1, block)[rows], want.order.view(-1, block)[rows])
    # the books balance: every choice once
    assert torch.equal(
        got.order.view(-1, block)[rows].sort().values, torch.arange(logits.shape[0] * top_k).to(rows.device)
    )


@pytest.mark.parametrize("T", [1, 7, 8, 33])
@pytest.mark.parametrize("E,top_k,block", [(8, 2, 16), (6, 3, 4), (16, 1, 16), (4, 4, 2)])
def test_every_choice_has_a_place(device, T, E, top_k, block):
    check(torch.randn(T, E, device=device), E, top_k, block)


def test_rows_wider_than_the_experts(device):
    logits = torch.randn(9, 9, device=device)
    logits[:, 8] = 100  # not an expert
    check(logits, 8, 2, 16)


def test_all_tokens_to_one_expert(device):
    logits = torch.randn(21, 8, device=device).clamp(-2, 2)
    logits[:, 5] = 9
    check(logits, 8, 1, 4)
    check(logits, 8, 2, 4)


def test_ties_go_to_the_lower_expert(device):
    check(torch.randint(0, 3, (12, 8)).to(device, torch.float32), 8, 3, 4)
    check(torch.zeros(5, 8, device=device), 8, 3, 4)


def test_logits_that_are_no_numbers(device):
    """A broken token must not spoil the others' places."""
    logits = torch.randn(9, 8, device=device)
    logits[4] = float("nan")
    logits[5] = float("-inf")
    got = route_triton(logits, 8, 2, 4)
    rows = torch.arange(4, device=device)[None, :] < got.block_rows[:, None]
    assert torch.equal(got.order.view(-1, 4)[rows].sort().values, torch.arange(18).to(device))


@pytest.mark.parametrize("choices,E,block", [(1, 8, 16), (16, 8, 16), (17, 2, 16), (512, 256, 16), (32768, 256, 128)])
def test_no_distribution_needs_more_blocks(choices, E, block):
    most = max_blocks(choices, E, block)
    spread = min(choices, E)
    # as uneven as can be: all but one expert with a single choice, and one choice beyond whole blocks
    worst = spread - 1 + -(-(choices - spread + 1) // block)
    assert worst <= most <= -(-choices // block) + E


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 16, 100, 1500, 8192])
def test_real_sizes(T):
    check(torch.randn(T, 257, device="cuda"), 256, 8, 16)
    check(torch.randn(T, 512, device="cuda").bfloat16().float(), 512, 10, 64)
