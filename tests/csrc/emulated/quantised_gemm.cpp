// The kernel of csrc/quantised_gemm.cuh on the CPU, for tests/csrc/test_quantised_gemm.py.
#include "emulator.h"
//
#include "../../../csrc/quantised_gemm_plan.cuh"

using namespace vllm::quantised;

// The problem with what is known before plan_scales. Returns its Scaling, or -1 where no kernel reads such groups.
// tall: sixteens of rows in a tile of the kernel that ran, 0 of the one for a tile a block.
extern "C" int quantised_gemm(bf16* y, const bf16* x, Problem* p, int format, int64_t columns, int64_t group,
                              int blocks, int* tall) {
  const Plan plan = plan_scales(*p, Format(format), columns, group);
  if (plan.share == 0) return -1;
  with_kind(*p, Format(format), plan, blocks, sizeof emulated::memory, [&](auto kind, auto once) {
    using K = decltype(kind);
    *tall = once.value ? 0 : K::kTall;
    static_assert(kSumBytes<K> + kWarps * kFew * K::kStage <= (K::kTall == 1 ? 96 << 10 : kTallBytes), "");
    const unsigned tiles = (p->N + K::kRows - 1) / K::kRows;
    emulated::run({once.value ? tiles : unsigned(blocks), 1}, kWarps * 32, [&] {
      if constexpr (once.value) {
        quantised_once_kernel<K>(y, x, *p);
      } else {
        quantised_gemm_kernel<K>(y, x, *p);
      }
    });
  });
  return int(plan.scaling);
}
