// The device side of experts_w4.cu: a mixture of experts with weights of 4 bits for up to 64 tokens, in two launches
// that take as long as the chosen experts' weights take to arrive.
//
// Every block chooses for all tokens by itself and lists the chosen experts, each with up to 8 of its tokens, which are
// the columns of a product (quantised_tiles.cuh). Then it stays and walks over tiles of their weights, with copies
// under way into rings as in quantised_gemm.cuh.
//
//   gate_up  a block takes a run of tiles of 16 rows of gate and the same of up, and each of its eight warps an eighth
//            of their columns. h comes out by list and column, each eight in the order in which down takes it.
//   down     a block has 16 rows of every expert's matrix and each warp has experts of its own. So all that a token
//            gets is added up in one block, in the same order every time, and y is written once.
#pragma once

#include "expert_lists.cuh"
#include "quantised_tiles.cuh"

namespace vllm {
namespace experts {

using namespace quantised;

constexpr int kMostDownWarps = 16;
constexpr int kStages = 4, kFew = 3;  // of a warp's ring: as many, or where there is no room for them, so few

// Of matrices [experts, rows, columns]: int4 with bfloat16 scales [experts, rows, groups], or fp4 with scales of 8 bits
// in groups of 16, of which two count as one here as they do for quantised_tiles.cuh.
struct Stack {
  const unsigned char *w, *scale, *zero;  // int4's zero points of 8 bits, or null: 8
  const float* row_scale;                 // fp4's factors [experts, rows], or null: 1
  int rows, row_bytes, groups;
  int shared_chunks;  // chunks that share a scale, as a power of two
  bool floats;        // fp4
};

// The expert of all tokens: w [rows, columns] of what it has made of x [tokens, columns].
struct Shared {
  const bf16* w;  // or, where `scale` is not null, fp4
  const bf16* x;
  const unsigned char* scale;  // [rows, columns / 16]
  const float* row_scale;      // [rows], or null: 1
  int columns;                 // 0: there is none
};

#if __CUDA_ARCH__ >= 900

// Has chunks of tiles of a stack copied into a warp's ring, in the layout of quantised_tiles.cuh. A tile's sixteens of
// rows are `stride` rows apart. K: its Kind.
template <typename K>
struct Fetcher {
  const Stack& w;
  int lane, begin, mine, stride;  // the warp's first chunk of each tile, and how many
  int left, turn;                 // chunks still to be asked for; of the tile, asked for
  const unsigned char *rows, *scales, *zeros;
  unsigned piece_at, scale_at, zero_at;  // bytes in a stage

  __device__ Fetcher(const Stack& w, int lane, int begin, int mine, int stride, int tiles)
      : w(w), lane(lane), begin(begin), mine(mine), stride(stride), left(tiles * mine), turn(mine) {
    piece_at = lane / 4 * kPitch + lane % 4 * 16;
    scale_at = K::kRows * kPitch + lane * K::kScaleSlot;
    zero_at = K::kRows * (kPitch + K::kScaleSlot) + lane * K::kZeroSlot;
    unmade(piece_at), unmade(scale_at), unmade(zero_at);
    rows = scales = zeros = nullptr;
  }

  // next_row: of the stack, where the next tile begins.
  template <typename NextRow>
  __device__ void ask(unsigned to, NextRow next_row) {
    if (left > 0) {
      if (turn == mine) {
        const int64_t row = next_row(), own = row + lane / kTile * stride + lane % kTile;
        rows = w.w + (row + lane / 4) * w.row_bytes + begin * kChunk + lane % 4 * 16;
        scales = w.scale + own * w.groups * 2;
        if (K::kZero) zeros = w.zero + own * w.groups;
        turn = 0;
      }
      const int eight = 8 * w.row_bytes, sixteen = stride * w.row_bytes;
#pragma unroll
      for (int i = 0; i < 2 * K::kTall; ++i) {
        copy_async<16>(to + piece_at + i * 8 * kPitch, rows + (i / 2 * sixteen + i % 2 * eight));
      }
      if (lane < K::kRows) {
        const int group = K::kGroups > 1 ? (begin + turn) * K::kGroups : (begin + turn) >> w.shared_chunks;
        copy_slot<K::kScaleSlot>(to + scale_at, scales + group * 2);
        if constexpr (K::kZero) copy_slot<K::kZeroSlot>(to + zero_at, zeros + group);
      }
      rows += kChunk;
      ++turn, --left;
    }
    copy_commit();
  }

  template <int kBytes>
  static __device__ void copy_slot(unsigned to, const unsigned char* from) {  // at a multiple of 4, where there is one
    copy_async<kBytes>(
        to, K::kGroups > 1 ? from
                           : reinterpret_cast<const unsigned char*>(reinterpret_cast<uintptr_t>(from) & ~uintptr_t{3}));
  }

  // Of the tile that begins at this row.
  __device__ ScaleRows<K> scale_rows(int64_t row) const {
    ScaleRows<K> own{};
    if constexpr (K::kGroups == 1) {
#pragma unroll
      for (int i = 0; i < 2 * K::kTall; ++i) {
        const int64_t at = (row + i / 2 * stride + i % 2 * 8 + lane / 4) * w.groups;
        own.scale[i] = int(reinterpret_cast<uintptr_t>(w.scale)) + int(at * 2);
        if (K::kZero) own.zero[i] = int(reinterpret_cast<uintptr_t>(w.zero)) + int(at);
      }
    }
    return own;
  }
};

// A warp's ring of as many stages as there is room for, and the way round it.
template <typename K>
struct Ring {
  unsigned char* memory;
  unsigned at, words;       // shared addresses of the ring, and of what the lane names to load_tiles in the first stage
  int last, stage, before;  // bytes: where the last stage is, that of the next chunk to come, and of the one before

  __device__ Ring(unsigned char* memory, int stages, int lane) : memory(memory), at(shared_address(memory)) {
    last = before = (stages - 1) * K::kStage, stage = 0;
    words = at + lane % 16 * kPitch + lane / 16 * 16;
    unmade(words);
  }
  template <typename Ask>
  __device__ void fill(Ask ask) {
    for (int i = 0; i < last; i += K::kStage) ask(at + i);
  }
  // Waits for the next chunk.
  __device__ void arrive() {
    if (last == (kStages - 1) * K::kStage) {
      copy_wait<kStages - 2>();
    } else {
      copy_wait<kFew - 2>();
    }
    __syncwarp();
  }
  // Asks for a chunk in place of the one before.
  template <typename Ask>
  __device__ void refill(Ask ask) const {
    ask(at + before);
  }
  __device__ const unsigned char* scales(int lane) const {
    return memory + stage + K::kRows * kPitch + lane / 4 * K::kScaleSlot;
  }
  __device__ const unsigned char* zeros(int lane) const {
    return memory + stage + K::kRows * (kPitch + K::kScaleSlot) + lane / 4 * K::kZeroSlot;
  }
  __device__ void leave() {
    before = stage;
    stage = stage == last ? 0 : stage + K::kStage;
  }
};

// In all of a product's operand: what sums of x are multiplied with.
template <typename K>
__device__ inline void fill_factor(unsigned (&factor)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    factor[i] = K::kZero ? 0x3f803f80u : 0xc308c308u;  // 1 or -136
    unmade(factor[i]);                                 // or each product would get a copy of its own
  }
}

// Where element i of an eight is, in the order of the pairs.
__device__ inline int ordered(int i) { return i % 4 * 2 + i / 4; }

__device__ inline float sigmoid(float x) { return 1.f / (1.f + __expf(-x)); }

// What the sum of a row's products with fp4 elements is still to be multiplied with.
__device__ inline float row_factor(const float* row_scale, int64_t row) {
  return sums_larger(Format::kFp4) * (row_scale == nullptr ? 1.f : row_scale[row]);
}

// The same for a lane's sums of a product, of this row and the one 8 further down.
struct RowFactors {
  float upper, lower;

  __device__ RowFactors(const float* row_scale, int64_t row)
      : upper(row_factor(row_scale, row)), lower(row_factor(row_scale, row + 8)) {}
  __device__ void multiply(float (&c)[4]) const { c[0] *= upper, c[1] *= upper, c[2] *= lower, c[3] *= lower; }
};

// c += eight columns a lane of fp4 w times v: from element `at` on, and `below` elements further. K: of fp4.
template <typename K>
__device__ inline void multiply_fp4(float (&c)[4], const unsigned char* w, const unsigned char* scale, int64_t at,
                                    int below, const uint4& v) {
  const unsigned words[4] = {v.x, v.y, v.z, v.w};
  unsigned x[4], a[2][4];
  in_order<K>(x, words);
#pragma unroll
  for (int half = 0; half < 2; ++half, at += below) {
    const unsigned word = *reinterpret_cast<const unsigned*>(w + at / 2);
    const unsigned factor = low_twice(large_scales(scale[at / 16], 0));
#pragma unroll
    for (int i = 0; i < 4; ++i) a[half][i] = mul2(pair<Format::kFp4>(word, i), factor);
  }
  mma<bf16>(c, a[0][0], a[1][0], a[0][1], a[1][1], x[0], x[1]);
  mma<bf16>(c, a[0][2], a[1][2], a[0][3], a[1][3], x[2], x[3]);
}

#endif

template <typename K>
constexpr int kSumBytes = 2 * K::kTileSums * 4;  // of two tiles

// h = silu(gate x) * up x; w's rows are gate's, then up's. h: [lists * 8, rows / 2]. K: two sixteens of rows.
template <typename K, int kKeys>
__global__ void __launch_bounds__(kWarps * 32, 2)
    gate_up_kernel(bf16* h, const bf16* x, const __grid_constant__ Stack w, const __grid_constant__ Routing r,
                   int stages) {
#if __CUDA_ARCH__ >= 900
  static_assert(K::kTall == 2 && K::kWide == 1, "");
  const int lane = threadIdx.x % 32, row = lane / 4, quarter = lane % 4;
  const int warp = __shfl_sync(0xffffffffu, int(threadIdx.x / 32), 0);  // the compiler should know it for the same
  unsigned char* const memory = dynamic_memory();
  float* const all_sums = reinterpret_cast<float*>(memory);
  Lists lists(memory + kSumBytes<K>, r.most_lists, false);
  unsigned char* const rings = memory + kSumBytes<K> + Lists::bytes(r.most_lists, false);
  wait_for_predecessor();
  let_successor_start();
  make_lists<kKeys, false>(lists, *reinterpret_cast<Scratch*>(rings), r);

  const int inner = w.rows / 2, tiles = inner / kTile, chunks = w.row_bytes / kChunk;
  const int first = int64_t(lists.count) * tiles * blockIdx.x / gridDim.x;
  const int end = int64_t(lists.count) * tiles * (blockIdx.x + 1) / gridDim.x;
  const int begin = chunks * warp / kWarps, mine = chunks * (warp + 1) / kWarps - begin;
  int list = first / tiles, tile = first - list * tiles, next_list = list, next_tile = tile;
  Fetcher<K> fetcher(w, lane, begin, mine, inner, end - first);
  const auto ask = [&](unsigned to) {
    fetcher.ask(to, [&] {
      const int64_t at = int64_t(lists.expert[next_list]) * w.rows + next_tile * kTile;
      if (++next_tile == tiles) next_tile = 0, ++next_list;
      return at;
    });
  };
  Ring<K> ring(rings + warp * (stages * K::kStage), stages, lane);
  ring.fill(ask);

  constexpr int kKept = K::kKeep > 0 ? K::kKeep : 1;
  using X = Part<K>;
  X kept[kKept][1];
  const bf16* from = x;
  for (int job = first; job < end; ++job) {
    const int tokens = lists.tokens[list];
    if (job == first || tile == 0) {
      from = x + int64_t(lists.token[list * kColumns + min(row, tokens - 1)]) * (2 * w.row_bytes) + quarter * 8;
      if constexpr (K::kKeep > 0) {
        Raw<K> raw[kKept];
        unsigned factor[4];
        fill_factor<K>(factor);
#pragma unroll
        for (int i = 0; i < kKept; ++i) {
          if (i < mine) raw[i].template load<4>(from, begin + i, 0);
        }
#pragma unroll
        for (int i = 0; i < kKept; ++i) {
#pragma unroll
          for (int step = 0; i < mine && step < 4; step += X::kSpan) kept[i][0].prepare(raw[i], step, factor);
        }
      }
    }
    const int64_t row_of_gate = int64_t(lists.expert[list]) * w.rows + tile * kTile;
    const ScaleRows<K> own = fetcher.scale_rows(row_of_gate);
    float factor_of_sum = 1.f;
    if constexpr (K::kFp4) {
      factor_of_sum = row_factor(w.row_scale, row_of_gate + lane / kTile * inner + lane % kTile);
    }
    float acc[2][1][4] = {};
    const auto take = [&](int turn, X(&part)[1]) {
      float c[2][1][4];
      Scales<K> s[2];
#pragma unroll
      for (int step = 0; step < 4; step += 2) {
        multiply_steps<K>(acc, c, s, ring.scales(lane), ring.zeros(lane), ring.words + ring.stage, part, step, own,
                          (begin + turn) >> w.shared_chunks, 0, [&] {
                            if (step == 0) ring.refill(ask);
                          });
      }
      ring.leave();
    };
    if constexpr (K::kKeep > 0) {
#pragma unroll
      for (int turn = 0; turn < kKept; ++turn) {
        if (turn < mine) ring.arrive(), take(turn, kept[turn]);
      }
    } else {
#pragma unroll 1
      for (int turn = 0; turn < mine; ++turn) {
        Raw<K> raw;
        raw.template load<4>(from, begin + turn, 0);
        ring.arrive();
        unsigned factor[4];
        fill_factor<K>(factor);
#pragma unroll
        for (int step = 0; step < 4; step += X::kSpan) kept[0][0].prepare(raw, step, factor);
        take(turn, kept[0]);
      }
    }
    // [warps, columns, rows]; whoever writes a buffer again has met all who read it, at the job between
    float* const sums = all_sums + ((job - first) % 2 == 0 ? 0 : K::kTileSums);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      sums[(warp * kColumns + 2 * quarter + i % 2) * K::kSumPitch + row + i / 2 * 8] = acc[i / 4][0][i % 4];
    }
    __syncthreads();
    float sum = 0.f;  // of gate in the lower lanes and of up in the upper ones; a warp has a column
#pragma unroll
    for (int j = 0; j < kWarps; ++j) sum += sums[(j * kColumns + warp) * K::kSumPitch + lane];
    if constexpr (K::kFp4) sum *= factor_of_sum;
    const float up = __shfl_xor_sync(0xffffffffu, sum, kTile);
    if (lane < kTile && warp < tokens) {
      const int column = tile * kTile + lane / 8 * 8 + ordered(lane % 8);
      h[int64_t(list * kColumns + warp) * inner + column] = __float2bfloat16_rn(sum * sigmoid(sum) * up);
    }
    if (++tile == tiles) tile = 0, ++list;
  }
#endif
}

// y = the sum of each token's choices down h by their shares, and of the shared expert's part; add: to what is in y. A
// block has rows 16 * blockIdx.x and on. K: one sixteen of rows.
template <typename K, int kKeys>
__global__ void __launch_bounds__(kMostDownWarps * 32)
    down_kernel(bf16* y, const bf16* h, const __grid_constant__ Stack w, const __grid_constant__ Routing r,
                const __grid_constant__ Shared shared, bool add, int stages) {
#if __CUDA_ARCH__ >= 900
  static_assert(K::kTall == 1 && K::kWide == 1 && K::kKeep == 0, "");
  const int lane = threadIdx.x % 32, row = lane / 4, quarter = lane % 4, warps = blockDim.x / 32;
  const int warp = __shfl_sync(0xffffffffu, int(threadIdx.x / 32), 0);
  const int first = blockIdx.x * kTile, chunks = w.row_bytes / kChunk;
  float* const sums = reinterpret_cast<float*>(dynamic_memory());  // [warps, tokens, rows]
  unsigned char* const after = dynamic_memory() + warps * r.tokens * (kTile * 4);
  Lists lists(after, r.most_lists, true);
  unsigned char* const rings = after + Lists::bytes(r.most_lists, true);
  // The kernel before gate_up was complete before gate_up began, and that has begun; only the L1 cache may not know it.
  make_lists<kKeys, true>(lists, *reinterpret_cast<Scratch*>(rings), r);

  int next_list = warp;
  Fetcher<K> fetcher(w, lane, 0, chunks, 0, (lists.count - warp + warps - 1) / warps);
  const auto ask = [&](unsigned to) {
    fetcher.ask(to, [&] {
      const int64_t at = int64_t(lists.expert[next_list]) * w.rows + first;
      next_list += warps;
      return at;
    });
  };
  Ring<K> ring(rings + warp * (stages * K::kStage), stages, lane);
  ring.fill(ask);

  float* const own = sums + warp * r.tokens * kTile;
  for (int i = lane; i < r.tokens * kTile; i += 32) own[i] = 0.f;
  __syncwarp();
  // own += factor * c: the lane's rows of column 2 * quarter and the next, for the tokens that these are.
  const auto add_columns = [&](const float (&c)[4], auto token_of, auto factor_of) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int token = token_of(2 * quarter + j);
      if (token >= 0) {
        const float factor = factor_of(2 * quarter + j);
        own[token * kTile + row] += factor * c[j], own[token * kTile + row + 8] += factor * c[j + 2];
      }
    }
  };
  for (int eight = 0; shared.columns > 0 && eight < r.tokens; eight += kColumns) {
    float c[4] = {};
    const int64_t token = min(eight + row, r.tokens - 1);
    for (int column = warp * 32 + quarter * 8; column < shared.columns; column += warps * 32) {
      const int64_t at = int64_t(first + row) * shared.columns + column;
      const uint4 v = __ldcg(reinterpret_cast<const uint4*>(shared.x + token * shared.columns + column));
      if (K::kFp4 && shared.scale != nullptr) {
        multiply_fp4<K>(c, reinterpret_cast<const unsigned char*>(shared.w), shared.scale, at, 8 * shared.columns, v);
      } else {
        const uint4 a = *reinterpret_cast<const uint4*>(shared.w + at);
        const uint4 b = *reinterpret_cast<const uint4*>(shared.w + at + 8 * shared.columns);
        mma<bf16>(c, a.x, b.x, a.y, b.y, v.x, v.y);
        mma<bf16>(c, a.z, b.z, a.w, b.w, v.z, v.w);
      }
    }
    if (K::kFp4 && shared.scale != nullptr) RowFactors(shared.row_scale, first + row).multiply(c);
    add_columns(
        c, [&](int j) { return eight + j < r.tokens ? eight + j : -1; },
        [&](int j) { return sigmoid(__ldcg(r.logits + int64_t(eight + j) * r.row + r.experts)); });
  }

  wait_for_predecessor();
  let_successor_start();
  const auto x_of = [&](int list) {
    return h + int64_t(list * kColumns + min(row, int(lists.tokens[list]) - 1)) * (2 * w.row_bytes) + quarter * 8;
  };
  using X = Part<K>;
  X part[1];
  Raw<K> raw;  // a chunk ahead
  unsigned factor[4];
  fill_factor<K>(factor);
  const bf16* from = h;
  if (warp < lists.count) from = x_of(warp), raw.template load<4>(from, 0, 0);
#pragma unroll 1
  for (int list = warp; list < lists.count; list += warps) {
    const bf16* const then = list + warps < lists.count ? x_of(list + warps) : from;
    const int64_t begin = int64_t(lists.expert[list]) * w.rows + first;
    const ScaleRows<K> scale_rows = fetcher.scale_rows(begin);
    const RowFactors factors(K::kFp4 ? w.row_scale : nullptr, begin + row);
    float acc[1][1][4] = {};
#pragma unroll 1
    for (int turn = 0; turn < chunks; ++turn) {
      float c[1][1][4];
      Scales<K> s[1];
      ring.arrive();
      const bool last = turn + 1 == chunks;
#pragma unroll
      for (int step = 0; step < 4; step += 2) {
        if (step % X::kSpan == 0) {
          part[0].template prepare<true>(raw, step, factor);
          raw.template load<X::kSpan>(last ? then : from, last ? 0 : turn + 1, step);
        }
        multiply_steps<K>(acc, c, s, ring.scales(lane), ring.zeros(lane), ring.words + ring.stage, part, step,
                          scale_rows, turn >> w.shared_chunks, 0, [&] {
                            if (step == 0) ring.refill(ask);
                          });
      }
      ring.leave();
    }
    if constexpr (K::kFp4) factors.multiply(acc[0][0]);
    // Another lane may have had the token before: they have met since, to wait for a chunk.
    const int columns = lists.tokens[list];
    add_columns(
        acc[0][0], [&](int j) { return j < columns ? int(lists.token[list * kColumns + j]) : -1; },
        [&](int j) { return lists.share[list * kColumns + j]; });
    from = then;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < r.tokens * kTile; i += blockDim.x) {
    float sum = 0.f;
    for (int j = 0; j < warps; ++j) sum += sums[j * r.tokens * kTile + i];
    bf16* const to = y + int64_t(i / kTile) * w.rows + first + i % kTile;
    const bf16 result = __float2bfloat16_rn(sum);
    *to = add ? __float2bfloat16_rn(__bfloat162float(result) + __bfloat162float(*to)) : result;
  }
#endif
}

// Calls run with the kinds of the kernel for a stack, tiles of kTall sixteens, and the number of keys a lane has when
// it chooses among experts.
template <int kTall, typename Run>
void with_kind(const Stack& w, int experts, Run run) {
  using std::integral_constant;
  const bool zero = w.zero != nullptr, narrow = w.row_bytes == w.groups * 16;
  const auto of = [&](auto form, auto has_zero, auto share, auto keep) {
    using K = Kind<form(), Scaling::kShort, has_zero(), share(), 1, kTall, keep()>;
    experts <= 256 ? run(K(), integral_constant<int, 8>()) : run(K(), integral_constant<int, 16>());
  };
  const auto with = [&](auto form, auto has_zero, auto share) {
    if constexpr (kTall == 2) {
      if (w.row_bytes <= 2 * kWarps * kChunk) return of(form, has_zero, share, integral_constant<int, 2>());
    }
    of(form, has_zero, share, integral_constant<int, 0>());
  };
  const auto of_int4 = [&](auto has_zero) {
    constexpr integral_constant<Format, Format::kInt4> int4{};
    narrow ? with(int4, has_zero, integral_constant<int, 1>()) : with(int4, has_zero, integral_constant<int, 4>());
  };
  if (w.floats) return with(integral_constant<Format, Format::kFp4>(), std::false_type(), integral_constant<int, 1>());
  zero ? of_int4(std::true_type()) : of_int4(std::false_type());
}

// Bytes of shared memory.
template <typename K>
constexpr int gate_up_bytes(int most_lists, int stages) {
  return kSumBytes<K> + Lists::bytes(most_lists, false) + kWarps * stages * K::kStage;
}
template <typename K>
constexpr int down_bytes(int tokens, int most_lists, int warps, int stages) {
  return warps * tokens * (kTile * 4) + Lists::bytes(most_lists, true) + warps * stages * K::kStage;
}

}  // namespace experts
}  // namespace vllm
