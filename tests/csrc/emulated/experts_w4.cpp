// The kernels of csrc/experts_w4.cuh on the CPU, for tests/csrc/test_experts_w4.py.
#include "emulator.h"
//
#include "../../../csrc/experts_w4.cuh"

using namespace vllm::experts;

extern "C" void gate_up(bf16* h, const bf16* x, const Stack* w, const Routing* r, int blocks, int stages) {
  with_kind<2>(*w, r->experts, [&](auto kind, auto keys) {
    emulated::run({unsigned(blocks), 1}, kWarps * 32,
                  [&] { gate_up_kernel<decltype(kind), keys()>(h, x, *w, *r, stages); });
  });
}

extern "C" void down(bf16* y, const bf16* h, const Stack* w, const Routing* r, const Shared* shared, bool add,
                     int warps, int stages) {
  with_kind<1>(*w, r->experts, [&](auto kind, auto keys) {
    emulated::run({unsigned(w->rows / kTile), 1}, warps * 32,
                  [&] { down_kernel<decltype(kind), keys()>(y, h, *w, *r, *shared, add, stages); });
  });
}

// Bytes of shared memory that the two take, and how many lists there may be.
extern "C" void sizes(const Stack* w13, const Stack* w2, const Routing* r, int warps, int stages, int* to) {
  with_kind<2>(*w13, r->experts,
               [&](auto kind, auto) { to[0] = gate_up_bytes<decltype(kind)>(r->most_lists, stages); });
  with_kind<1>(*w2, r->experts,
               [&](auto kind, auto) { to[1] = down_bytes<decltype(kind)>(r->tokens, r->most_lists, warps, stages); });
  to[2] = int(most_lists(r->tokens, r->experts, r->top_k));
}
