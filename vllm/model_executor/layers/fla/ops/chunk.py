"""The gated delta rule in chunks of 64 tokens: prefill.

Mathematics: :func:`~.naive.naive_chunk_gated_delta_rule`. Three launches: everything a chunk knows without the state (U, W), in parallel;
the pass of the state from chunk to chunk; the outputs, in parallel again. Products take the inputs' dtype and accumulate in float32.
"""

from itertools import pairwise

import torch
import triton

from vllm.model_executor.layers.mamba.ops.slots import (
    HostLengths,
    gather_slots,
    host_cu_seqlens,
    scatter_slots,
    to_device,
)

from .chunk_kernels import chunk_output_kernel, chunk_prepare_kernel, chunk_state_kernel
from .device import multiprocessors
from .fused_recurrent import check_state, token_rows
from .index import CHUNK_SIZE, cdiv, prepare_chunk_indices, prepare_chunk_offsets
from .naive import L2NORM_EPS, check_delta_rule, naive_chunk_gated_delta_rule


def plan_chunk(K: int, V: int, heads: int, exact: bool, multiprocessors: int) -> dict[str, dict[str, int]]:
    """Tiles of the three launches.

    Args:
        heads: value heads times sequences, which the state pass runs in parallel.
        exact: float32 inputs, whose tiles take twice the shared memory.
    """
    BK, BV, warps = triton.next_power_of_2(K), triton.next_power_of_2(V), 8 if exact else 4
    whole = {"BV": min(BV, 32 if exact else 128), "num_warps": warps, "num_stages": 2}
    # Fewer value channels a program repeat more of W and K, but a pass over few sequences needs the programs, and a third stage of
    # loads to hide behind where few of them share a multiprocessor.
    if exact:
        state = {"BV": min(BV, 32), "num_warps": warps, "num_stages": 1}
    elif heads * cdiv(V, 64) < 2 * multiprocessors:
        state = {"BV": min(BV, 32), "num_warps": warps, "num_stages": 3}
    else:
        state = {"BV": min(BV, 64), "num_warps": warps, "num_stages": 2}
    tiles = {"prepare": whole, "state": state, "output": whole}
    return {name: {"BT": CHUNK_SIZE, "BK": BK, **tile} for name, tile in tiles.items()}


def chunk_gated_delta_rule_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = True,
    cu_seqlens: torch.Tensor | None = None,
    chunk_indices: torch.Tensor | None = None,
    chunk_offsets: torch.Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens_cpu: HostLengths | None = None,
    ssm_state_indices: torch.Tensor | None = None,
    has_initial_state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Triton form of :func:`chunk_gated_delta_rule`: three launches, of which only the middle one walks along the sequence."""
    B, T, Hk, Hv, K, V = check_delta_rule(q, k, v, g, beta)
    device, dtype, slots = q.device, v.dtype, ssm_state_indices
    if q.dtype != dtype or k.dtype != dtype:
        raise ValueError(f"q, k and v must share a dtype, got {q.dtype}, {k.dtype} and {dtype}")
    starts_known = cu_seqlens is None or cu_seqlens_cpu is not None or chunk_indices is None or chunk_offsets is None
    used = B * T
    if starts_known:
        host = host_cu_seqlens(B, T, cu_seqlens, cu_seqlens_cpu)
        used = host[-1]
        if cu_seqlens is None:
            cu_seqlens = to_device(host, torch.int32, device)
        if chunk_indices is None or chunk_offsets is None:
            chunk_indices = prepare_chunk_indices(host, CHUNK_SIZE, device)
            chunk_offsets = prepare_chunk_offsets(host, CHUNK_SIZE, device)
    N, NT = cu_seqlens.numel() - 1, chunk_indices.shape[0]
    if initial_state is not None:
        check_state(initial_state, Hv, K, V)
        if initial_state.stride()[1:] != (V * K, K, 1):
            raise ValueError(f"each state must be contiguous, got strides {initial_state.stride()}")
        if slots is None and initial_state.shape[0] != N:
            raise ValueError(f"{N} sequences need as many initial states, got {tuple(initial_state.shape)}")
        if slots is not None and slots.shape != (N,):
            raise ValueError(f"{N} sequences need as many slot indices, got {tuple(slots.shape)}")
    elif slots is not None:
        raise ValueError("ssm_state_indices needs initial_state, the pool they point into")
    if slots is not None:
        slots, final = slots.contiguous(), initial_state
    else:
        kept = torch.float32 if initial_state is None else initial_state.dtype
        final = torch.empty(N, Hv, V, K, dtype=kept, device=device) if output_final_state else None
    o = torch.empty(B, T, Hv, V, dtype=dtype, device=device)
    if not starts_known:
        o.zero_()
    elif used < B * T:
        o[:, used:].zero_()
    if N == 0:
        return o, final
    q, k, v = (token_rows(x) for x in (q, k, v))
    g, beta = (x.reshape(-1, Hv).contiguous() for x in (g, beta))
    make = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device=device)
    G, rstd = make(B * T, Hv), make(B * T, Hk)
    w, h = make(B * T, Hv, K, dtype=dtype), make(NT, Hv, V, K, dtype=dtype)
    u = o.view(B * T, Hv, V)  # in the end each of its tiles becomes the one of o
    flags = None if has_initial_state is None else has_initial_state.bool().view(torch.uint8)
    plan = plan_chunk(K, V, N * Hv, dtype == torch.float32, multiprocessors(device))
    shared = {
        "Hk": Hk,
        "Hv": Hv,
        "K": K,
        "V": V,
        "HAS_SLOTS": slots is not None,
        "L2NORM": use_qk_l2norm_in_kernel,
    }
    if NT:
        chunk_prepare_kernel[(NT * Hv,)](
            k,
            v,
            g,
            beta,
            rstd,
            G,
            u,
            w,
            cu_seqlens,
            chunk_indices,
            slots,
            L2NORM_EPS,
            k.stride(0),
            v.stride(0),
            **shared,
            **plan["prepare"],
        )
    chunk_state_kernel[(N * Hv, cdiv(V, plan["state"]["BV"]))](
        k,
        u,
        w,
        G,
        rstd,
        h,
        initial_state,
        final,
        cu_seqlens,
        chunk_offsets,
        slots,
        flags,
        k.stride(0),
        0 if initial_state is None else initial_state.stride(0),
        0 if final is None else final.stride(0),
        HAS_INITIAL=initial_state is not None,
        HAS_FLAGS=flags is not None,
        STORE_FINAL=final is not None,
        **shared,
        **plan["state"],
    )
    if NT:
        chunk_output_kernel[(NT * Hv, cdiv(V, plan["output"]["BV"]))](
            q,
            k,
            u,
            G,
            rstd,
            h,
            o,
            cu_seqlens,
            chunk_indices,
            slots,
            K**-0.5 if scale is None else scale,
            L2NORM_EPS,
            q.stride(0),
            k.stride(0),
            **shared,
            **plan["output"],
        )
    return o, final


def chunk_gated_delta_rule_torch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = True,
    cu_seqlens: torch.Tensor | None = None,
    chunk_indices: torch.Tensor | None = None,
    chunk_offsets: torch.Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens_cpu: HostLengths | None = None,
    ssm_state_indices: torch.Tensor | None = None,
    has_initial_state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """PyTorch form of :func:`chunk_gated_delta_rule`; makes its own chunk lists."""
    B, T = check_delta_rule(q, k, v, g, beta)[:2]
    starts = host_cu_seqlens(B, T, cu_seqlens, cu_seqlens_cpu)
    state = initial_state
    if ssm_state_indices is not None:
        state = gather_slots(initial_state, ssm_state_indices)
    if state is not None and has_initial_state is not None:
        state = torch.where(has_initial_state.bool()[:, None, None, None], state, 0)
    host = None if cu_seqlens is None and cu_seqlens_cpu is None else starts
    o, final = naive_chunk_gated_delta_rule(
        q, k, v, g, beta, scale, state, True, cu_seqlens, use_qk_l2norm_in_kernel, host, CHUNK_SIZE
    )
    if ssm_state_indices is None:
        return o, final if output_final_state else None
    lengths = torch.tensor([b - a for a, b in pairwise(starts)], device=q.device)
    row_of = torch.repeat_interleave(ssm_state_indices >= 0, lengths, output_size=starts[-1])
    o.view(B * T, *o.shape[2:])[: starts[-1]].masked_fill_(~row_of[:, None, None], 0)
    scatter_slots(initial_state, torch.where(lengths > 0, ssm_state_indices, -1), final)
    return o, initial_state


def chunk_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = True,
    cu_seqlens: torch.Tensor | None = None,
    chunk_indices: torch.Tensor | None = None,
    chunk_offsets: torch.Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens_cpu: HostLengths | None = None,
    ssm_state_indices: torch.Tensor | None = None,
    has_initial_state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The delta rule over whole sequences, from initial to final states.

    Args:
        q, k: ``[B, T, Hk, K]``. v: ``[B, T, Hv, V]``. g (log decay) and beta: ``[B, T, Hv]``, float32.
        scale: factor on q, by default ``K ** -0.5``.
        initial_state: ``[N, Hv, V, K]``, one state a sequence, zeros by default. With ``ssm_state_indices`` it is the pool.
        output_final_state: whether the final states are wanted.
        cu_seqlens: ``[N + 1]`` starts of N sequences when B is 1; else every batch row is one.
        chunk_indices, chunk_offsets: from ``prepare_chunk_indices`` and ``prepare_chunk_offsets``; made here when missing.
        cu_seqlens_cpu: host twin of ``cu_seqlens``. Without it, and without chunk_indices, the starts are read back from the device.
        ssm_state_indices: ``[N]`` slots of the pool ``initial_state [slots, Hv, V, K]``, which is then updated in place. Negative:
            the sequence is padding, its outputs are zeros.
        has_initial_state: ``[N]`` bool; where False, the sequence starts from zeros whatever its slot holds.

    Returns:
        ``(o [B, T, Hv, V], final states [N, Hv, V, K])``: the states in initial_state's dtype (float32 without one), None if not wanted,
        or the pool if slots are given. Tokens past the last sequence come out as zeros.
    """
    form = chunk_gated_delta_rule_triton if q.is_cuda else chunk_gated_delta_rule_torch
    return form(
        q,
        k,
        v,
        g,
        beta,
        scale,
        initial_state,
        output_final_state,
        cu_seqlens,
        chunk_indices,
        chunk_offsets,
        use_qk_l2norm_in_kernel,
        cu_seqlens_cpu,
        ssm_state_indices,
        has_initial_state,
    )
