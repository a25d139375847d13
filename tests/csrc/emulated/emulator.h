// Runs a kernel of csrc/ on the CPU, one block after the other, its threads as fibers that take turns where they wait
// for each other.
//
// It stands in for hopper.cuh and for what nvcc brings. What it shows: indices, fragments, barriers and arithmetic.
// What it cannot show: races between threads that no barrier orders, and speed.
#pragma once

#define VLLM_HOPPER_CUH
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <type_traits>
#include <unordered_map>
#include <vector>

#undef __shared__
#undef __global__
#undef __device__
#undef __host__
#undef __launch_bounds__
#undef __grid_constant__
#undef __align__
#define __shared__ static
#define __global__ static
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __CUDA_ARCH__ 900

namespace emulated {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

struct Barrier {  // an mbarrier
  int arrivals = 0, pending = 0, phase = 0;
  int64_t bytes = 0;
  void settle() {
    if (pending == 0 && bytes == 0) phase ^= 1, pending = arrivals;
  }
};

struct Warp {  // operands of the collective under way and of the one before
  int arrived = 0;
  std::vector<uint64_t> values[2] = {std::vector<uint64_t>(32 * 8), std::vector<uint64_t>(32 * 8)};
};

struct Copy {  // of a thread's own, under way
  unsigned char* to;
  const void* from;
  int bytes;
};

struct Block {
  Index size, at, grid;
  int running = 0, synced = 0;
  std::vector<Warp> warps;
  std::unordered_map<const void*, Barrier> barriers;
  std::vector<ucontext_t> fibers;
  std::vector<int> collectives, syncs, named_syncs;
  std::vector<std::vector<std::vector<Copy>>> copies;  // of each thread: groups, the last one open
  int named[16] = {};
  ucontext_t scheduler;
  int thread = 0;
  int64_t idle = 0;  // turns since anybody got on
};

inline Block* block = nullptr;
alignas(128) inline unsigned char memory[256 << 10];

inline void pause() {  // let the others go on
  if (++block->idle > int64_t{1000} * int64_t(block->fibers.size())) {
    std::fprintf(stderr, "thread %d of block (%u, %u) waits for ever\n", block->thread, block->at.x, block->at.y);
    std::abort();
  }
  const int me = block->thread;
  swapcontext(&block->fibers[me], &block->scheduler);
}

template <typename Condition>
void wait_until(Condition condition) {
  while (!condition()) pause();
  block->idle = 0;
}

// All lanes of a warp hand in up to 8 words and see everybody's.
inline const uint64_t* exchange(std::initializer_list<uint64_t> mine) {
  const int thread = block->thread, lane = thread % 32;
  Warp& warp = block->warps[thread / 32];
  const int turn = block->collectives[thread]++;
  std::vector<uint64_t>& values = warp.values[turn % 2];
  std::copy(mine.begin(), mine.end(), values.begin() + lane * 8);
  ++warp.arrived;
  wait_until([&] { return warp.arrived >= 32 * (turn + 1); });
  return values.data();
}

template <typename Body>
void run(Index grid, int threads, Body body) {
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      Block state;
      block = &state;
      state.size = {unsigned(threads), 1, 1}, state.grid = grid, state.at = {x, y, 0};
      state.warps.resize(threads / 32), state.fibers.resize(threads);
      state.collectives.assign(threads, 0), state.syncs.assign(threads, 0), state.named_syncs.assign(threads, 0);
      state.copies.assign(threads, {{}});
      state.running = threads;
      std::memset(memory, 0xff, sizeof memory);  // bfloat16 and float NaN
      std::vector<bool> done(threads, false);
      constexpr size_t kStack = 64 << 10;
      std::vector<std::unique_ptr<char[]>> stacks;
      struct Start {
        Body* body;
        Block* block;
        std::vector<bool>* done;
      } start{&body, &state, &done};
      const auto entry = +[](unsigned high, unsigned low) {
        Start* const s = reinterpret_cast<Start*>(uint64_t(high) << 32 | low);
        (*s->body)();
        (*s->done)[s->block->thread] = true;
        --s->block->running;
        s->block->idle = 0;
      };
      for (int t = 0; t < threads; ++t) {
        stacks.emplace_back(new char[kStack]);
        getcontext(&state.fibers[t]);
        state.fibers[t].uc_stack.ss_sp = stacks.back().get();
        state.fibers[t].uc_stack.ss_size = kStack;
        state.fibers[t].uc_link = &state.scheduler;
        const uint64_t address = reinterpret_cast<uint64_t>(&start);
        makecontext(&state.fibers[t], reinterpret_cast<void (*)()>(entry), 2, unsigned(address >> 32),
                    unsigned(address));
      }
      while (state.running > 0) {
        for (int t = 0; t < threads; ++t) {
          if (done[t]) continue;
          state.thread = t;
          swapcontext(&state.scheduler, &state.fibers[t]);
        }
      }
    }
  }
}

inline Index thread_index() { return {unsigned(block->thread), 0, 0}; }

}  // namespace emulated

#define threadIdx (emulated::thread_index())
#define blockIdx (emulated::block->at)
#define blockDim (emulated::block->size)
#define gridDim (emulated::block->grid)

inline void __syncthreads() {
  emulated::Block& b = *emulated::block;
  const int turn = ++b.syncs[b.thread];
  ++b.synced;
  emulated::wait_until([&] { return b.synced >= turn * int(b.fibers.size()); });
}
inline void __syncwarp() { emulated::exchange({}); }
template <typename T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
template <typename T>
uint64_t to_bits(T value) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return from_bits<T>(emulated::exchange({to_bits(value)})[lane * 8]);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  const int lane = emulated::block->thread % 32;
  return from_bits<T>(emulated::exchange({to_bits(value)})[(lane ^ mask) * 8]);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int step) {
  const int lane = emulated::block->thread % 32;
  return from_bits<T>(emulated::exchange({to_bits(value)})[(lane < step ? lane : lane - step) * 8]);
}
inline int __reduce_max_sync(unsigned, int value) {
  const uint64_t* const all = emulated::exchange({to_bits(value)});
  int most = INT32_MIN;
  for (int i = 0; i < 32; ++i) most = std::max(most, from_bits<int>(all[i * 8]));
  return most;
}
inline unsigned atomicOr(unsigned* at, unsigned bits) {
  const unsigned old = *at;
  *at |= bits;
  return old;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
inline float __expf(float x) { return std::exp(x); }
template <typename T>
T __ldcg(const T* p) {
  return *p;
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t both = uint64_t(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= unsigned(both >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  return result;
}
inline float __uint_as_float(unsigned x) { return from_bits<float>(x); }
inline int __float_as_int(float x) { return from_bits<int>(to_bits(x)); }
inline unsigned __float_as_uint(float x) { return to_bits(x); }
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
using std::max;
using std::min;

namespace vllm {

inline void wait_for_predecessor() {}
inline void let_successor_start() {}
inline void sync_threads(int number, int threads) {
  emulated::Block& b = *emulated::block;
  const int turn = ++b.named_syncs[b.thread];
  int& arrived = b.named[number];
  ++arrived;
  emulated::wait_until([&] { return arrived >= turn * threads; });
}
template <typename F>
unsigned both_halves(unsigned a, unsigned b, F f) {
  const auto half = [&](int shift) {
    const float result = f(__uint_as_float(a >> shift << 16), __uint_as_float(b >> shift << 16));
    return unsigned(__bfloat16_as_ushort(__float2bfloat16_rn(result))) << shift;
  };
  return half(0) | half(16);
}
inline unsigned sub2(unsigned a, unsigned b) {
  return both_halves(a, b, [](float x, float y) { return x - y; });
}
inline unsigned mul2(unsigned a, unsigned b) {
  return both_halves(a, b, [](float x, float y) { return x * y; });
}
inline unsigned mask_or(unsigned x, unsigned mask, unsigned bits) { return (x & mask) | bits; }
inline unsigned mask_not_or(unsigned x, unsigned mask, unsigned bits) { return (~x & mask) | bits; }
inline unsigned low_twice(unsigned x) { return (x & 0xffff) * 0x10001; }
inline unsigned high_twice(unsigned x) { return (x >> 16) * 0x10001; }
inline unsigned choose_bits(unsigned mask, unsigned a, unsigned b) { return (a & mask) | (b & ~mask); }
inline void unmade(unsigned&) {}
inline void prefetch(const void*) {}
inline unsigned fma2(unsigned a, unsigned b, unsigned c) {
  const auto half = [&](int shift) {  // the product is exact in double, and so is almost always the sum
    const auto wide = [&](unsigned pair) { return double(__uint_as_float(pair >> shift << 16)); };
    return unsigned(__bfloat16_as_ushort(__double2bfloat16(wide(a) * wide(b) + wide(c)))) << shift;
  };
  return half(0) | half(16);
}
inline unsigned char* dynamic_memory() { return emulated::memory; }

// Shared memory lies within 2 GB of `memory`, as everything static does.
inline unsigned shared_address(const void* p) {
  return unsigned(static_cast<const unsigned char*>(p) - emulated::memory);
}
inline unsigned char* at_address(unsigned address) { return emulated::memory + int(address); }
inline emulated::Barrier& barrier_at(unsigned address) { return emulated::block->barriers[at_address(address)]; }
inline void barrier_init(unsigned barrier, int arrivals) {
  emulated::Barrier& b = barrier_at(barrier);
  b = {};
  b.arrivals = b.pending = arrivals;
}
inline void barrier_init_done() {}
inline void barrier_arrive(unsigned barrier) {
  --barrier_at(barrier).pending;
  barrier_at(barrier).settle();
}
inline void barrier_expect(unsigned barrier, int bytes) {
  barrier_at(barrier).bytes += bytes;
  barrier_arrive(barrier);
}
inline void barrier_wait(unsigned barrier, int phase) {
  emulated::wait_until([&] { return barrier_at(barrier).phase != phase; });
}
inline void bulk_copy(unsigned to, const void* from, int bytes, unsigned barrier) {
  if (bytes % 16 || to % 16 || reinterpret_cast<uintptr_t>(from) % 16) {
    std::fprintf(stderr, "a bulk copy needs multiples of 16 bytes\n");
    std::abort();
  }
  std::memcpy(at_address(to), from, bytes);
  barrier_at(barrier).bytes -= bytes;
  barrier_at(barrier).settle();
}

// They happen as late as they may.
template <int kBytes>
void copy_async(unsigned to, const void* from) {
  if (to % kBytes || reinterpret_cast<uintptr_t>(from) % kBytes) {
    std::fprintf(stderr, "a copy of %d bytes is not at a multiple of them\n", kBytes);
    std::abort();
  }
  emulated::block->copies[emulated::block->thread].back().push_back({at_address(to), from, kBytes});
}
inline void copy_commit() { emulated::block->copies[emulated::block->thread].emplace_back(); }
template <int kOpen>
void copy_wait() {
  auto& groups = emulated::block->copies[emulated::block->thread];
  for (; groups.size() > kOpen + 1; groups.erase(groups.begin())) {
    for (const emulated::Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, copy.bytes);
  }
}

inline void load_tiles(unsigned (&to)[4], unsigned row) {
  const int lane = emulated::block->thread % 32;
  const uint64_t* const rows = emulated::exchange({row});
  for (int tile = 0; tile < 4; ++tile) {
    const unsigned at = unsigned(rows[(tile * 8 + lane / 4) * 8]);
    if (at % 16) std::abort();
    std::memcpy(&to[tile], at_address(at) + lane % 4 * 4, 4);
  }
}

// mma.sync.m16n8k16: a lane has rows lane / 4 and 8 further down, columns or k 2 * (lane % 4) and 8 further on.
template <typename T>
void mma(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  const uint64_t* const all = emulated::exchange({a0, a1, a2, a3, b0, b1});
  const auto value = [](uint64_t word, int half) {
    const unsigned short bits = word >> (16 * half);
    T t;
    std::memcpy(&t, &bits, 2);
    return float(t);
  };
  const int lane = emulated::block->thread % 32;
  for (int j = 0; j < 4; ++j) {
    const int row = lane / 4, column = lane % 4 * 2 + j % 2;
    double sum = c[j];
    for (int k = 0; k < 16; ++k) {
      const int quarter = k % 8 / 2;
      const float a = value(all[(row * 4 + quarter) * 8 + (j / 2 + k / 8 * 2)], k % 2);
      const float b = value(all[(column * 4 + quarter) * 8 + 4 + k / 8], k % 2);
      sum += double(a) * b;
    }
    c[j] = float(sum);
  }
}

}  // namespace vllm
