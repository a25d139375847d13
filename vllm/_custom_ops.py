"""The one door to csrc/: loads vllm_c.so, the library that setup.py builds, and gives each of its ops a Python name.

Every op has another form elsewhere (Triton or plain PyTorch), so a missing library is no error. A layer asks `available(device)`
once, when it is built, and keeps the answer; the functions below assume it was yes.
"""

import functools
from pathlib import Path

import torch

from vllm.logger import init_logger

logger = init_logger(__name__)

_LIBRARY = Path(__file__).with_name("vllm_c.so")
_REBUILD = (
    "run `pip install --no-build-isolation -e .` in the source folder, with nvcc and a CUDA build of torch installed"
)


@functools.cache
def _load(library: Path) -> str | None:
    """Loads the library, once. Returns why that failed, or None."""
    if not library.is_file():
        return f"{library.name} was not built"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"{library.name} does not fit this torch ({torch.__version__}): {error}"
    # For torch.compile: the ops write into their arguments and return nothing.
    torch.library.register_fake("vllm_c::rms_norm", lambda out, x, weight, eps, plus_one: None)
    torch.library.register_fake("vllm_c::fused_add_rms_norm", lambda x, residual, weight, eps, plus_one: None)
    torch.library.register_fake("vllm_c::gdn_decode", lambda *args, **kwargs: None)
    written = ("skinny_gemm", "skinny_gemm_norm", "skinny_gemm_add", "quantised_gemm")
    for name in (*written, "experts_w4_gate_up", "experts_w4_down"):
        torch.library.register_fake(f"vllm_c::{name}", lambda *args: None)
    return None


def available(device: torch.device | str = "cuda") -> bool:
    """Whether the ops below can be used on this device. Says once, where a CUDA device has to do without them, what that costs."""
    if torch.device(device).type != "cuda":
        return False
    reason = _load(_LIBRARY)
    if reason is not None:
        logger.info_once(
            "CUDA kernels of csrc/ are not in use: %s. Residual add, RMSNorm, GDN decoding and small GEMMs run as other, slower kernels; "
            "to build them, %s.",
            reason,
            _REBUILD,
        )
    return reason is None


def rms_norm(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float, plus_one: bool = False) -> None:
    """out = x / rms(x) * weight over the last dimension, or * (1 + weight) with plus_one; fp32 inside.

    out is contiguous and may be x itself; x may be a view of up to three dimensions (q heads inside qkv).
    """
    torch.ops.vllm_c.rms_norm(out, x, weight, eps, plus_one)


def fused_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, plus_one: bool = False
) -> None:
    """In place: residual += x, rounded to its dtype; then x = rms_norm(residual)."""
    torch.ops.vllm_c.fused_add_rms_norm(x, residual, weight, eps, plus_one)


def gdn_decode(
    out: torch.Tensor,
    mixed_qkv: torch.Tensor,
    z: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    conv_state: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor | None,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    ssm_state: torch.Tensor,
    state_indices: torch.Tensor,
    scale: float,
    silu: bool,
    sigmoid_gate: bool,
    l2norm: bool,
    rows_a_block: int,
    early: bool,
) -> None:
    """One GDN decode step between its projections; arguments as in fla/ops/fused_decode.py, sm_90 and newer.

    rows_a_block (32 or 64): how heads are cut. early: fetch the states towards the chip before the kernel before has ended.
    """
    torch.ops.vllm_c.gdn_decode(
        out,
        mixed_qkv,
        z,
        a,
        b,
        conv_state,
        conv_weight,
        conv_bias,
        A_log,
        dt_bias,
        norm_weight,
        eps,
        ssm_state,
        state_indices,
        scale,
        silu,
        sigmoid_gate,
        l2norm,
        rows_a_block,
        early,
    )


WEIGHT_FORMATS = ("plain", "int4", "int8", "fp8", "fp4")


def skinny_gemm(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    kind: str,
    group: int,
    scale_rows: int,
    ring: int,
    late: int,
) -> None:
    """out [M, N] = x [M, K] @ Wᵀ for up to 32 rows of 16-bit x; W's parts as in `KernelWeight`; sm_90 and newer.

    ring: bytes of shared memory a block may take. late: how many stages of it a block has still to ask for when the next kernel may
    start.
    """
    form = WEIGHT_FORMATS.index(kind)
    torch.ops.vllm_c.skinny_gemm(out, x, weight, scale, zero, row_scale, form, group, scale_rows, ring, late)


def skinny_gemm_norm(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    plus_one: bool,
    ring: int,
    late: int,
) -> None:
    """out = rms_norm(x) @ weightᵀ, all in bfloat16: x is rounded once it is normalised. Sizes, ring and late as in `skinny_gemm`."""
    torch.ops.vllm_c.skinny_gemm_norm(out, x, weight, norm, eps, plus_one, ring, late)


def skinny_gemm_add(total: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, ring: int, late: int) -> None:
    """total += x @ weightᵀ, all in bfloat16: the product is rounded before it is added. Sizes, ring and late as in `skinny_gemm`."""
    torch.ops.vllm_c.skinny_gemm_add(total, x, weight, ring, late)


def quantised_gemm(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    kind: str,
    group: int,
    scale_rows: int,
    ring: int,
    late: int,
) -> None:
    """out [M, N] = x [M, K] @ Wᵀ for up to 32 rows of bfloat16 x and quantised weights; the rest as in `skinny_gemm`."""
    bits = 4 if kind in ("int4", "fp4") else 8
    torch.ops.vllm_c.quantised_gemm(out, x, weight, scale, zero, row_scale, bits, group, scale_rows, ring, late)


def experts_w4_gate_up(
    h: torch.Tensor,
    x: torch.Tensor,
    words: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    logits: torch.Tensor,
    top_k: int,
    stages: int,
) -> None:
    """h = silu(gate x) * up x of each token's top_k best experts, for up to 64 tokens; int4 or fp4 weights, sm_90 and newer.

    x [T, D] in bfloat16; words [E, 2I, ...], scale, zero and row_scale of W [E, 2I, D] as in `KernelWeight`; logits float32 [T, E + 1], of which the last is not
    an expert's. h [8 * lists, I] has 8 rows for each list of tokens that there may be (`ops/w4.py`), in an order that
    `experts_w4_down` knows. stages (3 or 4): chunks of weights a warp has room for.
    """
    torch.ops.vllm_c.experts_w4_gate_up(h, x, words, scale, zero, row_scale, logits, top_k, stages)


def experts_w4_down(
    y: torch.Tensor,
    h: torch.Tensor,
    words: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    shared_x: torch.Tensor | None,
    shared_w: torch.Tensor | None,
    shared_scale: torch.Tensor | None,
    shared_row_scale: torch.Tensor | None,
    logits: torch.Tensor,
    top_k: int,
    add: bool,
    warps: int,
    stages: int,
) -> None:
    """y [T, D] = the sum of each token's choices down h by softmax over their logits, and sigmoid(last logit) * shared_w shared_x.

    words, scale, zero and row_scale of W [E, D, I]; shared_x [T, S] in bfloat16, and shared_w [D, S] too or, with its scales and factors
    of rows, fp4 beside fp4. add: the sum, rounded, to what is in y. warps (8 or 16) of a
    block; stages as above.
    """
    of_shared = shared_x, shared_w, shared_scale, shared_row_scale
    torch.ops.vllm_c.experts_w4_down(y, h, words, scale, zero, row_scale, *of_shared, logits, top_k, add, warps, stages)
