"""Attribution of kernels, on traces made by hand; a real one is in test_ab.py."""

import pytest

from vllm.benchmarks.step_profile import (
    COMPONENT,
    REST,
    STEP,
    Kernel,
    component_of,
    idle_share,
    kernels_of,
    learn,
    learnt_from,
    summarise,
)


def event(cat, name, ts, dur, tid=1, **args):
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args}


def mark(name, ts, dur):
    return event("user_annotation", name, ts, dur)


def gpu_trace():
    return {
        "traceEvents": [
            mark(STEP, 0, 100),
            mark(COMPONENT + "GDN core", 10, 50),
            mark(COMPONENT + "norms", 20, 10),
            event("cuda_runtime", "cudaLaunchKernel", 12, 2, correlation=1),
            event("cuda_driver", "cuLaunchKernelEx", 22, 2, correlation=2),
            event("cuda_runtime", "cudaLaunchKernel", 40, 2, correlation=3),
            event("cuda_runtime", "cudaGraphLaunch", 70, 2, correlation=4),
            event("cuda_runtime", "cudaLaunchKernel", 90, 2, correlation=5),
            event("cuda_runtime", "cudaLaunchKernel", 120, 2, correlation=6),
            event("kernel", "recurrence", 200, 5, tid=7, correlation=1, grid=[4, 1, 1]),
            event("kernel", "norm", 210, 1, tid=7, correlation=2, grid=[1, 1, 1]),
            event("gpu_memcpy", "Memcpy DtoD", 220, 2, tid=7, correlation=3),
            event("kernel", "gemm", 230, 8, tid=7, correlation=4, grid=[9, 1, 1]),
            event("kernel", "norm", 240, 1, tid=7, correlation=4, grid=[1, 1, 1]),
            event("kernel", "argmax", 250, 3, tid=7, correlation=5, grid=[1, 1, 1]),
            event("kernel", "late", 260, 3, tid=7, correlation=6, grid=[1, 1, 1]),
            {"ph": "M", "name": "process_name"},
        ]
    }


def test_kernels_belong_to_the_innermost_component_that_launched_them():
    found = [(kernel.name, kernel.component) for kernel in kernels_of(gpu_trace())]
    assert found == [
        ("recurrence", "GDN core"),
        ("norm", "norms"),
        ("Memcpy DtoD", "GDN core"),
        ("gemm", None),  # of a graph
        ("norm", None),
        ("argmax", REST),
    ]  # and the one that was launched after the step is not there


def test_kernels_of_graphs_are_attributed_by_a_run_without():
    eager = {
        "traceEvents": [
            mark(STEP, 0, 100),
            mark(COMPONENT + "GDN in_proj", 10, 10),
            mark(COMPONENT + "lm_head", 30, 10),
            *(event("cuda_runtime", "cudaLaunchKernel", ts, 1, correlation=i) for i, ts in enumerate((11, 13, 31))),
            event("kernel", "gemm", 200, 6, correlation=0, grid=[9, 1, 1]),
            event("kernel", "gemm", 210, 1, correlation=1, grid=[3, 1, 1]),
            event("kernel", "gemm", 220, 2, correlation=2, grid=[9, 1, 1]),
        ]
    }
    table = [[name, grid, parts] for (name, grid), parts in learn(kernels_of(eager)).items()]
    found = summarise(kernels_of(gpu_trace()), 1, learnt_from(table))
    us = {part["name"]: part["us_a_step"] for part in found["components"]}
    assert us == pytest.approx({"GDN in_proj": 6, "lm_head": 2, "GDN core": 7, "norms": 1, "unknown": 1, REST: 3})
    assert found["kernels_a_step"] == pytest.approx(6) and found["busy_us_a_step"] == pytest.approx(20)
    assert sum(part["share"] for part in found["components"]) == pytest.approx(1)


def test_idle_is_what_no_kernel_covers():
    def kernel(start, us):
        return Kernel("k", "", us, None, start)

    assert idle_share([]) == idle_share([kernel(5, 0)]) == idle_share([kernel(5, 3)]) == 0.0
    # the second begins within the first, the third after a gap of 4, the last within the third
    assert idle_share([kernel(10, 6), kernel(14, 2), kernel(20, 10), kernel(22, 3)]) == pytest.approx(4 / 20)
    assert idle_share([kernel(22, 3), kernel(20, 10), kernel(14, 9), kernel(10, 6)]) == 0.0
    # 200 to 253: 5, 1, 2, 8, 1 and 3 are busy
    assert summarise(kernels_of(gpu_trace()), 1)["idle_share"] == pytest.approx(33 / 53)


def test_operators_count_the_time_that_is_their_own():
    trace = {
        "traceEvents": [
            mark(STEP, 0, 50),
            mark(COMPONENT + "router", 5, 30),
            event("cpu_op", "linear", 10, 20),
            event("cpu_op", "mm", 12, 15),
            event("cpu_op", "argmax", 40, 5),
            event("cpu_op", "elsewhere", 60, 5),
        ]
    }
    found = summarise(kernels_of(trace), 1)
    assert "idle_share" not in found
    assert {part["name"]: part["us_a_step"] for part in found["components"]} == {"router": 20, REST: 5}
    assert found["components"][0]["kernels"] == [
        {"name": "mm", "calls_a_step": 1, "us_a_step": 15},
        {"name": "linear", "calls_a_step": 1, "us_a_step": 5},
    ]


@pytest.mark.parametrize(
    ("path", "component"),
    [
        ("layers.0.linear_attn", "GDN core"),
        ("layers.0.linear_attn.norm", "GDN core"),
        ("layers.0.linear_attn.in_proj_qkvz", "GDN in_proj"),
        ("layers.3.self_attn.o_proj", "attention projections"),
        ("layers.3.self_attn.q_norm", "attention"),
        ("layers.3.mlp.experts", "routed experts"),
        ("layers.3.mlp.shared_expert", "shared expert"),
        ("layers.3.mlp.shared_expert.down_proj", None),
        ("layers.3.mlp.shared_expert_gate", "router"),
        ("layers.3.post_attention_layernorm", "norms"),
        ("norm", "norms"),
        ("lm_head", "lm_head"),
        ("layers", None),
    ],
)
def test_components(path, component):
    assert component_of(path) == component
