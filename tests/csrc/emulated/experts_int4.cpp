// The kernels of csrc/experts_int4.cuh on the CPU, for tests/csrc/test_experts_int4.py.
#include "emulator.h"
//
#include "../../../csrc/experts_int4.cuh"

using namespace vllm::experts;

namespace {

template <typename Run>
void by_format(const Matrix& w, Run run) {
  const bool unit = w.columns / w.groups == kUnit;
  const auto with = [&](auto has_zero) {
    unit ? run(has_zero, std::integral_constant<int, 1>()) : run(has_zero, std::integral_constant<int, kChunk>());
  };
  w.zero ? with(std::true_type()) : with(std::false_type());
}

}  // namespace

extern "C" void gate_up_token(bf16* h, const bf16* x, const Matrix* w, const Choices* c, int tokens) {
  by_format(*w, [&](auto zero, auto share) {
    emulated::run({unsigned(w->rows / 2 / kTile), unsigned(tokens * c->top_k)}, kWarps * 32,
                  [&] { gate_up_kernel<false, zero(), share(), kMostKeys>(h, x, *w, *c); });
  });
}

extern "C" void gate_up_blocks(bf16* h, const bf16* x, const Matrix* w, const Choices* c, int blocks) {
  by_format(*w, [&](auto zero, auto share) {
    emulated::run({unsigned(w->rows / 2 / kTile), unsigned(blocks)}, kWarps * 32,
                  [&] { gate_up_kernel<true, zero(), share(), 1>(h, x, *w, *c); });
  });
}

extern "C" void down_token(bf16* y, const bf16* h, const Matrix* w, const Choices* c, const Shared* shared, int tokens,
                           bool early, bool add) {
  by_format(*w, [&](auto zero, auto share) {
    emulated::run({unsigned(w->rows / kTile), unsigned(tokens)}, c->top_k * 32,
                  [&] { down_token_kernel<zero(), share(), kMostKeys>(y, h, *w, *c, *shared, early, add); });
  });
}

extern "C" void down_blocks(bf16* y, const bf16* h, const Matrix* w, const Choices* c, int blocks) {
  by_format(*w, [&](auto zero, auto share) {
    emulated::run({unsigned(w->rows / (kWarps * kTile)), unsigned(blocks)}, kWarps * 32,
                  [&] { down_blocks_kernel<zero(), share()>(y, h, *w, *c); });
  });
}
