// The kernels of csrc/experts_int4.cuh on the CPU, for tests/csrc/test_experts_int4.py.
#include "emulator.h"
//
#include "../../../csrc/experts_int4.cuh"

using namespace vllm::experts;

namespace {

template <int kUsual, typename Run>
void by_format(const Matrix& w, Run run) {
  const auto sized = [&](auto zero, auto share) {
    w.columns == kUsual ? run(zero, share, std::integral_constant<int, kUsual>())
                        : run(zero, share, std::integral_constant<int, 0>());
  };
  const auto with = [&](auto has_zero) {
    w.columns / w.groups == kUnit ? sized(has_zero, std::integral_constant<int, 1>())
                                  : sized(has_zero, std::integral_constant<int, kChunk>());
  };
  w.zero ? with(std::true_type()) : with(std::false_type());
}

}  // namespace

extern "C" void gate_up_token(bf16* h, const bf16* x, const Matrix* w, const Choices* c, int tokens) {
  by_format<2048>(*w, [&](auto zero, auto share, auto columns) {
    emulated::run({unsigned(w->rows / 2 / kTile), unsigned(tokens * c->top_k)}, kWarps * 32,
                  [&] { gate_up_kernel<false, zero(), share(), kMostKeys, columns()>(h, x, *w, *c); });
  });
}

extern "C" void gate_up_blocks(bf16* h, const bf16* x, const Matrix* w, const Choices* c, int blocks) {
  by_format<2048>(*w, [&](auto zero, auto share, auto columns) {
    emulated::run({unsigned(w->rows / 2 / kTile), unsigned(blocks)}, kWarps * 32,
                  [&] { gate_up_kernel<true, zero(), share(), 1, columns()>(h, x, *w, *c); });
  });
}

extern "C" void down_token(bf16* y, const bf16* h, const Matrix* w, const Choices* c, const Shared* shared, int tokens,
                           bool early, bool add) {
  by_format<512>(*w, [&](auto zero, auto share, auto columns) {
    emulated::run({unsigned(w->rows / kTile), unsigned(tokens)}, c->top_k * 32,
                  [&] { down_token_kernel<zero(), share(), kMostKeys, columns()>(y, h, *w, *c, *shared, early, add); });
  });
}

extern "C" void down_blocks(bf16* y, const bf16* h, const Matrix* w, const Choices* c, int blocks) {
  by_format<512>(*w, [&](auto zero, auto share, auto columns) {
    emulated::run({unsigned(w->rows / (kWarps * kTile)), unsigned(blocks)}, kWarps * 32,
                  [&] { down_blocks_kernel<zero(), share(), columns()>(y, h, *w, *c); });
  });
}
