// The device side of experts_int4.cu: the products of a mixture of experts whose weights are int4 in groups, for as few
// choices an expert as decoding has.
//
// W is the 16-row operand of mma.sync, up to 8 choices of the same expert are its columns. A unit is 32 columns of W,
// 16 bytes of a row; the lanes of a quad take a word of it each, in the same unit of 8 rows, and 8 rows further down.
// Nibbles become bfloat16 where they lie: 0x4300 | q is 128 + q. What that adds to a unit's product, and its zero
// point, is a multiple of the sum of its x, which is one more product, with ones; and a group's scale multiplies the
// sum and not the elements. So an element takes less than two instructions, where the memory leaves time for three.
//
// Rows of W come through the copy engine, all of a block at once; scales and x each warp fetches for itself. Several
// blocks share a multiprocessor, and while one waits another multiplies.
#pragma once

#include "hopper.cuh"

namespace vllm {
namespace experts {

using bf16 = __nv_bfloat16;

constexpr int kTile = 16;         // rows of W in a product
constexpr int kColumns = 8;       // of choices in one
constexpr int kUnit = 32;         // columns of W
constexpr int kChunk = 4;         // units that are taken together
constexpr int kWarps = 8;         // of a block, but for the one that has a warp a choice
constexpr int kMostKeys = 16;     // experts a lane, when a warp chooses
constexpr int kMostChoices = 16;  // of a token

struct Matrix {                // [experts, rows, columns]
  const unsigned char* words;  // int4, 8 neighbours of a row in a word
  const void* scale;           // [experts, rows, groups]
  const unsigned char* zero;   // the same; or null: 8
  int rows, columns, groups;
  int shared_chunks;  // chunks with the same scale, as a power of two
  int scale_type;     // 0: bfloat16, 1: float16, 2: float32
};

struct Choices {
  int top_k;
  // for each token: its choices are the best of its logits [experts], and are written down
  const float* logits;
  int experts, logits_row;
  int* chosen;
  // or in blocks of up to 8 choices of one expert, as ops/route.py lays them out
  const int *order, *block_expert, *block_rows;
};

struct Shared {            // the expert of all tokens: w [rows, columns] of what it has made of x [tokens, columns]
  const unsigned char* w;  // bfloat16; or null: there is none
  const bf16* x;
  int columns;
};

// Pitches of rows in shared memory, in bytes: rows that a warp reads at once lie in different banks.
__host__ __device__ inline int words_pitch(int columns) { return columns / 2 + 16; }
__host__ __device__ inline int plain_pitch(int columns) { return columns * 2 + 64; }

#if __CUDA_ARCH__ >= 900

// The choices of a token are the largest keys: logits rounded to an order of integers, and experts counted down.
__device__ inline int key_of(float logit, int expert, int low) {
  const int bits = __float_as_int(logit);
  return ((bits ^ (bits >> 31 & 0x7fffffff)) & ~low) | (low - expert);
}

// A warp chooses: lane k gets choice k < top_k.
template <int kKeys>
__device__ int choose(const float* logits, int experts, int top_k) {
  const int lane = threadIdx.x % 32, low = (1 << (32 - __clz(experts - 1))) - 1;
  int keys[kKeys], mine = 0;
#pragma unroll
  for (int i = 0; i < kKeys; ++i) {
    const int e = lane + 32 * i;
    keys[i] = e < experts ? key_of(__ldcg(logits + e), e, low) : INT32_MIN;
  }
  for (int k = 0; k < top_k; ++k) {
    int best = keys[0];
#pragma unroll
    for (int i = 1; i < kKeys; ++i) best = max(best, keys[i]);
    best = __reduce_max_sync(0xffffffffu, best);
#pragma unroll
    for (int i = 0; i < kKeys; ++i) keys[i] = keys[i] == best ? INT32_MIN : keys[i];
    if (lane == k) mine = low - (best & low);
  }
  return mine;
}

// The share of choice k in its token, by lane: softmax over the chosen logits.
__device__ inline float share_of(float logit, int top_k) {
  const int lane = threadIdx.x % 32;
  float most = lane < top_k ? logit : -INFINITY;
  for (int step = 16; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, step));
  const float share = lane < top_k ? __expf(logit - most) : 0.f;
  float sum = share;
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  return share / sum;
}

__device__ inline unsigned nibbles(unsigned word, int i) { return mask_or(word >> (4 * i), 0x000f000fu, 0x43004300u); }

__device__ inline float read_scale(const void* scale, int64_t at, int type) {
  if (type == 2) return static_cast<const float*>(scale)[at];
  const unsigned short bits = static_cast<const unsigned short*>(scale)[at];
  return type == 1 ? __half2float(__ushort_as_half(bits)) : __uint_as_float(unsigned(bits) << 16);
}

template <int kCount>
__device__ inline void load_floats(float (&to)[kCount], const float* from) {
  if constexpr (kCount == 4) {
    const float4 v = *reinterpret_cast<const float4*>(from);
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
  } else {
    to[0] = *from;
  }
}

// What a lane fetches of one chunk ahead: its part of x, and the scales and zero points of one row.
template <bool kZero, int kShare>
struct Fetched {
  static constexpr int kGroups = kChunk / kShare;
  uint4 x[kChunk];
  float scale[kGroups], zero[kGroups];

  __device__ void fetch(const bf16* my_x, const Matrix& w, int64_t row, int chunk) {
#pragma unroll
    for (int u = 0; u < kChunk; ++u) {
      x[u] = *reinterpret_cast<const uint4*>(my_x + (chunk * kChunk + u) * kUnit);
    }
    const int64_t at = row * w.groups + (kShare == 1 ? chunk * kChunk : chunk >> w.shared_chunks);
    if (kShare == 1 && w.scale_type == 0) {
      const uint2 four = *reinterpret_cast<const uint2*>(static_cast<const unsigned short*>(w.scale) + at);
      const unsigned twos[2] = {four.x, four.y};
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
        scale[j] = __uint_as_float(j % 2 == 0 ? twos[j / 2] << 16 : twos[j / 2] & 0xffff0000u);
      }
    } else {
#pragma unroll
      for (int j = 0; j < kGroups; ++j) scale[j] = read_scale(w.scale, at + j, w.scale_type);
    }
#pragma unroll
    for (int j = 0; j < kGroups; ++j) zero[j] = -128.f - (kZero ? float(w.zero[at + j]) : 8.f);
  }
};

// out[i] += tile i of W times x, a warp's part of the columns: every `step`th chunk from `first` on.
//   words: of the first tile's first row in shared memory, which `full` tells to be there; tiles follow each other
//   row: in the matrix, of the lane's scales: row lane of the tiles
//   x: the lane's column, lane / 4, from its part of the first unit on
//   slot: [kTiles * 16, 4] floats of this warp's own, twice that with zero points
// With one column all eight are the same.
template <int kTiles, bool kMany, bool kZero, int kShare>
__device__ inline void multiply_tiles(float (&out)[kTiles][4], const unsigned char* words, const Matrix& w, int64_t row,
                                      const bf16* x, float* slot, int first, int step, unsigned full) {
  constexpr int kGroups = kChunk / kShare, kSlot = kTiles * kTile * 4;
  constexpr unsigned kOnes = 0x3f803f80u;
  const int lane = threadIdx.x % 32, pitch = words_pitch(w.columns), chunks = w.columns / (kChunk * kUnit);
  const bool has_row = lane < kTiles * kTile;
  words += lane / 4 * pitch + lane % 4 * 4;
  float* const to = slot + lane * 4;
  const float* const from = slot + lane / 4 * 4;
  Fetched<kZero, kShare> next;
  if (first < chunks) next.fetch(x, w, row, first);
  barrier_wait(full, 0);
#pragma unroll 1
  for (int chunk = first; chunk < chunks; chunk += step) {
    unsigned pairs[kChunk][4];  // x in the order of the nibbles: (0,4) (1,5) (2,6) (3,7)
    float sums[kChunk][4];      // of the lane's two columns, twice
#pragma unroll
    for (int u = 0; u < kChunk; ++u) {
      const uint4 v = next.x[u];
      pairs[u][0] = __byte_perm(v.x, v.z, 0x5410), pairs[u][1] = __byte_perm(v.x, v.z, 0x7632);
      pairs[u][2] = __byte_perm(v.y, v.w, 0x5410), pairs[u][3] = __byte_perm(v.y, v.w, 0x7632);
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[u][j] = 0.f;
      mma<bf16>(sums[u], kOnes, kOnes, kOnes, kOnes, pairs[u][0], pairs[u][1]);
      mma<bf16>(sums[u], kOnes, kOnes, kOnes, kOnes, pairs[u][2], pairs[u][3]);
    }
    __syncwarp();  // all have read the slot's last chunk
    if (has_row) {
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
        to[j] = next.scale[j];
        if (kZero) to[kSlot + j] = next.zero[j];
      }
    }
    __syncwarp();
    if (chunk + step < chunks) next.fetch(x, w, row, chunk + step);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const unsigned char* const low = words + i * kTile * pitch + chunk * (kChunk * 16);
      const unsigned char* const high = low + 8 * pitch;
      float scale_low[kGroups], scale_high[kGroups], zero_low[kGroups], zero_high[kGroups];
      load_floats(scale_low, from + i * kTile * 4), load_floats(scale_high, from + (i * kTile + 8) * 4);
      if constexpr (kZero) {
        load_floats(zero_low, from + kSlot + i * kTile * 4), load_floats(zero_high, from + kSlot + (i * kTile + 8) * 4);
      }
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        float c[4] = {0.f, 0.f, 0.f, 0.f}, sum[2] = {0.f, 0.f};
#pragma unroll
        for (int u = group * kShare; u < (group + 1) * kShare; ++u) {
          const unsigned a = *reinterpret_cast<const unsigned*>(low + u * 16);
          const unsigned b = *reinterpret_cast<const unsigned*>(high + u * 16);
          mma<bf16>(c, nibbles(a, 0), nibbles(b, 0), nibbles(a, 1), nibbles(b, 1), pairs[u][0], pairs[u][1]);
          mma<bf16>(c, nibbles(a, 2), nibbles(b, 2), nibbles(a, 3), nibbles(b, 3), pairs[u][2], pairs[u][3]);
#pragma unroll
          for (int j = 0; j < 2; ++j) sum[j] = u == group * kShare ? sums[u][j] : sum[j] + sums[u][j];
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (!kMany && j % 2 == 1) continue;
          const float zero = !kZero ? -136.f : j < 2 ? zero_low[group] : zero_high[group];
          out[i][j] += (j < 2 ? scale_low[group] : scale_high[group]) * (c[j] + zero * sum[j % 2]);
        }
      }
    }
  }
}

__device__ inline float swiglu(float gate, float up) { return gate / (1.f + __expf(-gate)) * up; }

#endif

// h = silu(gate x) * up x for 16 rows of gate and of up (w's first and second half) and one choice, or a block of them.
// The warps share the columns. Blocks: x tiles, y choices or blocks.
template <bool kMany, bool kZero, int kShare, int kKeys>
__global__ void __launch_bounds__(kWarps * 32)
    gate_up_kernel(bf16* h, const bf16* x, const __grid_constant__ Matrix w, const __grid_constant__ Choices choices) {
#if __CUDA_ARCH__ >= 900
  constexpr int kRows = 2 * kTile, kSlot = kRows * 4 * (kZero ? 2 : 1);
  constexpr int kWide = kMany ? kColumns : 1, kOut = kTile * kWide;
  unsigned char* const memory = dynamic_memory();
  __shared__ uint64_t full;
  __shared__ int picked;
  __shared__ __align__(16) float slots[kWarps * kSlot],
      partial[kWarps * 2 * kOut];  // [warps, gate or up, rows, columns]
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = lane / 4, quarter = lane % 4;
  const int inner = w.rows / 2, first = blockIdx.x * kTile;
  const unsigned full_at = shared_address(&full);
  if (threadIdx.x == 0) {
    barrier_init(full_at, 1);
    barrier_init_done();
  }
  wait_for_predecessor();
  let_successor_start();
  const int token = blockIdx.y / choices.top_k, k = blockIdx.y - token * choices.top_k;
  if constexpr (!kMany) {
    if (warp == 0) {
      const int mine = choose<kKeys>(choices.logits + int64_t(token) * choices.logits_row, choices.experts, k + 1);
      if (lane == k) {
        picked = mine;
        if (blockIdx.x == 0) choices.chosen[blockIdx.y] = mine;
      }
    }
  }
  const int count = kMany ? choices.block_rows[blockIdx.y] : 1;
  if (count == 0) return;
  __syncthreads();
  const int expert = kMany ? choices.block_expert[blockIdx.y] : picked;
  const auto choice_of = [&](int i) { return kMany ? choices.order[blockIdx.y * kColumns + i] : int(blockIdx.y); };
  const int64_t my_row = int64_t(expert) * w.rows + first + (lane < kTile ? lane : inner + lane - kTile);
  if (warp == 0) {
    const int bytes = w.columns / 2;
    if (lane == 0) barrier_expect(full_at, kRows * bytes);
    __syncwarp();
    bulk_copy(shared_address(memory) + lane * words_pitch(w.columns), w.words + my_row * bytes, bytes, full_at);
  }
  const int my_token = kMany ? choice_of(row < count ? row : 0) / choices.top_k : token;
  float sums[2][4] = {};
  multiply_tiles<2, kMany, kZero, kShare>(sums, memory, w, my_row, x + int64_t(my_token) * w.columns + quarter * 8,
                                          slots + warp * kSlot, warp, kWarps, full_at);

  float* const mine = partial + warp * (2 * kOut) + row * kWide + (kMany ? 2 * quarter : 0);
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // gate or up, rows 0 or 8 further down
    const float* const two = sums[i / 2] + i % 2 * 2;
    float* const to = mine + i / 2 * kOut + i % 2 * 8 * kWide;
    if constexpr (kMany) {
      *reinterpret_cast<float2*>(to) = make_float2(two[0], two[1]);
    } else if (quarter == 0) {
      *to = two[0];
    }
  }
  __syncthreads();
  const int i = threadIdx.x, column = i / kTile, out_row = i % kTile;
  if (i < kOut && column < count) {
    float gate = 0.f, up = 0.f;
#pragma unroll
    for (int j = 0; j < kWarps; ++j) {
      const float* const from = partial + j * (2 * kOut) + out_row * kWide + column;
      gate += from[0], up += from[kOut];
    }
    h[int64_t(choice_of(column)) * inner + first + out_row] = __float2bfloat16_rn(swiglu(gate, up));
  }
#endif
}

// y = the sum of one token's choices by their shares, and of the shared expert's part: 16 rows a block, a choice a
// warp. early: choose again from the logits, so that the weights are under way before h is written. add: to what is in
// y. Blocks: x tiles, y tokens.
template <bool kZero, int kShare, int kKeys>
__global__ void __launch_bounds__(kMostChoices * 32)
    down_token_kernel(bf16* y, const bf16* h, const __grid_constant__ Matrix w, const __grid_constant__ Choices choices,
                      const __grid_constant__ Shared shared, bool early, bool add) {
#if __CUDA_ARCH__ >= 900
  constexpr int kSlot = kTile * 4 * (kZero ? 2 : 1);
  unsigned char* const memory = dynamic_memory();
  __shared__ uint64_t full[kMostChoices + 1];  // a warp's rows each; the shared expert's
  __shared__ int experts[kMostChoices];
  __shared__ float shares[kMostChoices];
  __shared__ __align__(16) float slots[kMostChoices * kSlot], partial[kMostChoices * kTile];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = lane / 4, quarter = lane % 4;
  const int top_k = choices.top_k, token = blockIdx.y, first = blockIdx.x * kTile;
  const unsigned full_at = shared_address(full) + 8 * warp, shared_full_at = shared_address(full) + 8 * top_k;
  const int pitch = words_pitch(w.columns), bytes = w.columns / 2, shared_pitch = plain_pitch(shared.columns);
  unsigned char* const own = memory + warp * kTile * pitch;
  unsigned char* const shared_rows = memory + top_k * kTile * pitch;
  if (threadIdx.x == 0) {
    for (int i = 0; i <= top_k; ++i) barrier_init(shared_address(full) + 8 * i, 1);
    barrier_init_done();
  }
  if (!early) {
    wait_for_predecessor();
    let_successor_start();
  }
  const float* const logits = choices.logits + int64_t(token) * choices.logits_row;
  if (warp == 0) {
    int expert = 0;
    if (early) {
      expert = choose<kKeys>(logits, choices.experts, top_k);
    } else if (lane < top_k) {
      expert = choices.chosen[token * top_k + lane];
    }
    const float share = share_of(__ldcg(logits + expert), top_k);
    if (lane < top_k) experts[lane] = expert, shares[lane] = share;
  }
  __syncthreads();
  const int64_t my_row = int64_t(experts[warp]) * w.rows + first + lane % kTile;
  if (lane == 0) barrier_expect(full_at, kTile * bytes);
  __syncwarp();
  if (lane < kTile) bulk_copy(shared_address(own) + lane * pitch, w.words + my_row * bytes, bytes, full_at);
  if (warp == 0 && shared.w != nullptr) {
    const int shared_bytes = shared.columns * 2;
    if (lane == 0) barrier_expect(shared_full_at, kTile * shared_bytes);
    __syncwarp();
    if (lane < kTile) {
      bulk_copy(shared_address(shared_rows) + lane * shared_pitch, shared.w + int64_t(first + lane) * shared_bytes,
                shared_bytes, shared_full_at);
    }
  }
  if (early) {
    wait_for_predecessor();
    let_successor_start();
  }
  float sums[1][4] = {};
  multiply_tiles<1, false, kZero, kShare>(sums, own, w, my_row,
                                          h + int64_t(token * top_k + warp) * w.columns + quarter * 8,
                                          slots + warp * kSlot, 0, 1, full_at);
  float low = shares[warp] * sums[0][0], high = shares[warp] * sums[0][2];
  y += int64_t(token) * w.rows + first;
  const bf16 old = add && threadIdx.x < kTile ? y[threadIdx.x] : bf16();
  if (shared.w != nullptr) {
    float c[4] = {};
    barrier_wait(shared_full_at, 0);
    const unsigned char* const rows = shared_rows + row * shared_pitch + quarter * 16;
    const bf16* const hidden = shared.x + int64_t(token) * shared.columns + quarter * 8;
    for (int unit = warp; unit < shared.columns / kUnit; unit += top_k) {
      const uint4 a = *reinterpret_cast<const uint4*>(rows + unit * 64);
      const uint4 b = *reinterpret_cast<const uint4*>(rows + 8 * shared_pitch + unit * 64);
      const uint4 v = *reinterpret_cast<const uint4*>(hidden + unit * kUnit);
      mma<bf16>(c, a.x, b.x, a.y, b.y, v.x, v.y);
      mma<bf16>(c, a.z, b.z, a.w, b.w, v.z, v.w);
    }
    const float gate = 1.f / (1.f + __expf(-__ldcg(logits + choices.experts)));
    low += gate * c[0], high += gate * c[2];
  }
  if (quarter == 0) partial[warp * kTile + row] = low, partial[warp * kTile + row + 8] = high;
  __syncthreads();
  if (threadIdx.x < kTile) {
    float sum = 0.f;
    for (int j = 0; j < top_k; ++j) sum += partial[j * kTile + threadIdx.x];
    const bf16 result = __float2bfloat16_rn(sum);
    y[threadIdx.x] = add ? __float2bfloat16_rn(__bfloat162float(result) + __bfloat162float(old)) : result;
  }
#endif
}

// y = down h for every choice of a block of them, 16 rows a warp. Blocks: x 128 rows, y blocks.
template <bool kZero, int kShare>
__global__ void __launch_bounds__(kWarps * 32)
    down_blocks_kernel(bf16* y, const bf16* h, const __grid_constant__ Matrix w,
                       const __grid_constant__ Choices choices) {
#if __CUDA_ARCH__ >= 900
  constexpr int kSlot = kTile * 4 * (kZero ? 2 : 1), kRows = kWarps * kTile;
  unsigned char* const memory = dynamic_memory();
  __shared__ uint64_t full[kWarps];
  __shared__ __align__(16) float slots[kWarps * kSlot];
  __shared__ __align__(16) bf16 results[kColumns * kRows];  // in this order neighbours are written together
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = lane / 4, quarter = lane % 4;
  const int first = blockIdx.x * kRows + warp * kTile, pitch = words_pitch(w.columns), bytes = w.columns / 2;
  const unsigned full_at = shared_address(full) + 8 * warp;
  unsigned char* const own = memory + warp * kTile * pitch;
  // The lists were complete before gate_up began, and it has begun; only the L1 cache may not know it.
  const int expert = __ldcg(choices.block_expert + blockIdx.y), count = __ldcg(choices.block_rows + blockIdx.y);
  if (count == 0) return;
  const int64_t my_row = int64_t(expert) * w.rows + first + lane % kTile;
  if (lane == 0) {
    barrier_init(full_at, 1);
    barrier_init_done();
    barrier_expect(full_at, kTile * bytes);
  }
  __syncwarp();
  if (lane < kTile) bulk_copy(shared_address(own) + lane * pitch, w.words + my_row * bytes, bytes, full_at);
  wait_for_predecessor();
  let_successor_start();
  const int* const order = choices.order + blockIdx.y * kColumns;
  const int64_t choice = order[row < count ? row : 0];
  float sums[1][4] = {};
  multiply_tiles<1, true, kZero, kShare>(sums, own, w, my_row, h + choice * w.columns + quarter * 8,
                                         slots + warp * kSlot, 0, 1, full_at);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    results[(2 * quarter + j % 2) * kRows + warp * kTile + row + j / 2 * 8] = __float2bfloat16_rn(sums[0][j]);
  }
  __syncwarp();
  if (row < count) {
    *reinterpret_cast<uint2*>(y + choice * w.rows + first + quarter * 4) =
        *reinterpret_cast<const uint2*>(results + row * kRows + warp * kTile + quarter * 4);
  }
#endif
}

}  // namespace experts
}  // namespace vllm
