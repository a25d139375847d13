"""Custom ops, and names of layers inside them."""

import gc
import pickle

import pytest
import torch
from torch._subclasses import FakeTensorMode

from vllm.utils import torch_utils
from vllm.utils.torch_utils import (
    LayerName,
    LayerNameType,
    _encode_layer_name,
    _resolve_layer_name,
    aux_stream,
    direct_register_custom_op,
    find_layer,
    register_layer,
)


def test_names_compare_by_value():
    a, b = LayerName("model.layers.0"), LayerName("model.layers.0")
    assert a == b and hash(a) == hash(b) and a != LayerName("model.layers.1") and a != "model.layers.0"
    assert eval(a.__fx_repr__()[0], a.__fx_repr__()[1]) == a
    assert pickle.loads(pickle.dumps(a)) == a


def test_both_forms_of_a_name_resolve():
    assert _resolve_layer_name("x") == _resolve_layer_name(LayerName("x")) == "x"
    assert _resolve_layer_name(_encode_layer_name("x")) == "x"


def test_this_torch_hoists_names():
    from torch._library.opaque_object import is_opaque_value_type, should_hoist

    assert torch_utils.USE_LAYERNAME and LayerNameType is LayerName
    assert is_opaque_value_type(LayerName) and should_hoist(LayerName)


def test_names_are_strings_where_asked_or_where_torch_cannot(monkeypatch, caplog):
    monkeypatch.setenv("VLLM_USE_LAYERNAME", "0")
    assert torch_utils._register() is False and not caplog.messages
    monkeypatch.setenv("VLLM_USE_LAYERNAME", "1")
    monkeypatch.setattr(torch_utils, "register_opaque_type", None)
    assert torch_utils._register() is False
    assert "strings" in caplog.text
    monkeypatch.setattr(torch_utils, "USE_LAYERNAME", False)
    assert _encode_layer_name("x") == "x"


def test_layers_of_one_prefix_have_names_of_their_own():
    layers = [torch.nn.Identity() for _ in range(3)]
    names = [register_layer("some.prefix", layer) for layer in layers]
    assert names == ["some.prefix", "some.prefix#2", "some.prefix#3"]
    assert [find_layer(name) for name in names] == layers
    assert find_layer(_encode_layer_name(names[1])) is layers[1]


def test_the_registry_keeps_no_layer_alive_and_gives_no_name_twice():
    layer = torch.nn.Identity()
    name = register_layer("gone", layer)
    del layer
    gc.collect()
    with pytest.raises(RuntimeError, match="'gone'"):
        find_layer(name)
    assert register_layer("gone", torch.nn.Identity()) == "gone#2"


def scaled(x: torch.Tensor, factor: int, layer_name: LayerNameType) -> torch.Tensor:
    return x * factor + len(_resolve_layer_name(layer_name))


def doubled_(x: torch.Tensor) -> None:
    x.mul_(2)


direct_register_custom_op("test_scaled", scaled, (), lambda x, factor, layer_name: torch.empty_like(x))
direct_register_custom_op("test_doubled_", doubled_, ["x"])


def test_custom_op():
    x = torch.arange(3.0)
    torch.testing.assert_close(torch.ops.vllm.test_scaled(x, 2, _encode_layer_name("abc")), 2 * x + 3)
    torch.ops.vllm.test_doubled_(x)
    torch.testing.assert_close(x, 2 * torch.arange(3.0))
    assert "Tensor(a0!) x" in str(torch.ops.vllm.test_doubled_.default._schema)


def test_custom_op_without_data():
    with FakeTensorMode() as mode:
        x = mode.from_tensor(torch.zeros(2, 5))
        assert torch.ops.vllm.test_scaled(x, 2, _encode_layer_name("abc")).shape == (2, 5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU")
def test_no_auxiliary_stream_without_a_gpu():
    assert aux_stream() is None


@pytest.mark.gpu
def test_gpu_one_auxiliary_stream_for_each_stream():
    first, other = aux_stream(), torch.cuda.Stream()
    assert aux_stream() is first and first != torch.cuda.current_stream()
    with torch.cuda.stream(other):
        assert aux_stream() is aux_stream() and aux_stream() is not first
