// The kernel of csrc/quantised_gemm.cuh on the CPU, for tests/csrc/test_quantised_gemm.py.
#include "emulator.h"
//
#include "../../../csrc/quantised_gemm.cuh"

using namespace vllm::quantised;

// The problem with what is known before plan_scales. Returns its Scaling, or -1 where no kernel reads such groups.
extern "C" int quantised_gemm(bf16* y, const bf16* x, Problem* p, int format, int64_t columns, int64_t group,
                              int stages, int blocks) {
  const Plan plan = plan_scales(*p, Format(format), columns, group);
  if (plan.share == 0) return -1;
  p->stages = stages;
  p->stage_bytes = kTile * (kPanel + kPad + p->scale_pitch + p->zero_pitch);
  with_kernel(*p, Format(format), plan, [&](auto kernel, int) {
    emulated::run({unsigned(blocks), 1}, (kWarps + 1) * 32, [&] { kernel(y, x, *p); });
  });
  return int(plan.scaling);
}
