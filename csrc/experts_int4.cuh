// The device side of experts_int4.cu: the products of a mixture of experts whose weights are int4 in groups, for as few
// choices an expert as decoding has.
//
// W is the 16-row operand of mma.sync, up to 8 choices of the same expert are its columns. A unit is 32 columns of W,
// 16 bytes of a row; the lanes of a quad take a word of it each, in the same unit of 8 rows, and 8 rows further down.
// Nibbles become bfloat16 where they lie: 0x4300 | q is 128 + q. What that adds to a unit's product, and its zero
// point, is a multiple of the sum of its x, which is one more product, with ones; and a group's scale multiplies the
// sum and not the elements. So an element takes less than two instructions, where the memory leaves time for three.
//
// Every warp fetches its own part of W, scales with it, all at once and before it looks at x: nobody waits for another
// warp before the sums. Several blocks share a multiprocessor, and while one waits another multiplies.
#pragma once

#include "hopper.cuh"

namespace vllm {
namespace experts {

using bf16 = __nv_bfloat16;

constexpr int kTile = 16;         // rows of W in a product
constexpr int kTogether = 8;      // choices in one
constexpr int kUnit = 32;         // columns of W
constexpr int kChunk = 4;         // units that are taken together
constexpr int kWarps = 8;         // of a block, but for the one that has a warp a choice
constexpr int kMostKeys = 16;     // experts a lane, when a warp chooses
constexpr int kMostChoices = 16;  // of a token

struct Matrix {                 // [experts, rows, columns]
  const unsigned char* words;   // int4, 8 neighbours of a row in a word
  const unsigned short* scale;  // bfloat16 [experts, rows, groups]
  const unsigned char* zero;    // the same; or null: 8
  int rows, columns, groups;
  int shared_chunks;  // chunks with the same scale, as a power of two
};

struct Choices {
  int top_k;
  unsigned inverse;  // 2^32 / top_k, rounded up
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

// How rows of w lie in shared memory: words, and scales and zero points where every unit has its own. Otherwise a chunk
// has one at most, which is read where it is. kColumns: of w, 0 where it is known at run time only.
template <int kColumns = 0>
struct Rows {
  int columns_, scales_, zeros_;
  __host__ __device__ explicit Rows(const Matrix& w)
      : columns_(w.columns),
        scales_(w.groups * kUnit == w.columns ? 2 : 0),
        zeros_(w.zero != nullptr && scales_ ? 1 : 0) {}
  __host__ __device__ int columns() const { return kColumns ? kColumns : columns_; }
  __host__ __device__ int words() const { return words_pitch(columns()); }
  __host__ __device__ int numbers() const {
    return columns() / kUnit + kChunk;
  }  // of a row; scales take two bytes each
  __host__ __device__ int bytes(int rows) const { return rows * (words() + (scales_ + zeros_) * numbers()); }
};

#if __CUDA_ARCH__ >= 900

// The token of a choice, of which there are less than 2^32 / top_k^2.
__device__ inline int token_of(int choice, const Choices& c) {
  return c.top_k == 1 ? choice : int(__umulhi(unsigned(choice), c.inverse));
}

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
    int most[kKeys];
#pragma unroll
    for (int i = 0; i < kKeys; ++i) most[i] = keys[i];
#pragma unroll
    for (int half = kKeys / 2; half > 0; half /= 2) {
#pragma unroll
      for (int i = 0; i < half; ++i) most[i] = max(most[i], most[i + half]);
    }
    const int best = __reduce_max_sync(0xffffffffu, most[0]);
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

// Calls f(chunk, the next one, whether there is one) for a warp's chunks: of 2 * kSplit neighbours two, a line of
// memory.
template <int kColumns, int kSplit, typename F>
__device__ inline void for_chunks(int warp, int chunks, F f) {
  constexpr int kStep = 2 * kSplit, kMine = kColumns / (kChunk * kUnit) / kSplit;
  if constexpr (kMine > 0) {
    static_assert(kColumns % (kChunk * kUnit * kStep) == 0, "");
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const auto of = [&](int j) { return 2 * warp + j / 2 * kStep + j % 2; };
      f(of(i), of(i + 1), i + 1 < kMine);
    }
  } else {
#pragma unroll 1
    for (int pair = 2 * warp; pair < chunks; pair += kStep) {
      f(pair, pair + 1 < chunks ? pair + 1 : pair + kStep, pair + 1 < chunks || pair + kStep < chunks);
      if (pair + 1 < chunks) f(pair + 1, pair + kStep, pair + kStep < chunks);
    }
  }
}

// Has a warp's chunks of kTiles tiles of w copied to shared memory. Tile i begins at row + i * stride of the matrix.
template <int kTiles, bool kZero, int kShare, int kColumns, int kSplit>
__device__ inline void fetch_tiles(unsigned to, const Rows<kColumns>& in, const Matrix& w, int64_t row, int stride,
                                   int warp) {
  const int lane = threadIdx.x % 32, bytes = in.columns() / 2, groups = in.columns() / kUnit;
  const unsigned char* const words = w.words + (row + lane / 4) * bytes + lane % 4 * 16;
  const unsigned words_to = to + lane / 4 * in.words() + lane % 4 * 16;
  const int64_t own = (row + (lane / kTile) * stride + lane % kTile) * groups;  // scales: a row a lane
  const unsigned scales_to = to + kTiles * kTile * in.words() + lane * 2 * in.numbers();
  const unsigned zeros_to = to + kTiles * kTile * (in.words() + 2 * in.numbers()) + lane * in.numbers();
  for_chunks<kColumns, kSplit>(warp, in.columns() / (kChunk * kUnit), [&](int chunk, int, bool) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        copy_async<16>(words_to + (i * kTile + half * 8) * in.words() + chunk * (kChunk * 16),
                       words + int64_t(i) * stride * bytes + half * 8 * bytes + chunk * (kChunk * 16));
      }
    }
    if (kShare == 1 && lane < kTiles * kTile) {
      copy_async<8>(scales_to + chunk * (2 * kChunk), w.scale + own + chunk * kChunk);
      if (kZero) copy_async<4>(zeros_to + chunk * kChunk, w.zero + own + chunk * kChunk);
    }
  });
  copy_commit();
}

// out[i] += tile i of W times x, for a warp's chunks, which fetch_tiles has asked for.
//   base: of the tiles in shared memory; row, stride: as for fetch_tiles
//   x: the lane's column, lane / 4, from its part of the first unit on; kOrdered: each eight of it in the order of the
//      nibbles, 0 4 1 5 2 6 3 7
// With one column all eight are the same.
template <int kTiles, bool kMany, bool kZero, int kShare, bool kOrdered, int kColumns, int kSplit>
__device__ inline void multiply_tiles(float (&out)[kTiles][4], const unsigned char* base, const Rows<kColumns>& in,
                                      const Matrix& w, int64_t row, int stride, const bf16* x, int warp) {
  constexpr int kGroups = kChunk / kShare;
  constexpr unsigned kOnes = 0x3f803f80u;
  const int lane = threadIdx.x % 32;
  const unsigned words = shared_address(base) + lane % 8 * in.words() + lane / 8 * 16;
  const unsigned char* const scales = base + kTiles * kTile * in.words() + lane / 4 * 2 * in.numbers();
  const unsigned char* const zeros = base + kTiles * kTile * (in.words() + 2 * in.numbers()) + lane / 4 * in.numbers();
  uint4 next[kChunk];
  const auto fetch = [&](int chunk) {
#pragma unroll
    for (int u = 0; u < kChunk; ++u) next[u] = *reinterpret_cast<const uint4*>(x + (chunk * kChunk + u) * kUnit);
  };
  if (2 * warp < in.columns() / (kChunk * kUnit)) fetch(2 * warp);
  copy_wait<0>();
  __syncwarp();
  for_chunks<kColumns, kSplit>(warp, in.columns() / (kChunk * kUnit), [&](int chunk, int after, bool more) {
    unsigned pairs[kChunk][4];  // x in the order of the nibbles: (0,4) (1,5) (2,6) (3,7)
    float sums[kGroups][4];     // of the lane's two columns, twice, times what every element has too much
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      float (&sum)[4] = sums[group];
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[j] = 0.f;
#pragma unroll
      for (int u = group * kShare; u < (group + 1) * kShare; ++u) {
        const uint4 v = next[u];
        if (kOrdered) {
          pairs[u][0] = v.x, pairs[u][1] = v.y, pairs[u][2] = v.z, pairs[u][3] = v.w;
        } else {
          pairs[u][0] = __byte_perm(v.x, v.z, 0x5410), pairs[u][1] = __byte_perm(v.x, v.z, 0x7632);
          pairs[u][2] = __byte_perm(v.y, v.w, 0x5410), pairs[u][3] = __byte_perm(v.y, v.w, 0x7632);
        }
        mma<bf16>(sum, kOnes, kOnes, kOnes, kOnes, pairs[u][0], pairs[u][1]);
        mma<bf16>(sum, kOnes, kOnes, kOnes, kOnes, pairs[u][2], pairs[u][3]);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[j] *= kZero ? -1.f : -136.f;
    }
    if (more) fetch(after);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      unsigned low[kChunk], high[kChunk];
      const unsigned at = words + tile * kTile * in.words() + chunk * (kChunk * 16);
      load_tiles(low, at), load_tiles(high, at + 8 * in.words());
      float scale[2][kGroups], zero[2][kGroups];  // of the low row and the high one; zero points and 128
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int in_all = tile * kTile + half * 8;
        if constexpr (kShare == 1) {
          const uint2 four = *reinterpret_cast<const uint2*>(scales + (in_all * in.numbers() + chunk * kChunk) * 2);
          scale[half][0] = __uint_as_float(four.x << 16), scale[half][1] = __uint_as_float(four.x & 0xffff0000u);
          scale[half][2] = __uint_as_float(four.y << 16), scale[half][3] = __uint_as_float(four.y & 0xffff0000u);
          if (kZero) {
            const unsigned z = *reinterpret_cast<const unsigned*>(zeros + in_all * in.numbers() + chunk * kChunk);
#pragma unroll
            for (int j = 0; j < kGroups; ++j) zero[half][j] = 128.f + float(z >> (8 * j) & 0xffu);
          }
        } else {
          const int64_t group =
              (row + int64_t(tile) * stride + half * 8 + lane / 4) * w.groups + (chunk >> w.shared_chunks);
          scale[half][0] = __uint_as_float(unsigned(w.scale[group]) << 16);
          if (kZero) zero[half][0] = 128.f + float(w.zero[group]);
        }
      }
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        float c[4], begin[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) begin[j] = kZero ? zero[j / 2][group] * sums[group][j] : sums[group][j];
#pragma unroll
        for (int u = group * kShare; u < (group + 1) * kShare; ++u) {
          const unsigned a = low[u], b = high[u];
          const float (&from)[4] = u == group * kShare ? begin : c;
          mma<bf16>(c, nibbles(a, 0), nibbles(b, 0), nibbles(a, 1), nibbles(b, 1), pairs[u][0], pairs[u][1], from[0],
                    from[1], from[2], from[3]);
          mma<bf16>(c, nibbles(a, 2), nibbles(b, 2), nibbles(a, 3), nibbles(b, 3), pairs[u][2], pairs[u][3]);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (kMany || j % 2 == 0) out[tile][j] += scale[j / 2][group] * c[j];
        }
      }
    }
  });
}

// Where element i of an eight is, in the order of the nibbles.
__device__ inline int ordered(int i) { return i % 4 * 2 + i / 4; }

__device__ inline float swiglu(float gate, float up) { return gate / (1.f + __expf(-gate)) * up; }

#endif

// h = silu(gate x) * up x, each eight in the order of the nibbles, for 16 rows of gate and of up (w's first and second
// half) and one choice, or a block of them. The warps share the columns. Blocks: x tiles, y choices or blocks.
template <bool kMany, bool kZero, int kShare, int kKeys, int kColumns>
__global__ void __launch_bounds__(kWarps * 32, 3)
    gate_up_kernel(bf16* h, const bf16* x, const __grid_constant__ Matrix w, const __grid_constant__ Choices choices) {
#if __CUDA_ARCH__ >= 900
  constexpr int kWide = kMany ? kTogether : 1, kOut = kTile * kWide;
  unsigned char* const memory = dynamic_memory();
  __shared__ __align__(16) float partial[kWarps * 2 * kOut];  // [warps, gate or up, rows, columns]
  __shared__ int picked;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = lane / 4, quarter = lane % 4;
  const int inner = w.rows / 2, first = blockIdx.x * kTile;
  const Rows<kColumns> in(w);
  wait_for_predecessor();
  let_successor_start();
  int expert, count = 1, choice = blockIdx.y;  // choice: of the lane's column
  if constexpr (kMany) {
    count = choices.block_rows[blockIdx.y];
    expert = choices.block_expert[blockIdx.y];
    const int own = choices.order[blockIdx.y * kTogether + row], another = choices.order[blockIdx.y * kTogether];
    if (count == 0) return;
    choice = row < count ? own : another;
  } else {
    if (warp == 0) {
      const int token = token_of(blockIdx.y, choices), k = blockIdx.y - token * choices.top_k;
      const int chosen = choose<kKeys>(choices.logits + int64_t(token) * choices.logits_row, choices.experts, k + 1);
      if (lane == k) {
        picked = chosen;
        if (blockIdx.x == 0) choices.chosen[blockIdx.y] = chosen;
      }
    }
    __syncthreads();
    expert = picked;
  }
  const int64_t begin = int64_t(expert) * w.rows + first;
  fetch_tiles<2, kZero, kShare, kColumns, kWarps>(shared_address(memory), in, w, begin, inner, warp);
  float sums[2][4] = {};
  multiply_tiles<2, kMany, kZero, kShare, false, kColumns, kWarps>(
      sums, memory, in, w, begin, inner, x + int64_t(token_of(choice, choices)) * in.columns() + quarter * 8, warp);

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
    const int64_t to = kMany ? choices.order[blockIdx.y * kTogether + column] : blockIdx.y;
    h[to * inner + first + out_row / 8 * 8 + ordered(out_row % 8)] = __float2bfloat16_rn(swiglu(gate, up));
  }
#endif
}

// y = the sum of one token's choices by their shares, and of the shared expert's part: 16 rows a block, a choice a
// warp. early: choose again from the logits, so that the weights are under way before h is written. add: to what is in
// y. Blocks: x tiles, y tokens.
template <bool kZero, int kShare, int kKeys, int kColumns>
__global__ void __launch_bounds__(kMostChoices * 32)
    down_token_kernel(bf16* y, const bf16* h, const __grid_constant__ Matrix w, const __grid_constant__ Choices choices,
                      const __grid_constant__ Shared shared, bool early, bool add) {
#if __CUDA_ARCH__ >= 900
  unsigned char* const memory = dynamic_memory();
  __shared__ float partial[kMostChoices * kTile], shares[kMostChoices];
  __shared__ int experts[kMostChoices];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = lane / 4, quarter = lane % 4;
  const int top_k = choices.top_k, token = blockIdx.y, first = blockIdx.x * kTile;
  const Rows<kColumns> in(w);
  const int shared_pitch = plain_pitch(shared.columns), shared_units = shared.columns / kUnit;
  unsigned char* const own = memory + warp * in.bytes(kTile);
  unsigned char* const shared_rows = memory + top_k * in.bytes(kTile);
  if (shared.w != nullptr) {  // each warp what it multiplies itself
    const unsigned to = shared_address(shared_rows);
    for (int unit = warp; unit < shared_units; unit += top_k) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int at = unit * (2 * kUnit) + quarter * 16;
        copy_async<16>(to + (8 * j + row) * shared_pitch + at,
                       shared.w + int64_t(first + 8 * j + row) * (2 * shared.columns) + at);
      }
    }
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
    if (lane < top_k) experts[lane] = expert;
    const float share = share_of(__ldcg(logits + expert), top_k);
    if (lane < top_k) shares[lane] = share;
  }
  __syncthreads();
  const int64_t begin = int64_t(experts[warp]) * w.rows + first;
  fetch_tiles<1, kZero, kShare, kColumns, 1>(shared_address(own), in, w, begin, 0, 0);
  if (early) {
    wait_for_predecessor();
    let_successor_start();
  }
  float sums[1][4] = {};
  multiply_tiles<1, false, kZero, kShare, true, kColumns, 1>(
      sums, own, in, w, begin, 0, h + int64_t(token * top_k + warp) * in.columns() + quarter * 8, 0);
  float low = shares[warp] * sums[0][0], high = shares[warp] * sums[0][2];
  y += int64_t(token) * w.rows + first;
  const bf16 old = add && threadIdx.x < kTile ? y[threadIdx.x] : bf16();
  if (shared.w != nullptr) {
    float c[4] = {};
    const unsigned char* const from = shared_rows + row * shared_pitch + quarter * 16;
    const bf16* const hidden = shared.x + int64_t(token) * shared.columns + quarter * 8;
    for (int unit = warp; unit < shared_units; unit += top_k) {
      const uint4 a = *reinterpret_cast<const uint4*>(from + unit * 64);
      const uint4 b = *reinterpret_cast<const uint4*>(from + 8 * shared_pitch + unit * 64);
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
template <bool kZero, int kShare, int kColumns>
__global__ void __launch_bounds__(kWarps * 32, 3)
    down_blocks_kernel(bf16* y, const bf16* h, const __grid_constant__ Matrix w,
                       const __grid_constant__ Choices choices) {
#if __CUDA_ARCH__ >= 900
  constexpr int kRows = kWarps * kTile;
  unsigned char* const memory = dynamic_memory();
  __shared__ __align__(16) bf16 results[kTogether * kRows];  // in this order neighbours are written together
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = lane / 4, quarter = lane % 4;
  const int first = blockIdx.x * kRows + warp * kTile;
  const Rows<kColumns> in(w);
  unsigned char* const own = memory + warp * in.bytes(kTile);
  // The lists were complete before gate_up began, and it has begun; only the L1 cache may not know it.
  const int count = __ldcg(choices.block_rows + blockIdx.y), expert = __ldcg(choices.block_expert + blockIdx.y);
  const int* const order = choices.order + blockIdx.y * kTogether;
  const int64_t mine = __ldcg(order + row), another = __ldcg(order);
  if (count == 0) return;
  const int64_t begin = int64_t(expert) * w.rows + first, choice = row < count ? mine : another;
  fetch_tiles<1, kZero, kShare, kColumns, 1>(shared_address(own), in, w, begin, 0, 0);
  wait_for_predecessor();
  let_successor_start();
  float sums[1][4] = {};
  multiply_tiles<1, true, kZero, kShare, true, kColumns, 1>(sums, own, in, w, begin, 0,
                                                            h + choice * in.columns() + quarter * 8, 0);
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
