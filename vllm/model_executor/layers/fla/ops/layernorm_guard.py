"""Gated RMS norm of the delta rule's output: ``x * rsqrt(mean(x**2) + eps) * w * act(z)``, float32 from load to store.

The weight is plain (ones when initialised), unlike the model's other norms, which multiply by 1 + w.
"""

import torch
import triton
import triton.language as tl

from .l2norm import plan_rows

GATES = ("silu", "swish", "sigmoid")


def _check(x: torch.Tensor, weight: torch.Tensor, z: torch.Tensor | None, activation: str) -> None:
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must be [{x.shape[-1]}], got {tuple(weight.shape)}")
    if z is not None and z.shape != x.shape:
        raise ValueError(f"the gate must have the shape of x {tuple(x.shape)}, got {tuple(z.shape)}")
    if activation not in GATES:
        raise ValueError(f"activation must be one of {GATES}, got {activation!r}")


@triton.jit
def gate_value(z, SIGMOID: tl.constexpr):
    """act(z) of a float32 z."""
    gate = tl.sigmoid(z)
    return gate if SIGMOID else z * gate


@triton.jit(do_not_specialize=["rows"])
def _rmsnorm_gated_kernel(
    x,
    weight,
    z,
    y,
    rows,
    stride_x,
    stride_z,
    eps,
    H: tl.constexpr,
    D: tl.constexpr,
    HAS_GATE: tl.constexpr,
    SIGMOID: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    d = tl.arange(0, BD)
    inside = (r[:, None] < rows) & (d[None, :] < D)
    # rows are (token, head) pairs: heads lie side by side, tokens may be strided
    column = (r % H)[:, None] * D + d[None, :]
    # [BR, BD]
    value = tl.load(x + (r // H)[:, None] * stride_x + column, mask=inside, other=0.0).to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value, axis=1) / D + eps)[:, None]
    value *= tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    if HAS_GATE:
        value *= gate_value(
            tl.load(z + (r // H)[:, None] * stride_z + column, mask=inside, other=0.0).to(tl.float32), SIGMOID
        )
    tl.store(y + r[:, None] * D + d[None, :], value.to(y.dtype.element_ty), mask=inside)


def _token_heads(x: torch.Tensor) -> torch.Tensor:
    """``[..., D]`` as ``[tokens, heads, D]`` with heads side by side, without a copy where the strides allow it."""
    x = x[:, None] if x.dim() == 2 else x.reshape(-1, *x.shape[-2:]) if x.dim() > 2 else x[None, None]
    ok = x.stride(-1) == 1 and (x.shape[1] == 1 or x.stride(1) == x.shape[2])
    return x if ok else x.contiguous()


def rmsnorm_gated_triton(
    x: torch.Tensor, weight: torch.Tensor, z: torch.Tensor | None = None, eps: float = 1e-6, activation: str = "silu"
) -> torch.Tensor:
    """Triton form of :func:`rmsnorm_gated`."""
    _check(x, weight, z, activation)
    xs = _token_heads(x)
    zs = xs if z is None else _token_heads(z)
    T, H, D = xs.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if T:
        plan = plan_rows(D)
        _rmsnorm_gated_kernel[(triton.cdiv(T * H, plan["BR"]),)](
            xs,
            weight,
            zs,
            y,
            T * H,
            xs.stride(0),
            zs.stride(0),
            eps,
            H,
            D,
            z is not None,
            activation == "sigmoid",
            **plan,
        )
    return y


def rmsnorm_gated_torch(
    x: torch.Tensor, weight: torch.Tensor, z: torch.Tensor | None = None, eps: float = 1e-6, activation: str = "silu"
) -> torch.Tensor:
    """PyTorch form of :func:`rmsnorm_gated`."""
    _check(x, weight, z, activation)
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight.float()
    if z is not None:
        gate = z.float().sigmoid()
        y = y * (gate if activation == "sigmoid" else z.float() * gate)
    return y.to(x.dtype)


def rmsnorm_gated(
    x: torch.Tensor, weight: torch.Tensor, z: torch.Tensor | None = None, eps: float = 1e-6, activation: str = "silu"
) -> torch.Tensor:
    """RMS norm over the last axis, times the gate.

    Args:
        x: ``[..., D]``. weight: ``[D]``. z: the gate's input, of x's shape, or None for no gate.
        activation: "silu" (also named "swish") or "sigmoid", applied to z.

    Returns:
        A new contiguous tensor of x's shape and dtype.
    """
    form = rmsnorm_gated_triton if x.is_cuda else rmsnorm_gated_torch
    return form(x, weight, z, eps, activation)


def rmsnorm_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    activation: str = "silu",
) -> torch.Tensor:
    """:func:`rmsnorm_gated` under the argument list that callers of the original know.

    Raises:
        ValueError: a bias, groups smaller than a row, or gating before the norm, none of which these models have.
    """
    if bias is not None or group_size not in (None, x.shape[-1]) or not norm_before_gate:
        raise ValueError(
            "only a norm of whole rows, without bias and before its gate, is supported; got "
            f"bias={'given' if bias is not None else None}, group_size={group_size}, norm_before_gate={norm_before_gate}"
        )
    return rmsnorm_gated(x, weight, z, eps, activation)
