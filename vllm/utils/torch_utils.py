"""What torch is asked for in one place: custom ops, names of layers inside them, the auxiliary stream, tensors that stay.

A custom op is opaque to torch.compile, so a layer's op must find its layer by an argument. A plain string is baked into the compiled
graph as a constant, and every layer gets a graph, and a compilation, of its own. `LayerName` is registered with torch as an opaque
value that is *hoisted*: the graph takes it as an input, so that all layers of a kind share one.
"""

import itertools
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from vllm import envs
from vllm.logger import init_logger
from vllm.utils.cuda_context import new_stream

logger = init_logger(__name__)

try:
    # torch's names for this may still change; without them names are strings
    from torch._library.opaque_object import register_opaque_type
    from torch._opaque_base import OpaqueBase
except ImportError:
    register_opaque_type, OpaqueBase = None, object


class LayerName(OpaqueBase):
    """A layer's name as a custom-op argument. Equal names are equal; nothing else is known of it."""

    def __init__(self, value: str) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LayerName) and self.value == other.value

    def __hash__(self) -> int:
        return hash(("LayerName", self.value))

    def __repr__(self) -> str:
        return f"LayerName({self.value!r})"

    def __fx_repr__(self) -> tuple[str, dict[str, type]]:
        """What torch writes into the code that it generates, and the globals this needs."""
        return repr(self), {"LayerName": LayerName}


def _register() -> bool:
    """Make torch know LayerName. False where names stay strings: asked for, or this torch cannot hoist."""
    if not envs.VLLM_USE_LAYERNAME:
        return False
    try:
        register_opaque_type(LayerName, typ="value", hoist=True)
    except TypeError as error:  # also: None is not callable
        logger.warning_once("torch %s takes no opaque layer names (%s): they are strings", torch.__version__, error)
        return False
    return True


USE_LAYERNAME = _register()
"""Settled when this module is imported, since the ops' schemas depend on it: VLLM_USE_LAYERNAME."""

LayerNameType = LayerName if USE_LAYERNAME else str
"""How a custom op annotates the argument that names its layer."""


def _encode_layer_name(name: str) -> LayerNameType:
    """To be called where the op is called, inside the compiled function: torch hoists what is made there."""
    return LayerName(name) if USE_LAYERNAME else name


def _resolve_layer_name(name: Any) -> str:
    """The string of an op's argument, in either form; also of the stand-in that torch traces with."""
    name = getattr(name, "real_obj", name)
    return name.value if isinstance(name, LayerName) else name


_layers: weakref.WeakValueDictionary[str, torch.nn.Module] = weakref.WeakValueDictionary()
_numbers: defaultdict[str, itertools.count] = defaultdict(lambda: itertools.count(1))


def register_layer(prefix: str, layer: torch.nn.Module) -> str:
    """Make a layer findable by the ops. Returns its name: the prefix, or for later layers of that prefix "prefix#2", "prefix#3"...

    Several models may live in one process, and their layers have the same prefixes. A name is never given twice, so nothing that
    was compiled or captured for a layer can meet another. The registry does not keep layers alive.
    """
    number = next(_numbers[prefix])
    name = prefix if number == 1 else f"{prefix}#{number}"
    _layers[name] = layer
    return name


def find_layer(name: Any) -> torch.nn.Module:
    """The layer of an op's argument. Raises RuntimeError when it is gone."""
    layer = _layers.get(_resolve_layer_name(name))
    if layer is None:
        raise RuntimeError(f"no layer is named {_resolve_layer_name(name)!r}: its model was deleted")
    return layer


_library = torch.library.Library("vllm", "FRAGMENT")


def direct_register_custom_op(
    op_name: str,
    op_func: Callable,
    mutates_args: Iterable[str] = (),
    fake_impl: Callable | None = None,
) -> None:
    """Register `torch.ops.vllm.<op_name>`, with little between a call and the function.

    Args:
        op_func: its annotations are the schema; a layer's name is annotated `LayerNameType`. Runs on every device.
        mutates_args: names of the arguments that are written to.
        fake_impl: the same arguments without data -> outputs of the right shapes.
    """
    schema = torch.library.infer_schema(op_func, mutates_args=tuple(mutates_args))
    _library.define(op_name + schema)
    _library.impl(op_name, op_func, dispatch_key="CompositeExplicitAutograd")
    if fake_impl is not None:
        torch.library.register_fake(f"vllm::{op_name}", fake_impl, lib=_library)


_aux_streams: dict[tuple[int, int], torch.cuda.Stream] = {}


def aux_stream() -> torch.cuda.Stream | None:
    """The second stream that goes with the current one, made on first use; None without a GPU.

    One a stream, not one a device: memory that is freed on the second stream is used again in its own order, which is safe as long as
    everything that reads it is on one first stream (see `maybe_execute_in_parallel`).
    """
    if not torch.cuda.is_available():
        return None
    current = torch.cuda.current_stream()
    key = (current.device_index, current.cuda_stream)
    if key not in _aux_streams:
        _aux_streams[key] = new_stream()
    return _aux_streams[key]


def kept(make: Callable[[torch.device], torch.Tensor], device: torch.device) -> torch.Tensor:
    """make(device), a tensor for as long as the process lives: not in the memory pool that this thread's tensors may be going to
    (`GraphCache.memory`), whose places change hands."""
    if device.type != "cuda":
        return make(device)
    stream = torch.cuda.current_stream(device)

    def elsewhere() -> torch.Tensor:
        with torch.cuda.stream(stream):
            return make(device)

    with ThreadPoolExecutor(1) as other:  # pools are a thread's own
        return other.submit(elsewhere).result()
