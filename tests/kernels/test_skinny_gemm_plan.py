"""Which plan a product behind a norm takes; test_skinny_gemm.py has the other plans."""

from functools import partial

from vllm.model_executor.layers.ops import skinny_gemm_plan as plan_module
from vllm.model_executor.layers.ops.skinny_gemm_plan import Plan, plan_skinny_gemm


def test_a_norm_in_front_is_worth_a_slower_ring(monkeypatch):
    ring = {"form": "ring", "ring": 220, "late": 9}
    rows = {"1": {"form": "vector", "behind_norm": ring}, "2": {"form": "rows"}}
    monkeypatch.setattr(plan_module, "_table", lambda: {"GPU": {"plain": {"1000x4096": rows}}})
    plan_module._measured.cache_clear()
    try:
        plan = partial(plan_skinny_gemm, "GPU", N=1000, K=4096)
        assert plan(M=1) == Plan("vector") and plan(M=1, behind_norm=True) == Plan("ring", 220, 9)
        assert plan(M=1, behind_norm=True, csrc=False) == Plan("vector")
        assert plan(M=2, behind_norm=True) == plan(M=2) == Plan("rows")
    finally:
        plan_module._measured.cache_clear()
