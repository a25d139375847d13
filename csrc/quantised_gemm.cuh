// The device side of quantised_gemm.cu: y = x W' for a few rows of x and weights of 4 or 8 bits, at the speed at which
// W arrives from memory.
//
// A block walks over tiles of 16 or 32 rows, and each of its eight warps over an eighth of their columns. A warp has a
// ring of stages of its own in shared memory: its lanes ask for a chunk of a tile, with the chunk's scales, as many
// chunks ahead as there are stages but one, across the ends of tiles. So no warp waits for another but at the end of a
// tile, where they add up what they have.#pragma once

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
  const float* row_scale;              // of fp4, a further factor of each row; or null
  int64_t w_row, scale_row, zero_row;  // bytes
  int scale_rows;                      // rows of W that share a scale
  int scale_type;                      // 0: bfloat16, 1: float16, 2: float32
  int shared_chunks;                   // chunks that share a scale, as a power of two
  // Row n of W has scale row n * inverse >> inverse_shift, which is n / scale_rows.
  unsigned inverse;
  int inverse_shift;
};

#if __CUDA_ARCH__ >= 900

__device__ inline int scale_row(const Problem& p, int n) {
  return int(uint64_t(min(n, p.N - 1)) * p.inverse >> p.inverse_shift);
}

// What a lane asks for: of every chunk 16 bytes of rows lane / 4, 8 further down and so on, and the scales or zero
// points of a row.
template <typename K>
struct Asker {
  static constexpr int kPieces = 2 * K::kTall;
  static constexpr int kExtras = K::kRow ? 0 : K::kRows * (K::kZero ? 2 : 1);  // of all lanes, scales first
  static constexpr int kOwn = (kExtras + 31) / 32;
  const Problem& p;
  int lane, begin, mine;  // the warp's first chunk of each tile, and how many
  int tile, turn, left;
  const unsigned char* rows;  // of the tile, at the next chunk
  unsigned pieces[kPieces];   // bytes from there
  const unsigned char* extras[kOwn > 0 ? kOwn : 1];
  unsigned piece_at, scale_at, zero_at;  // bytes in a stage

  __device__ void enter(int first_row) {
    rows = p.w + first_row * p.w_row + begin * kChunk;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      pieces[i] = min(i * 8 + lane / 4, p.N - 1 - first_row) * unsigned(p.w_row) + lane % 4 * 16;
    }
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int at = i * 32 + lane;
      const int64_t row = scale_row(p, first_row + at % K::kRows);
      extras[i] = at < K::kRows ? p.scale + row * p.scale_row : p.zero + row * p.zero_row;
    }
  }

  // The next chunk, if there is one, into the stage at this address. It is a group of copies in any case.
  __device__ void ask(unsigned to) {
    if (left > 0) {
      if (turn == mine) enter(tile++ * K::kRows), turn = 0;
#pragma unroll
      for (int i = 0; i < kPieces; ++i) copy_async<16>(to + piece_at + i * 8 * kPitch, rows + pieces[i]);
      const unsigned group = K::kGroups > 1 ? (begin + turn) * K::kGroups : (begin + turn) >> p.shared_chunks;
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        if (i * 32 + lane < K::kRows) {
          copy_scales(to + scale_at, extras[i] + group * unsigned(scale_size<K>(p.scale_type)));
        } else if (i * 32 + lane < kExtras) {
          copy_word(to + zero_at, extras[i] + group);
        }
      }
      rows += kChunk;
      ++turn;
      if (--left == p.late) let_successor_start();
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
  unsigned char* const ring = dynamic_memory() + K::kSumBytes + warp * ring_bytes;
  const unsigned ring_at = shared_address(ring);

  // Weights do not change while a model runs, so the first ones need not wait for the kernel that writes x.
  const int items = (end - first) * mine;
  if (items > 0 && items <= p.late) let_successor_start();
  Asker<K> asker{p, lane, begin, mine, first, mine, items};
  asker.piece_at = lane / 4 * kPitch + lane % 4 * 16;
  asker.scale_at = kRows * kPitch + lane % kRows * K::kScaleSlot;
  asker.zero_at = kRows * (kPitch + K::kScaleSlot) + lane % kRows * K::kZeroSlot;
  unmade(asker.piece_at), unmade(asker.scale_at), unmade(asker.zero_at);
  for (int at = 0; at < ring_bytes - K::kStage; at += K::kStage) asker.ask(ring_at + at);
  int stage = 0, before = ring_bytes - K::kStage;  // bytes in the ring: of the next chunk to come, and of the last
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

#pragma unroll 1
  for (int tile = first; tile < end; ++tile) {
    const int out_row = threadIdx.x % kRows, n = tile * kRows + out_row;  // of this thread's outputs
    // The row's only scale is asked for early: nobody waits for it before the tile's end.
    const unsigned char* const only_scale = p.scale + scale_row(p, n) * p.scale_row;
    const unsigned row_scale = K::kRow ? scale_bits(only_scale, 0, p.scale_type) : 0;
    float further = sums_larger(K::kFormat);  // factor of the sums
    if (K::kFp4 && p.row_scale != nullptr) further *= p.row_scale[min(n, p.N - 1)];
    ScaleRows<K> own{};
    if constexpr (!K::kRow && K::kGroups == 1) {
#pragma unroll
      for (int i = 0; i < 2 * K::kTall; ++i) {
        const int at = scale_row(p, tile * kRows + i * 8 + row);
        own.scale[i] = int(reinterpret_cast<uintptr_t>(p.scale)) + at * int(p.scale_row);
        if (K::kZero) own.zero[i] = int(reinterpret_cast<uintptr_t>(p.zero)) + at * int(p.zero_row);
      }
    }
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
        multiply_steps<K>(acc, c, s, scales, zeros, words_at + stage, part, step, own,
                          (begin + turn) >> p.shared_chunks, p.scale_type);
      }
      before = stage;
      stage = stage + K::kStage == ring_bytes ? 0 : stage + K::kStage;
    };
    // All lanes' copies of the next chunk are there, and the chunk before it makes room for another.
    const auto arrive = [&] {
      if (p.stages == kStages) {
        copy_wait<kStages - 2>();
      } else {
        copy_wait<kFew - 2>();
      }
      __syncwarp();
      asker.ask(ring_at + before);
    };
    if constexpr (K::kKeep > 0) {
#pragma unroll
      for (int turn = 0; turn < kKept; ++turn) {
        if (turn < mine) arrive(), take(turn, kept[turn]);
      }
    } else {
#pragma unroll 1
      for (int turn = 0; turn < mine; ++turn) {
        if (!kAhead) {
#pragma unroll
          for (int j = 0; j < kWide; ++j) raw[j].template load<4>(x + from[j], begin + turn, 0);
        }
        arrive(), take(turn, kept[0]);
      }
    }
    // [warps, columns, rows]; whoever writes a buffer again has met all who read it, at the tile between
    float* const sums = all_sums + (K::kBuffers == 2 && tile & 1 ? K::kTileSums : 0);
#pragma unroll
    for (int j = 0; j < kWide; ++j) {
#pragma unroll
      for (int i = 0; i < 4 * K::kTall; ++i) {
        sums[(warp * K::kOut + j * kColumns + 2 * quarter + i % 2) * K::kSumPitch + row + i / 2 * 8] =
            acc[i / 4][j][i % 4];
      }
    }
    __syncthreads();
    const float factor = further * (K::kRow ? scale_value(row_scale, p.scale_type) : 1.f);
#pragma unroll
    for (int i = 0; i < (K::kOut * kRows + kWarps * 32 - 1) / (kWarps * 32); ++i) {
      const int column = threadIdx.x / kRows + i * (kWarps * 32 / kRows);
      if (column < p.M && n < p.N) {
        float sum = 0.f;
#pragma unroll
        for (int j = 0; j < kWarps; ++j) sum += sums[(j * K::kOut + column) * K::kSumPitch + out_row];
        y[column * p.y_row + n] = __float2bfloat16_rn(sum * factor);
      }
    }
    if (K::kBuffers == 1) __syncthreads();
  }
#endif
}

}  // namespace quantised
}  // namespace vllm
