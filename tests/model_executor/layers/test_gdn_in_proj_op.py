"""The input projection as a custom op: which layer it finds, the shapes it promises, and what torch.compile makes of it."""

import copy
import gc
import json
import subprocess
import sys
import weakref

import pytest
import torch
from torch._subclasses import FakeTensorMode

from tests.model_executor.layers.gdn_layer import HV, K, V, build, run, sequence
from tests.structure.tree import ROOT
from vllm.model_executor.layers.quantization.unquantized import Unquantized
from vllm.utils.torch_utils import _encode_layer_name

CONV, VALUE = 2 * 2 * K + HV * V, HV * V


def project(layer, x):
    return torch.ops.vllm.gdn_in_proj(x, CONV + VALUE, 2 * HV, _encode_layer_name(layer.name))


class FourRowsInOne(Unquantized):
    """Weights repacked after loading, as kernels for small types want them: [rows / 4, 4 * columns]."""

    def process(self, layer, prefix=""):
        w = layer.weight
        layer.weight = torch.nn.Parameter(w.view(w.shape[0] // 4, -1), requires_grad=False)

    def all(self, layer, prefix="", rows=slice(None)):
        return layer.weight.view(-1, layer.weight.shape[1] // 4)[rows]


def test_shapes_come_from_the_configuration_not_from_the_weight():
    layer = build("dual_stream", linear_num_value_heads=8)
    conv, value, heads = layer.conv_dim, layer.value_dim, layer.num_v_heads
    x, linear = sequence(5), layer.in_proj
    want = linear(x)
    linear.scheme = FourRowsInOne()
    linear.process_weights_after_loading()
    assert linear.weight.shape[0] == (conv + value + 2 * heads) // 4, "the weight lies about its rows now"
    name = _encode_layer_name(layer.name)
    qkvz, ba = torch.ops.vllm.gdn_in_proj(x, conv + value, 2 * heads, name)
    torch.testing.assert_close(torch.cat([qkvz, ba], dim=1), want)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = torch.ops.vllm.gdn_in_proj(mode.from_tensor(x), conv + value, 2 * heads, name)
        projected = layer.project(layer, mode.from_tensor(x))
    assert [(f.shape, f.stride(), f.dtype) for f in fake] == [(r.shape, r.stride(), r.dtype) for r in (qkvz, ba)]
    assert [tuple(p.shape) for p in projected] == [(5, conv), (5, value), (5, heads), (5, heads)]


def test_core_op_promises_the_right_shape():
    layer, x = build("dual_stream"), sequence(3)
    p = layer.project(layer, x)
    real = run(layer, x, decodes=[1, 2, 3])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        o = torch.ops.vllm.gdn_attention_core(*map(mode.from_tensor, p), _encode_layer_name(layer.name))
    assert o.shape == (3, VALUE) and o.is_contiguous() and o.dtype == real.dtype


def test_two_models_with_the_same_prefixes_keep_to_themselves():
    one, two = build("dual_stream"), build("dual_stream")
    two.in_proj.weight.mul_(2)
    x = sequence(4)
    assert one.prefix == two.prefix and one.name != two.name
    for a, b in zip(project(one, x), project(two, x)):
        torch.testing.assert_close(2 * a, b)


def test_a_copy_is_a_layer_of_its_own():
    layer, x = build("dual_stream"), sequence(4)
    other = copy.deepcopy(layer)
    other.in_proj.weight.zero_()
    assert other.name != layer.name
    assert all((y == 0).all() for y in project(other, x)) and any((y != 0).any() for y in project(layer, x))


def test_a_deleted_model_is_gone():
    layer = build("dual_stream")
    name, alive = layer.name, weakref.ref(layer)
    del layer
    gc.collect()
    assert alive() is None
    with pytest.raises(RuntimeError, match="its model was deleted"):
        torch.ops.vllm.gdn_in_proj(sequence(1), CONV + VALUE, 2 * HV, _encode_layer_name(name))


def compile_counts(layers: int, *arguments: str) -> dict:
    command = [sys.executable, "-m", "benchmarks.kernels.gdn_compile", "--layers", str(layers), *arguments]
    done = subprocess.run([*command, "--json", "/dev/stdout"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout[done.stdout.index("{\n") :])


@pytest.mark.slow
def test_torch_compile_makes_one_graph_for_all_layers():
    """Five decoder layers of one kind, one after the other: one graph where names are opaque, five where they are strings."""
    counts = compile_counts(5, "--device", "cpu", "--backend", "count")
    opaque, string = counts["LayerName"], counts["string"]
    assert (opaque["opaque"], string["opaque"]) == (True, False)
    assert (opaque["different_graphs"], string["different_graphs"]) == (1, 5)
    assert string["traced"] == 5
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13):
        assert opaque["traced"] == 1  # 2.11 still traces each layer, and finds that it has compiled the graph before
    assert opaque["max_difference"] == string["max_difference"] == 0
