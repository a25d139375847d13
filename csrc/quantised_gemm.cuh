// The device side of quantised_gemm.cu: y = x W' for a few rows of x and weights of 4 or 8 bits, at the speed at which
// W arrives from memory.
//
// A block walks over tiles of 16 or 32 rows, and each of its eight warps over an eighth of their columns. A warp has a
// ring of stages of its own in shared memory: its lanes ask for a chunk of a tile, with the chunk's scales, as many
// chunks ahead as there are stages but one, across the ends of tiles. So no warp waits for another but once in a few
// tiles, where they add up what they have.
#pragma once

#include "quantised_tiles.cuh"

namespace vllm {
namespace quantised {

constexpr int kStages = 8, kFew = 4;  // of a warp's ring: as many, or where there is no room for them, so few

struct Problem {
  int M, N;
  int row_bytes;         // of W
  int stages;            // kStages or kFew
  int late;              // chunks a warp has still to ask for when the next kernel may start
  int64_t x_row, y_row;  // elements
  const unsigned char *w, *scale, *zero;
  const float* row_scale;               // of fp4, a further factor of each row; or null
  unsigned w_row, scale_row, zero_row;  // bytes
  int scale_rows;                       // rows of W that share a scale
  int scale_type;                       // 0: bfloat16, 1: float16, 2: float32
  int shared_chunks;                    // chunks that share a scale, as a power of two
  // Row n of W has scale row n * inverse >> inverse_shift, which is n / scale_rows.
  unsigned inverse;
  int inverse_shift;
};

#if __CUDA_ARCH__ >= 900

__device__ inline unsigned scale_row(const Problem& p, int n) {
  return unsigned(uint64_t(unsigned(min(n, p.N - 1))) * p.inverse >> p.inverse_shift);
}

// Where the scales of rows n, n + 8 and so on begin.
template <typename K>
__device__ inline ScaleRows<K> scale_rows(const Problem& p, int n) {
  ScaleRows<K> rows{};
#pragma unroll
  for (int i = 0; i < 2 * K::kTall; ++i) {
    const unsigned at = scale_row(p, n + i * 8);
    rows.scale[i] = int(unsigned(reinterpret_cast<uintptr_t>(p.scale)) + at * p.scale_row);
    if (K::kZero) rows.zero[i] = int(unsigned(reinterpret_cast<uintptr_t>(p.zero)) + at * p.zero_row);
  }
  return rows;
}

// A warp's part of a tile. sums: the tile's, [warps, columns, rows].
template <typename K>
__device__ inline void put_sums(float* sums, const float (&acc)[K::kTall][K::kWide][4]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  sums += (warp * K::kOut + 2 * (lane % 4)) * K::kSumPitch + lane / 4;
#pragma unroll
  for (int j = 0; j < K::kWide; ++j) {
#pragma unroll
    for (int i = 0; i < 4 * K::kTall; ++i)
      sums[(j * kColumns + i % 2) * K::kSumPitch + i / 2 * 8] = acc[i / 4][j][i % 4];
  }
}

// The row of y that is this thread's of kTiles tiles from this one on.
template <typename K, int kTiles>
__device__ inline int out_row(int tile) {
  return (tile + threadIdx.x / K::kRows % kTiles) * K::kRows + threadIdx.x % K::kRows;
}

// y = factor * the sum of all warps' parts, of rows below `end`.
template <typename K, int kTiles>
__device__ inline void add_up(bf16* y, const float* sums, float factor, const Problem& p, int tile, int end) {
  constexpr int kThreads = K::kRows * kTiles, kBeside = kWarps * 32 / kThreads;  // of a column; columns
  const int n = out_row<K, kTiles>(tile);
  if (n >= min(end, p.N)) return;
  sums += threadIdx.x / K::kRows % kTiles * K::kTileSums + threadIdx.x % K::kRows;
#pragma unroll
  for (int i = 0; i < (K::kOut + kBeside - 1) / kBeside; ++i) {
    const int column = threadIdx.x / kThreads + i * kBeside;
    if (column < p.M) {
      float sum = 0.f;
#pragma unroll
      for (int j = 0; j < kWarps; ++j) sum += sums[(j * K::kOut + column) * K::kSumPitch];
      y[column * p.y_row + n] = __float2bfloat16_rn(sum * factor);
    }
  }
}

// What a lane asks for: of one chunk, or of two side by side, 16 bytes of several rows, and the scales or zero points
// of a row. Lanes side by side ask for bytes side by side: it is requests that the cache has to answer.
template <typename K>
struct Asker {
  static constexpr int kAsked = K::kAsked, kLanes = 4 * kAsked, kApart = 32 / kLanes;  // lanes of a row; rows
  static constexpr int kPieces = K::kRows / kApart;
  static constexpr int kExtras = K::kRow ? 0 : kAsked * K::kRows;        // scales of all lanes
  static constexpr int kOwn = ((K::kZero ? 2 : 1) * kExtras + 31) / 32;  // then come zero points
  const Problem& p;
  int lane, begin, mine;  // the warp's first chunk of each tile, and how many
  int tile, turn, left;
  const unsigned char* rows;  // of the tile, at the next chunk
  unsigned pieces[kPieces];   // bytes from there
  const unsigned char* extras[kOwn > 0 ? kOwn : 1];
  unsigned piece_at, scale_at, zero_at;  // bytes in a stage

  __device__ Asker(const Problem& p, int lane, int begin, int mine, int tile, int left)
      : p(p), lane(lane), begin(begin), mine(mine), tile(tile), turn(mine), left(left), rows(nullptr) {
    piece_at = lane / kLanes * kPitch + lane % 4 * 16 + lane / 4 % kAsked * K::kStage;
    const int slots = K::kRows * kPitch + lane % kAsked * K::kStage, row = lane / kAsked % K::kRows;
    scale_at = slots + row * K::kScaleSlot;
    zero_at = slots + K::kRows * K::kScaleSlot + row * K::kZeroSlot;
    unmade(piece_at), unmade(scale_at), unmade(zero_at);
  }

  __device__ void enter(int first_row) {
    rows = p.w + uint64_t(unsigned(first_row)) * p.w_row + begin * kChunk;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      pieces[i] = unsigned(min(i * kApart + lane / kLanes, p.N - 1 - first_row)) * p.w_row + lane % kLanes * 16;
    }
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int at = i * 32 + lane;
      const uint64_t row = scale_row(p, first_row + at / kAsked % K::kRows);
      extras[i] = !K::kZero || at < kExtras ? p.scale + row * p.scale_row : p.zero + row * p.zero_row;
    }
  }

  // The next chunks, if there are any, into the stages from this address on. They are a group of copies in any case.
  __device__ void ask(unsigned to) {
    if (left > 0) {
      if (turn == mine) enter(tile++ * K::kRows), turn = 0;
#pragma unroll
      for (int i = 0; i < kPieces; ++i) copy_async<16>(to + piece_at + i * kApart * kPitch, rows + pieces[i]);
      const unsigned chunk = begin + turn + lane % kAsked;
      const unsigned group = K::kGroups > 1 ? chunk * K::kGroups : chunk >> p.shared_chunks;
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const int row = i * 32 / kAsked % K::kRows;
        if (i * 32 + lane < kExtras) {
          copy_scales(to + scale_at + row * K::kScaleSlot, extras[i] + group * unsigned(scale_size<K>(p.scale_type)));
        } else if (K::kZero && i * 32 + lane < 2 * kExtras) {
          copy_word(to + zero_at + row * K::kZeroSlot, extras[i] + group);
        }
      }
      rows += kAsked * kChunk;
      turn += kAsked;
      left -= kAsked;
      if (left <= p.late && p.late < left + kAsked) let_successor_start();
    }
    copy_commit();
  }

  static __device__ void copy_word(unsigned to, const unsigned char* from) {
    copy_async<4>(to, reinterpret_cast<const unsigned char*>(reinterpret_cast<uintptr_t>(from) & ~uintptr_t{3}));
  }
  __device__ void copy_scales(unsigned to, const unsigned char* from) {
    if constexpr (K::kGroups == 1) {
      copy_word(to, from);
    } else if (scale_size<K>(p.scale_type) == 2) {
      copy_async<K::kGroups * 2>(to, from);
    } else {
      copy_async<K::kGroups * 4>(to, from);
    }
  }
};

#endif

// Tiles that are added up together where their sums are small: between them no warp waits for another.
template <typename K>
constexpr int kTogether = K::kOut * K::kRows > 256   ? 1
                          : K::kOut * K::kRows > 128 ? 2
                                                     : 4;
template <typename K>
constexpr int kSumBytes = kTogether<K> * K::kTileSums * 4;

template <typename K>
__global__ void __launch_bounds__(kWarps * 32, K::kBlocks)
    quantised_gemm_kernel(bf16* y, const bf16* x, const __grid_constant__ Problem p) {
#if __CUDA_ARCH__ >= 900
  constexpr int kWide = K::kWide, kRows = K::kRows;
  const int lane = threadIdx.x % 32, row = lane / 4, quarter = lane % 4;
  const int warp = __shfl_sync(0xffffffffu, int(threadIdx.x / 32), 0);  // the compiler should know it for the same
  const int all_tiles = (p.N + kRows - 1) / kRows, chunks = p.row_bytes / kChunk;
  const int first = int64_t(all_tiles) * blockIdx.x / gridDim.x;
  const int end = int64_t(all_tiles) * (blockIdx.x + 1) / gridDim.x;
  const int begin = chunks * warp / kWarps, mine = chunks * (warp + 1) / kWarps - begin;
  float* const all_sums = reinterpret_cast<float*>(dynamic_memory());
  const int ring_bytes = p.stages * K::kStage;
  unsigned char* const ring = dynamic_memory() + kSumBytes<K> + warp * ring_bytes;
  const unsigned ring_at = shared_address(ring);

  // Weights do not change while a model runs, so the first ones need not wait for the kernel that writes x.
  const int items = (end - first) * mine;
  if (items > 0 && items <= p.late) let_successor_start();
  Asker<K> asker(p, lane, begin, mine, first, items);
  constexpr int kAsked = K::kAsked * K::kStage;  // bytes
  for (int at = 0; at < ring_bytes - kAsked; at += kAsked) asker.ask(ring_at + at);
  int stage = 0;  // bytes in the ring: of the next chunk to come
  wait_for_predecessor();

  int from[kWide];  // elements
#pragma unroll
  for (int j = 0; j < kWide; ++j) {
    from[j] = min(j * kColumns + row, p.M - 1) * int(p.x_row) + quarter * elements(K::kFormat);
  }
  using X = Part<K>;
  constexpr int kKept = K::kKeep > 0 ? K::kKeep : 1;
  constexpr bool kAhead = K::kKeep == 0 && kWide == 1;  // x is read a chunk ahead, as far as there are registers
  X kept[kKept][kWide];
  Raw<K> raw[kWide];
  constexpr unsigned kFactor = K::kZero ? 0x3f803f80u : 0xc308c308u;  // 1 or -136
  unsigned of_sums[4] = {kFactor, kFactor, kFactor, kFactor};
#pragma unroll
  for (int i = 0; i < 4; ++i) unmade(of_sums[i]);  // or each product would get a copy of its own
  if constexpr (K::kKeep > 0) {
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      if (i < mine) {
#pragma unroll
        for (int j = 0; j < kWide; ++j) {
          raw[j].template load<4>(x + from[j], begin + i, 0);
#pragma unroll
          for (int step = 0; step < 4; step += X::kSpan) kept[i][j].prepare(raw[j], step, of_sums);
        }
      }
    }
  } else if constexpr (kAhead) {
    if (mine > 0) raw[0].template load<4>(x + from[0], begin, 0);
  }
  unsigned words_at = ring_at + lane % 16 * kPitch + lane / 16 * 16;
  unmade(words_at);

  unsigned row_scale = 0;                   // of this thread's outputs
  float further = sums_larger(K::kFormat);  // factor of the sums
#pragma unroll 1
  for (int tile = first; tile < end; ++tile) {
    const int place = (tile - first) % kTogether<K>;
    if (place == 0) {  // The only scales are asked for early: nobody waits for them before the tiles' end.
      const int n = out_row<K, kTogether<K>>(tile);
      if (K::kRow) row_scale = scale_bits(p.scale + uint64_t(scale_row(p, n)) * p.scale_row, 0, p.scale_type);
      if (K::kFp4 && p.row_scale != nullptr) further = sums_larger(K::kFormat) * p.row_scale[min(n, p.N - 1)];
    }
    ScaleRows<K> own{};
    if constexpr (!K::kRow && K::kGroups == 1) own = scale_rows<K>(p, tile * kRows + row);
    float acc[K::kTall][kWide][4] = {};
    const auto take = [&](int turn, X(&part)[kWide]) {
      const unsigned char* const scales = ring + stage + kRows * kPitch + row * K::kScaleSlot;
      const unsigned char* const zeros = ring + stage + kRows * (kPitch + K::kScaleSlot) + row * K::kZeroSlot;
      float c[K::kTall][kWide][4];
      Scales<K> s[K::kTall];
#pragma unroll
      for (int step = 0; step < 4; step += 2) {
        if (K::kKeep == 0 && step % X::kSpan == 0) {
#pragma unroll
          for (int j = 0; j < kWide; ++j) part[j].prepare(raw[j], step, of_sums);
          if (kAhead) raw[0].template load<X::kSpan>(x + from[0], turn + 1 < mine ? begin + turn + 1 : begin, step);
        }
        // What came before makes room for others, asked for while this chunk's words are on their way.
        const auto ask = [&] {
          if (step == 0 && turn % K::kAsked == 0) asker.ask(ring_at + (stage == 0 ? ring_bytes : stage) - kAsked);
        };
        multiply_steps<K>(acc, c, s, scales, zeros, words_at + stage, part, step, own,
                          (begin + turn) >> p.shared_chunks, p.scale_type, ask);
      }
      stage = stage + K::kStage == ring_bytes ? 0 : stage + K::kStage;
    };
    // All lanes' copies of the next chunks are there, and none reads those before any more.
    const auto arrive = [&](int turn) {
      if (turn % K::kAsked != 0) return;
      if (p.stages == kStages) {
        copy_wait<kStages / K::kAsked - 2>();
      } else {
        copy_wait<kFew / K::kAsked - 2>();
      }
      __syncwarp();
    };
    if constexpr (K::kKeep > 0) {
#pragma unroll
      for (int turn = 0; turn < kKept; ++turn) {
        if (turn < mine) arrive(turn), take(turn, kept[turn]);
      }
    } else {
#pragma unroll 1
      for (int turn = 0; turn < mine; ++turn) {
        if (!kAhead) {
#pragma unroll
          for (int j = 0; j < kWide; ++j) raw[j].template load<4>(x + from[j], begin + turn, 0);
        }
        arrive(turn), take(turn, kept[0]);
      }
    }
    put_sums<K>(all_sums + place * K::kTileSums, acc);
    if (place == kTogether<K> - 1 || tile + 1 == end) {
      __syncthreads();
      const float factor = further * (K::kRow ? scale_value(row_scale, p.scale_type) : 1.f);
      add_up<K, kTogether<K>>(y, all_sums, factor, p, tile - place, (tile + 1) * kRows);
      if (tile + 1 < end) __syncthreads();
    }
  }
#endif
}

}  // namespace quantised
}  // namespace vllm
