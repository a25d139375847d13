"""Rounds matrices to the formats of published quantised checkpoints. Nothing here uses the server's own code: the compressed-tensors
formats are written by that package's compressors, the others by hand from their definitions.

A format turns a weight [N, K] into the tensors that stand for it, by their names after the module's, and gives the dense weight that
these mean. Scales are the plainest that there are: from the largest number of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

E4M3_MAX = 448.0
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Format:
    """One way to store a matrix.

    Attributes:
        quantise: weight [N, K] -> (tensors by suffix, dense [N, K]).
        config: modules left plain -> quantization_config.
        inputs, outputs: K and N have to be multiples of these.
    """

    quantise: Callable[[Tensor], tuple[Tensors, Tensor]]
    config: Callable[[list[str]], dict[str, Any]]
    inputs: int = 1
    outputs: int = 1


def packed(bits: int, group: int, symmetric: bool) -> Format:
    """compressed-tensors' pack-quantized. `group` -1 is a scale a row."""
    args = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "channel" if group == -1 else "group"}
    args["group_size"] = None if group == -1 else group

    def quantise(weight: Tensor) -> tuple[Tensors, Tensor]:
        groups = weight.float().unflatten(-1, (-1, weight.shape[-1] if group == -1 else group))
        half = 2 ** (bits - 1)
        if symmetric:
            scale = (groups.abs().amax(-1).clamp_min(1e-8) / (half - 1)).to(torch.bfloat16)
            return _compress("pack-quantized", args, {"weight": weight, "weight_scale": scale})
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scale = ((high - low).clamp_min(1e-8) / (2 * half - 1)).to(torch.bfloat16)
        zero_point = (-half - low / scale).round().clamp(-half, half - 1).to(torch.int8)
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero_point}
        return _compress("pack-quantized", args, state)

    inputs = 32 // bits if group == -1 else group
    outputs = 1 if symmetric else 32 // bits
    return Format(quantise, _compressed_tensors("pack-quantized", args, None), inputs, outputs)


def float8(block: int | None) -> Format:
    """compressed-tensors' float-quantized: a scale a row, or a square of `block`."""
    args: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True}
    inputs = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True}
    if block is None:
        args["strategy"], inputs["strategy"] = "channel", "token"
    else:
        args |= {"strategy": "block", "block_structure": [block, block]}
        inputs |= {"strategy": "group", "group_size": block}

    def quantise(weight: Tensor) -> tuple[Tensors, Tensor]:
        largest = weight.float().abs().amax(-1, keepdim=True) if block is None else block_amax(weight, block)
        scale = (largest.clamp_min(1e-8) / E4M3_MAX).to(torch.bfloat16)
        return _compress("float-quantized", args, {"weight": weight, "weight_scale": scale})

    return Format(quantise, _compressed_tensors("float-quantized", args, inputs))


def nvfp4() -> Format:
    """compressed-tensors' nvfp4-pack-quantized, with the scale of inputs that such checkpoints carry."""
    args = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}

    def quantise(weight: Tensor) -> tuple[Tensors, Tensor]:
        weight = weight.float()
        overall = (E4M3_MAX * 6 / weight.abs().max().clamp_min(1e-8)).reshape(1)
        largest = weight.unflatten(-1, (-1, 16)).abs().amax(-1)
        scale = (largest / 6 * overall).clamp(2**-9, E4M3_MAX).to(torch.float8_e4m3fn)
        state = {"weight": weight, "weight_scale": scale.float(), "weight_global_scale": overall}
        tensors, dense = _compress("nvfp4-pack-quantized", args, state)
        return tensors | {"input_global_scale": torch.tensor([100.0])}, dense

    return Format(quantise, _compressed_tensors("nvfp4-pack-quantized", args, {**args, "dynamic": "local"}), 16)


def official_fp8(block: int = 128) -> Format:
    """The layout of the models' publisher: `weight_scale_inv`, which is multiplied with, a square of 128."""

    def quantise(weight: Tensor) -> tuple[Tensors, Tensor]:
        scale = (block_amax(weight, block).clamp_min(1e-8) / E4M3_MAX).to(torch.bfloat16)
        N, K = weight.shape
        every = scale.float().repeat_interleave(block, 0)[:N].repeat_interleave(block, 1)[:, :K]
        q = (weight.float() / every).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        return {"weight": q, "weight_scale_inv": scale}, q.float() * every

    def config(plain: list[str]) -> dict[str, Any]:
        what = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
        return {**what, "weight_block_size": [block, block], "modules_to_not_convert": plain}

    return Format(quantise, config)


def awq(group: int) -> Format:
    """AutoAWQ's gemm version: inputs first, eight outputs a word in an order of their own, zero points."""

    def pack(q: Tensor) -> Tensor:  # [R, N] -> int32 [R, N/8]
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        columns = q.long().unflatten(-1, (-1, 8))[..., order]
        words = (columns << (4 * torch.arange(8))).sum(-1)
        return torch.where(words >= 2**31, words - 2**32, words).int()

    def quantise(weight: Tensor) -> tuple[Tensors, Tensor]:
        groups = weight.float().unflatten(-1, (-1, group))  # [N, K/g, g]
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scale = ((high - low).clamp_min(1e-6) / 15).half()
        zero = (-low / scale.float()).round().clamp(0, 15)
        q = (groups / scale.float()[..., None] + zero[..., None]).round().clamp(0, 15)
        dense = ((q - zero[..., None]).half() * scale[..., None]).flatten(-2)
        tensors = {"qweight": pack(q.flatten(-2).T), "qzeros": pack(zero.T), "scales": scale.T.contiguous()}
        return tensors, dense

    def config(plain: list[str]) -> dict[str, Any]:
        what = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
        return {**what, "modules_to_not_convert": plain}

    return Format(quantise, config, group, 8)


def block_amax(weight: Tensor, block: int) -> Tensor:
    """Largest size in every square of `block`: [N, K] -> [ceil(N / block), ceil(K / block)]."""
    N, K = weight.shape
    padded = torch.nn.functional.pad(weight.float().abs(), (0, -K % block, 0, -N % block))
    return padded.unflatten(1, (-1, block)).unflatten(0, (-1, block)).amax((1, 3))


def _compress(form: str, args: dict[str, Any], state: Tensors) -> tuple[Tensors, Tensor]:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
    compressor = BaseCompressor.get_value_from_registry(form)
    compressed = compressor.compress(state, scheme)
    dense = compressor.decompress(compressed, scheme)["weight"]
    return {name: t.contiguous() for name, t in compressed.items()}, dense.contiguous()


def _compressed_tensors(
    form: str, weights: dict[str, Any], inputs: dict[str, Any] | None
) -> Callable[[list[str]], dict[str, Any]]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}

    def config(plain: list[str]) -> dict[str, Any]:
        what = {"quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed"}
        return {**what, "kv_cache_scheme": None, "ignore": plain, "config_groups": {"group_0": deepcopy(group)}}

    return config


FORMATS: dict[str, Format] = {
    "w4a16": packed(4, 32, True),
    "w4a16-zero-points": packed(4, 32, False),
    "w4a16-g128": packed(4, 128, True),
    "w4a16-channel": packed(4, -1, True),
    "w8a16": packed(8, 32, True),
    "w8a16-channel": packed(8, -1, False),
    "fp8": float8(None),
    "fp8-block": float8(128),
    "fp8-official": official_fp8(),
    "nvfp4": nvfp4(),
    "awq": awq(32),
}
