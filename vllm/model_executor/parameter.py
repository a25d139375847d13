"""How checkpoint tensors and parameters meet.

A layer says which checkpoint tensors fill its parameters, as a list of slots. The loader walks the module tree, collects the slots
and copies; it knows no layer, and layers know no files. Names are canonical: `model.layers.3.self_attn.q_proj.weight`, whatever
prefix the file uses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, eq=False)
class Slot:
    """Where one checkpoint tensor goes.

    Attributes:
        name: canonical name of the tensor.
        shape: shape it must have in the file (all ranks' shares together).
        param: parameter it fills; None for a tensor that is checked and dropped.
        region: index into the parameter: slices of leading dimensions; () is all of it.
        transform: from the file's tensor to the region's (a shard, another row order, another packing).
        layout: of alternative ways to fill one parameter, which one this slot belongs to: "" is the usual one, tensor by tensor.
        dtypes: safetensors' names of the types it may have; (): any float or any integer, as the parameter is.
        on_device: the transform costs more than the copy, so the tensor moves first.
    """

    name: str
    shape: tuple[int, ...]
    param: nn.Parameter | None
    region: tuple[slice | int, ...] = ()
    transform: Callable[[torch.Tensor], torch.Tensor] | None = None
    layout: str = ""
    dtypes: tuple[str, ...] = ()
    on_device: bool = False


@dataclass(frozen=True, eq=False)
class Source:
    """A run of a linear layer's output rows, as one module of the checkpoint.

    Attributes:
        name: canonical name of that module, without `.weight`.
        rows: its output features, all ranks together.
        put: rows of this rank's parameter that it fills.
        take: which of its rows they are, in the parameter's order: a slice or an index tensor.
    """

    name: str
    rows: int
    put: slice
    take: slice | torch.Tensor

    @property
    def num_put(self) -> int:
        return self.put.stop - self.put.start


def empty_parameter(*shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
    """An uninitialised parameter without gradient, on the default device (the loader builds models on meta)."""
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
