// What kernels ask of the hardware by name (sm_90 and newer): overlapping launches, the copy engine and its barriers,
// tensor cores.
#ifndef VLLM_HOPPER_CUH
#define VLLM_HOPPER_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace vllm {

// Programmatic dependent launch (sm_90 and newer). A grid launched by launch() below may start while its predecessor
// still runs: it must call wait_for_predecessor() before it touches memory that another kernel writes, weights included
// (the predecessor may be the copy that loads them). let_successor_start() only lets the next grid take its place
// early; that grid waits in the same way, so it is always safe.
__device__ inline void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ inline void let_successor_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// x & mask | bits in one instruction: with two constants, ptxas makes it two.
__device__ inline unsigned mask_or(unsigned x, unsigned mask, unsigned bits) {
  unsigned y;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(y) : "r"(x), "r"(mask), "r"(bits));
  return y;
}

// The same of what x has not.
__device__ inline unsigned mask_not_or(unsigned x, unsigned mask, unsigned bits) {
  unsigned y;
  asm("lop3.b32 %0, %1, %2, %3, 0xAE;" : "=r"(y) : "r"(x), "r"(mask), "r"(bits));
  return y;
}

// The bits of a where mask has any, of b elsewhere.
__device__ inline unsigned choose_bits(unsigned mask, unsigned a, unsigned b) {
  unsigned y;
  asm("lop3.b32 %0, %1, %2, %3, 0xCA;" : "=r"(y) : "r"(mask), "r"(a), "r"(b));
  return y;
}

// Two bfloat16 at once.
__device__ inline unsigned sub2(unsigned a, unsigned b) {
  unsigned c;
  asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
}
__device__ inline unsigned mul2(unsigned a, unsigned b) {
  unsigned c;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
}
__device__ inline unsigned fma2(unsigned a, unsigned b, unsigned c) {
  unsigned d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// One half of x in both: for nothing where it is an operand of the above, which a permutation of bytes is not.
__device__ inline unsigned low_twice(unsigned x) {
  unsigned y;
  asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; mov.b32 %0, {low, low};}" : "=r"(y) : "r"(x));
  return y;
}
__device__ inline unsigned high_twice(unsigned x) {
  unsigned y;
  asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; mov.b32 %0, {high, high};}" : "=r"(y) : "r"(x));
  return y;
}

// Wait for the others of these threads of a block, which all know each other by this number (1 to 15).
__device__ inline void sync_threads(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// What the compiler has made of x before is no longer x's: it may not keep it in registers beside it.
__device__ inline void unmade(unsigned& x) { asm volatile("" : "+r"(x)); }

// Fetches a line of global memory towards the chip. Nobody has to wait for it.
__device__ inline void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Copies of a thread's own to shared memory, which go on while it does other things: 4, 8 or 16 bytes, at multiples of
// as many. They come in groups; the other threads that read what came have to meet this one after its wait.
template <int kBytes>
__device__ inline void copy_async(unsigned to, const void* from) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "");
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(kBytes) : "memory");
  }
}
__device__ inline void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// All groups but the latest kOpen are complete.
template <int kOpen>
__device__ inline void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kOpen) : "memory");
}

// Four tiles of 8 rows and 16 bytes from shared memory: lane l names row l % 8 of tile l / 8, and gets of each tile the
// word l % 4 of row l / 4.
__device__ inline void load_tiles(unsigned (&to)[4], unsigned row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row)
               : "memory");
}

// A block's shared memory beyond what kernels declare.
__device__ inline unsigned char* dynamic_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

// Barriers in shared memory that count arrivals and, for copies, bytes; a phase ends when both are complete.
// Shared memory is named by 32-bit addresses that the compiler must not compute again and again.
__device__ inline unsigned shared_address(const void* p) {
  unsigned address = unsigned(__cvta_generic_to_shared(p));
  asm volatile("" : "+r"(address));
  return address;
}
__device__ inline void barrier_init(unsigned barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ inline void barrier_arrive(unsigned barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
#if __CUDA_ARCH__ >= 900
// The barriers that a thread has just initialised are so for the copy engine too.
__device__ inline void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ inline void barrier_expect(unsigned barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ inline void barrier_wait(unsigned barrier, int phase) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::
          "r"(barrier),
      "r"(phase)
      : "memory");
}
__device__ inline void bulk_copy(unsigned to, const void* from, int bytes, unsigned barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}
template <typename T>
__device__ inline void mma(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                           unsigned b1) {
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}
#endif

}  // namespace vllm

#endif  // VLLM_HOPPER_CUH
