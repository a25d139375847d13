"""Operators of the Gated DeltaNet layer. CUDA tensors run Triton kernels; any other device runs the PyTorch form beside each kernel."""

from vllm.model_executor.layers.mamba.ops.slots import PAD_SLOT_ID

from .chunk import chunk_gated_delta_rule
from .fused_decode import fused_gdn_decode
from .fused_recurrent import fused_recurrent_gated_delta_rule
from .fused_sigmoid_gating import fused_sigmoid_gating_delta_rule_update
from .gating import fused_gdn_gating
from .index import CHUNK_SIZE, padded_chunk_lists, prepare_chunk_indices, prepare_chunk_offsets
from .l2norm import l2norm_fwd
from .layernorm_guard import rmsnorm_fn, rmsnorm_gated
from .naive import naive_chunk_gated_delta_rule, naive_recurrent_gated_delta_rule
from .packed_decode import fused_recurrent_gated_delta_rule_packed_decode

__all__ = [
    "CHUNK_SIZE",
    "PAD_SLOT_ID",
    "chunk_gated_delta_rule",
    "fused_gdn_decode",
    "fused_gdn_gating",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_gated_delta_rule_packed_decode",
    "fused_sigmoid_gating_delta_rule_update",
    "l2norm_fwd",
    "naive_chunk_gated_delta_rule",
    "naive_recurrent_gated_delta_rule",
    "padded_chunk_lists",
    "prepare_chunk_indices",
    "prepare_chunk_offsets",
    "rmsnorm_fn",
    "rmsnorm_gated",
]
