// The kernel of csrc/skinny_gemm.cuh on the CPU, plain weights in bfloat16, for tests/csrc/test_skinny_gemm.py.
#include "emulator.h"
//
#include "../../../csrc/skinny_gemm.cuh"

using namespace vllm::skinny;
using bf16 = __nv_bfloat16;

namespace {

template <Fold kFold, int kXTiles, int kPanel, int kPanels>
void run(bf16* y, const bf16* x, Problem p, int blocks) {
  using C = Cut<Format::kPlain, kXTiles, kPanel, kPanels>;
  p.stage_bytes = kRows * C::kPitch;
  emulated::run({unsigned(blocks), 1}, C::kThreads, [&] {
    skinny_gemm_kernel<bf16, Format::kPlain, Scaling::kRow, kXTiles, kPanel, kPanels, kFold>(y, x, p);
  });
}

template <Fold kFold, int kPanel, int kPanels>
void run_rows(bf16* y, const bf16* x, const Problem& p, int blocks) {
  if (p.M <= 8) return run<kFold, 1, kPanel, kPanels>(y, x, p, blocks);
  if (p.M <= 16) return run<kFold, 2, kPanel, kPanels>(y, x, p, blocks);
  if constexpr (kPanels == 1) run<kFold, 4, kPanel, kPanels>(y, x, p, blocks);
}

template <Fold kFold>
void run_columns(bf16* y, const bf16* x, const Problem& p, int K, int blocks) {
  if (K == 512) return run_rows<kFold, 512, 1>(y, x, p, blocks);
  K == 2048 ? run_rows<kFold, 2048, 1>(y, x, p, blocks) : run_rows<kFold, 2048, 2>(y, x, p, blocks);
}

}  // namespace

// y [M, N] = x [M, K] W', rows side by side. norm: weight of a norm in front of it, or null; add: y is added to.
extern "C" void skinny_gemm(bf16* y, const bf16* x, const bf16* w, int M, int N, int K, const bf16* norm, float eps,
                            float offset, bool add, int stages, int blocks) {
  Problem p{};
  p.M = M, p.N = N, p.stages = stages, p.x_row = K, p.y_row = N, p.w_row = 2 * K;
  p.w = reinterpret_cast<const unsigned char*>(w);
  p.scale_rows = 1, p.lift = 1.f;
  p.norm = norm, p.norm_eps = eps, p.norm_offset = offset;
  if (norm) return run_columns<Fold::kNorm>(y, x, p, K, blocks);
  add ? run_columns<Fold::kAdd>(y, x, p, K, blocks) : run_columns<Fold::kNone>(y, x, p, K, blocks);
}
