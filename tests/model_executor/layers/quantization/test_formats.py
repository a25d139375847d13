"""Every format: the worked examples of its description, and dense weights that are those of an independent decompressor."""

import pytest
import torch

from tests.quantised import FORMATS, fill, infos, kernel_weight_reference, quantization_config
from vllm.config import parse_quantization
from vllm.distributed.parallel_state import TensorParallelGroup, use_group
from vllm.model_executor.layers.fused_moe import FusedMoE
from vllm.model_executor.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.ops.quantised_gemm_plan import LEAST_FP8_ROWS
from vllm.model_executor.layers.quantization import awq, dense, fp8, nvfp4
from vllm.model_executor.layers.quantization.compressed_tensors_wna16 import dequantise, unpack
from vllm.model_executor.layers.quantization.plan import CheckpointPlan, ConfigPlan
from vllm.v1.core.memory_plan import DTYPE_BYTES
from vllm.v1.worker.cudagraph import GraphCache

# What the tools write, and what kernels get of it.
KINDS = {
    "w4a16": "int4",
    "w4a16-zero-points": "int4",
    "w4a16-g128": "int4",
    "w4a16-channel": "int4",
    "w8a16": "int8",
    "w8a16-channel": "int8",
    "fp8": "fp8",
    "fp8-block": "fp8",
    "fp8-official": "fp8",
    "nvfp4": "fp4",
    "awq": "int4",
}


def plan_of(form, tensors, dtype=torch.float32):
    return CheckpointPlan(infos(tensors), dtype, parse_quantization(quantization_config(form)))


def quantised(form, rows, columns, module="m", generator=None):
    """Tensors of a module and the dense weight that they mean."""
    weight = torch.randn(rows, columns, generator=generator).mul(0.05).bfloat16()
    weight[1, 3] = 0.4
    tensors, plain = FORMATS[form].quantise(weight)
    return {f"{module}.{name}": t for name, t in tensors.items()}, plain


def test_worked_example_of_packed_integers():
    """One word: [-8, -7, -1, 0, 1, 2, 6, 7], lowest bits first, offset by 8."""
    packed = torch.tensor([[0xFEA98710 - 2**32]], dtype=torch.int32)
    assert unpack(packed, 4).tolist() == [[0, 1, 7, 8, 9, 10, 14, 15]]
    scale = torch.tensor([[0.5]])
    assert dequantise(packed, scale, None, 4, torch.float32).tolist() == [[-4, -3.5, -0.5, 0, 0.5, 1, 3, 3.5]]
    zero_point = torch.tensor([[7]], dtype=torch.uint8)
    shifted = dequantise(packed, scale, zero_point, 4, torch.float32)
    assert shifted.tolist() == [[-3.5, -3, 0, 0.5, 1, 1.5, 3.5, 4]]


def test_worked_example_of_four_bit_floats():
    codes = torch.tensor([[0xF1, 0x82, 0x65, 0x4B]], dtype=torch.uint8)
    sizes = nvfp4.unpack(codes)
    assert sizes.tolist() == [[0.5, -6, 1, -0.0, 3, 4, -1.5, 2]]
    assert torch.signbit(sizes)[0].tolist() == [False, True, False, True, False, False, True, False]


def test_worked_example_of_autoawq():
    """A word of columns that hold 0 to 7."""
    words = torch.tensor([[0x75316420]], dtype=torch.int32)
    assert awq.nibbles(words).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]
    # the same columns, 8 inputs deep, packed along the inputs: column n is the word 0xnnnnnnnn
    repacked = awq.repack(words.expand(8, 1))
    assert repacked.flatten().tolist() == [0x11111111 * n for n in range(8)]


@pytest.mark.parametrize("scale_name", ["weight_scale_inv", "weight_scale"])
def test_worked_example_of_fp8_blocks(scale_name):
    """w = q * scale[n // 128, k // 128], with blocks cut at both edges."""
    q = torch.ones(200, 160).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0, 2.0], [4.0, 8.0]])
    tensors = {"m.weight": q, f"m.{scale_name}": scale}
    form = "fp8-official" if scale_name == "weight_scale_inv" else "fp8-block"
    layer = fill(ColumnParallelLinear(160, 200, prefix="m", plan=plan_of(form, tensors)), tensors)
    w = layer.scheme.all(layer)
    assert (w[0, 0], w[127, 127], w[0, 128], w[128, 0], w[199, 159]) == (1, 1, 2, 4, 8)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dense_weights_bit_for_bit(form, dtype, seed):
    tensors, plain = quantised(form, 72, 384)
    layer = fill(ColumnParallelLinear(384, 72, prefix="m", plan=plan_of(form, tensors, dtype)), tensors)
    want = plain.to(dtype)
    assert torch.equal(layer.scheme.all(layer), want)
    assert torch.equal(layer.scheme.all(layer, "", slice(8, 17)), want[8:17])
    x = torch.randn(3, 384, dtype=dtype)
    assert torch.equal(layer(x), x @ want.T)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("rows", [100, 300, 1500])
def test_many_rows_in_a_graph(form, rows, seed):
    """What decoding batches and prompts beyond the kernels for few rows multiply with is made on the device alone."""
    tensors, plain = quantised(form, 72, 384)
    layer = fill(ColumnParallelLinear(384, 72, prefix="m", plan=plan_of(form, tensors, torch.bfloat16)), tensors).cuda()
    x, y = torch.randn(rows, 384).bfloat16().cuda(), torch.zeros(rows, 72).bfloat16().cuda()
    graphs = GraphCache(x.device)
    with torch.inference_mode():
        want = layer(x)
        graphs.capture("linear", lambda: y.copy_(layer(x)))
        graphs.replay("linear")
    assert torch.equal(y, want)
    exact = x.cpu().float() @ plain.float().T
    quantised_inputs = KINDS[form] == "fp8" and rows >= LEAST_FP8_ROWS
    assert (want.cpu().float() - exact).norm() < (5e-2 if quantised_inputs else 1e-2) * exact.norm()


@pytest.mark.parametrize("form", FORMATS)
def test_kernels_read_the_same_weights(form, seed):
    """`KernelWeight` by its own definition, for whole layers, runs of rows and stacks of experts."""
    tensors, plain = quantised(form, 160, 256)
    layer = fill(ColumnParallelLinear(256, 160, prefix="m", plan=plan_of(form, tensors)), tensors)
    close = {"rtol": 2**-8, "atol": 0}  # kernels do not round to what a decompressor returns
    for rows in (slice(None), slice(0, 128), slice(128, 160), slice(40, 139)):
        weight = layer.scheme.kernel_weight(layer, "", rows)
        assert weight.kind == KINDS[form]
        torch.testing.assert_close(kernel_weight_reference(weight), plain[rows].float(), **close)
    tensors, experts = {}, []
    for e in range(3):
        for part, shape in (("gate_proj", (64, 128)), ("up_proj", (64, 128)), ("down_proj", (128, 64))):
            if shape[1] % FORMATS[form].inputs:
                plain = torch.randn(shape).bfloat16()
                tensors[f"m.{e}.{part}.weight"] = plain
            else:
                more, plain = quantised(form, *shape, f"m.{e}.{part}")
                tensors |= more
            experts.append(plain.float())
    moe = fill(FusedMoE(3, 2, 128, 64, prefix="m", plan=plan_of(form, tensors)), tensors)
    w13 = torch.stack([torch.cat(experts[i : i + 2]) for i in (0, 3, 6)])
    w2 = torch.stack(experts[2::3])
    torch.testing.assert_close(kernel_weight_reference(moe.scheme13.kernel_weight(moe, "w13_")), w13, **close)
    torch.testing.assert_close(kernel_weight_reference(moe.scheme2.kernel_weight(moe, "w2_")), w2, **close)
    for index in (slice(1, 2), torch.tensor([2, 0, 2])):
        assert torch.equal(moe.scheme13.select(moe, "w13_", index), w13[index])
        assert torch.equal(moe.scheme2.select(moe, "w2_", index), w2[index])
    assert torch.equal(moe.scheme13.all(moe, "w13_"), w13)


@pytest.mark.parametrize("form", FORMATS)
def test_parts_of_a_fused_layer_keep_their_own_scales(form, seed):
    """Parts whose rows do not end where blocks do; their global scales differ by two orders of magnitude."""
    one, plain_one = quantised(form, 72, 128, "m.a")
    weight = torch.randn(40, 128).mul(5).bfloat16()
    two, plain_two = FORMATS[form].quantise(weight)
    tensors = one | {f"m.b.{name}": t for name, t in two.items()}
    plan = plan_of(form, tensors)
    layer = fill(MergedColumnParallelLinear(128, {"a": 72, "b": 40}, prefix="m", plan=plan), tensors)
    want = torch.cat([plain_one.float(), plain_two.float()])
    assert torch.equal(layer.scheme.all(layer), want)
    torch.testing.assert_close(kernel_weight_reference(layer.scheme.kernel_weight(layer)), want, rtol=2**-8, atol=0)


@pytest.mark.parametrize("form", FORMATS)
def test_shares_of_two_ranks(form, seed):
    """Rows and columns cut in two: each rank's dense share is its share of the dense weight."""
    tensors, plain = quantised(form, 128, 256)
    for rank in range(2):
        with use_group(TensorParallelGroup(rank, 2)):
            column = ColumnParallelLinear(256, 128, prefix="m", plan=plan_of(form, tensors))
            row = RowParallelLinear(256, 128, prefix="m", plan=plan_of(form, tensors))
        half = slice(64 * rank, 64 * rank + 64)
        assert torch.equal(fill(column, tensors).scheme.all(column), plain[half].float())
        half = slice(128 * rank, 128 * rank + 128)
        assert torch.equal(fill(row, tensors).scheme.all(row), plain[:, half].float())


def test_a_rank_may_not_begin_inside_a_block():
    tensors, _ = quantised("fp8-official", 128, 256)
    with use_group(TensorParallelGroup(1, 4)):
        layer = RowParallelLinear(256, 128, prefix="m", plan=plan_of("fp8-official", tensors))
    with pytest.raises(ValueError, match="m: a rank's share of 256 inputs begins inside a block of 128"):
        fill(layer, tensors)


def test_scales_of_whole_blocks_are_kept_once(seed):
    tensors, _ = quantised("fp8-official", 320, 256)
    layer = fill(ColumnParallelLinear(256, 320, prefix="m", plan=plan_of("fp8-official", tensors)), tensors)
    assert layer.weight_scale.shape == (3, 2)
    weight = layer.scheme.kernel_weight(layer, "", slice(128, 300))
    assert (weight.scale_rows, weight.group, tuple(weight.scale.shape)) == (128, 128, (2, 2))
    assert weight.quantize_inputs and weight.values.dtype == torch.float8_e4m3fn


@pytest.mark.parametrize("sizes", [(128, 256, 40), (256, 128), (72, 56), (128, 40, 88)], ids=str)
@pytest.mark.parametrize("size", [1, 2])
def test_blocks_of_fused_parts(sizes, size, seed):
    """Scales go to their blocks as they are where parts end with blocks, and row by row where they do not; ranks may cut them."""
    parts = {f"p{i}": rows for i, rows in enumerate(sizes)}
    tensors, plain = {}, {}
    for name, rows in parts.items():
        more, plain[name] = quantised("fp8-official", rows, 256, f"m.{name}")
        tensors |= more
    for rank in range(size):
        with use_group(TensorParallelGroup(rank, size)):
            layer = MergedColumnParallelLinear(256, parts, prefix="m", plan=plan_of("fp8-official", tensors))
        fill(layer, tensors)
        shares = [w[rank * len(w) // size : (rank + 1) * len(w) // size] for w in plain.values()]
        assert torch.equal(layer.scheme.all(layer), torch.cat(shares))
        weight = layer.scheme.kernel_weight(layer)
        torch.testing.assert_close(kernel_weight_reference(weight), torch.cat(shares), rtol=1e-6, atol=0)
        if size == 1:
            assert weight.scale_rows == (1 if any(rows % 128 for rows in sizes[:-1]) else 128)


def test_pieces_do_not_change_the_result(monkeypatch, seed):
    packed = torch.randint(-(2**31), 2**31 - 1, (3, 40, 8), dtype=torch.int32)
    scale, zero = torch.rand(3, 40, 2), torch.randint(0, 16, (3, 40, 2), dtype=torch.uint8)
    words = torch.randint(-(2**31), 2**31 - 1, (64, 9), dtype=torch.int32)
    whole, repacked = dequantise(packed, scale, zero, 4, torch.float32), awq.repack(words)
    monkeypatch.setattr(dense, "PIECE", 64 * 7)
    monkeypatch.setattr(awq, "PIECE", 64 * 8 * 2)
    assert torch.equal(dequantise(packed, scale, zero, 4, torch.float32), whole)
    assert torch.equal(awq.repack(words), repacked)
    assert whole.shape == (3, 40, 64) and repacked.shape == (72, 8)


@pytest.mark.parametrize("form", FORMATS)
def test_dummy_weights_have_the_deviation_asked_for(form, seed):
    plan = ConfigPlan(parse_quantization(quantization_config(form)), torch.float32)
    layer = ColumnParallelLinear(512, 256, prefix="m", plan=plan)
    layer.fill_dummy(torch.Generator().manual_seed(0))
    layer.process_weights_after_loading()
    weight = layer.scheme.all(layer)
    assert weight.isfinite().all()
    assert weight.std().item() == pytest.approx(512**-0.5, rel=0.1)
    assert (
        abs(weight.mean().item()) < 0.12 * 512**-0.5
    )  # four bits go from -8 to 7, whose mean is -0.108 of their deviation


@pytest.mark.parametrize("form", FORMATS)
def test_planned_bytes_are_the_parameters(form):
    """Memory plans say what a matrix takes once it is loaded."""
    quant = parse_quantization(quantization_config(form))
    layer = ColumnParallelLinear(512, 384, prefix="m", plan=ConfigPlan(quant, torch.bfloat16))
    layer.fill_dummy(torch.Generator().manual_seed(0))
    layer.process_weights_after_loading()
    held = sum(p.numel() * p.element_size() for p in layer.parameters())
    assert quant.formats[0].matrix_bytes(384, 512) == held < 384 * 512 * DTYPE_BYTES["bfloat16"]


def test_names_of_schemes():
    names = {
        str(ConfigPlan(parse_quantization(quantization_config(f)), torch.float32).module_scheme("m", 512))
        for f in FORMATS
    }
    assert names >= {
        "int4, groups of 32",
        "int8, one scale a row, zero points",
        "fp8, blocks of 128 x 128",
        "fp4, groups of 16",
    }
    assert fp8.SCALES.keys() == {"weight_scale", "weight_scale_inv"}
