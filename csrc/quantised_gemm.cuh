// The device side of quantised_gemm.cu: y = x W' for a few rows of x and weights of 4 or 8 bits, at the speed at which
// W arrives from memory.
//
// W is the 16-row operand of mma.sync and x the 8-column one, so that of each product nothing is thrown away but the
// columns that x has not. A step is 16 bytes of a row, a word for each lane of a quad; a chunk is four steps. Elements
// become bfloat16 in registers, in the order in which that takes fewest instructions, and x is put into the same order.
// A group's scale multiplies the sum over the group and not the elements; so does what int4 has too much (128 and the
// zero point), times the sum of the group's x, which is one more product, with ones. Only fp4's groups are as narrow as
// half a step, of which a lane has but one: there the scale multiplies the elements, which bfloat16 holds exactly.
//
// A block walks over tiles of 16 or 32 rows, and each of its eight warps over an eighth of their columns. A warp has a
// ring of stages of its own in shared memory: its lanes ask for a chunk of a tile, with the chunk's scales, as many
// chunks ahead as there are stages but one, across the ends of tiles. So no warp waits for another but at the end of a
// tile, where they add up what they have.
#pragma once

#include "quantised_elements.cuh"

namespace vllm {
namespace quantised {

using bf16 = __nv_bfloat16;

// The scales of groups: bfloat16, of a type known when the kernel runs, or not there since a row has but one. A step of
// fp4 has two of one byte, which are copied as a bfloat16 is.
enum class Scaling : int { kShort, kAny, kRow };

constexpr int kTile = 16;             // rows of W in a product
constexpr int kColumns = 8;           // rows of x in a product
constexpr int kWarps = 8;             // of a block
constexpr int kChunk = 64;            // bytes of a row: four steps
constexpr int kPitch = kChunk + 16;   // bytes from one row of a stage to the next: eight rows lie in different banks
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

// Which kernel. share: steps that share a scale, 4 for a chunk or more. wide: eights of x's rows. tall: sixteens of
// W's rows in a tile. keep: chunks of x that a warp keeps in registers, all that it ever needs; 0: it reads them again
// for each tile.
template <Format kForm, Scaling kScales, bool kHasZero, int kShared, int kEights, int kSixteens, int kKept>
struct Kind {
  static constexpr Format kFormat = kForm;
  static constexpr Scaling kScaling = kScales;
  static constexpr bool kZero = kHasZero, kRow = kScales == Scaling::kRow, kFp4 = kForm == Format::kFp4;
  static constexpr bool kOneSum = kRow || kFp4;  // of all of a row's products, whatever its groups
  static constexpr int kShare = kShared, kWide = kEights, kTall = kSixteens, kKeep = kKept;
  static constexpr int kRows = kTile * kTall, kOut = kColumns * kWide, kGroups = 4 / kShare;  // of a tile; of a chunk
  // Bytes of a stage that a row's scales and zero points take: those of a chunk, or the word in which its only one is.
  static constexpr int kScaleSlot = kRow ? 0 : kGroups == 1 ? 4 : kGroups * (kScaling == Scaling::kShort ? 2 : 4);
  static constexpr int kZeroSlot = kZero ? 4 : 0;
  static constexpr int kStage = kRows * (kPitch + kScaleSlot + kZeroSlot);
  // The warps' sums: floats from one column to the next, written and read without conflicts. Where they are small,
  // those of two tiles have room, which spares the threads a meeting.
  static constexpr int kSumPitch = kRows + 4, kTileSums = kWarps * kOut * kSumPitch;
  static constexpr int kBuffers = kOut * kRows > 256 ? 1 : 2;
  static constexpr int kSumBytes = kBuffers * kTileSums * 4;
  static constexpr int kBlocks = kWide > 2 ? 1 : 2;  // on a multiprocessor, at least
};

#if __CUDA_ARCH__ >= 900

// A scale as it is stored, of which the lowest bits count, and what it says.
__device__ inline unsigned scale_bits(const unsigned char* scales, int index, int type) {
  if (type == 2) return reinterpret_cast<const unsigned*>(scales)[index];
  return reinterpret_cast<const unsigned short*>(scales)[index];
}
__device__ inline float scale_value(unsigned bits, int type) {
  return type == 1 ? __half2float(__ushort_as_half((unsigned short)bits))
                   : __uint_as_float(type == 2 ? bits : bits << 16);
}

__device__ inline int scale_row(const Problem& p, int n) {
  return int(uint64_t(min(n, p.N - 1)) * p.inverse >> p.inverse_shift);
}

template <typename K>
__device__ inline int scale_size(const Problem& p) {
  return K::kScaling == Scaling::kShort || p.scale_type != 2 ? 2 : 4;
}

// One lane's part of a chunk of x as it lies in memory.
template <typename K>
struct Raw {
  static constexpr int kWords = elements(K::kFormat) / 2;
  unsigned words[4][kWords];

  // x: the lane's row and column of step 0. Loads kSpan steps of a chunk.
  template <int kSpan>
  __device__ void load(const bf16* x, int chunk, int first) {
#pragma unroll
    for (int step = first; step < first + kSpan; ++step) {
      const bf16* const from = x + (chunk * 4 + step) * (4 * elements(K::kFormat));
      if constexpr (kWords == 4) {
        const uint4 v = *reinterpret_cast<const uint4*>(from);
        words[step][0] = v.x, words[step][1] = v.y, words[step][2] = v.z, words[step][3] = v.w;
      } else {
        const uint2 v = *reinterpret_cast<const uint2*>(from);
        words[step][0] = v.x, words[step][1] = v.y;
      }
    }
  }
};

// The same in the order of W's pairs, and for int4 what a group's products begin with, in every row of W or, where rows
// have zero points, times what is to be taken from their elements.
template <typename K>
struct Part {
  static constexpr int kPairs = elements(K::kFormat) / 2;
  static constexpr int kSpan = K::kShare > 2 ? K::kShare : 2;  // steps to be prepared together
  static constexpr int kSums = K::kKeep > 0 ? 2 : 4;           // twice, as products have them, where registers are free
  unsigned pairs[4][kPairs];
  float sums[K::kGroups][kSums];  // over all lanes, of columns 2 * (lane % 4) and the next

  // factor: of the sums, in all of a product's operand.
  __device__ void prepare(const Raw<K>& x, int first, const unsigned (&factor)[4]) {
    float c[4] = {};
#pragma unroll
    for (int step = first; step < first + kSpan; ++step) {
      const unsigned (&v)[kPairs] = x.words[step];
#pragma unroll
      for (int i = 0; i < kPairs / 2; ++i) {
        pairs[step][2 * i] = __byte_perm(v[i], v[i + kPairs / 2], 0x5410);
        pairs[step][2 * i + 1] = __byte_perm(v[i], v[i + kPairs / 2], 0x7632);
      }
      if constexpr (K::kFormat == Format::kFp8) {
#pragma unroll
        for (int i = 0; i < kPairs; ++i) pairs[step][i] = mul2(pairs[step][i], kLarger);
      }
      if constexpr (K::kFormat == Format::kInt4) {
        mma<bf16>(c, factor[0], factor[1], factor[2], factor[3], pairs[step][0], pairs[step][1]);
        mma<bf16>(c, factor[0], factor[1], factor[2], factor[3], pairs[step][2], pairs[step][3]);
        if (step % K::kShare == K::kShare - 1) {
#pragma unroll
          for (int i = 0; i < kSums; ++i) sums[step / K::kShare][i] = c[i];
          c[0] = c[1] = c[2] = c[3] = 0.f;
        }
      }
    }
  }
};

// A lane's scales and zero points of two steps of 16 rows: of row lane / 4 and of the one 8 further down.
template <typename K>
struct Scales {
  static constexpr int kGroups = K::kShare == 1 ? 2 : 1;
  float scale[2][kGroups], less[2][kGroups];  // less: what is to be taken from elements, negative
  unsigned factor[2][2];                      // of fp4: 2^119 times the scales of the lane's half of steps, twice

  // scales, zeros: of the lane's first row in its slots; scale_at, zero_at: bytes further on in each row's.
  __device__ void read(const unsigned char* scales, const unsigned char* zeros, const int (&scale_at)[2],
                       const int (&zero_at)[2], int type) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const unsigned char* const from = scales + half * 8 * K::kScaleSlot + scale_at[half];
      if constexpr (K::kFp4) {
        const unsigned two = pair<Format::kFp8>(*reinterpret_cast<const unsigned*>(from), threadIdx.x / 2 % 2);
        const unsigned large = mul2(mul2(two, 0x7f007f00u), 0x77807780u);  // 2^127 and 2^112
        factor[half][0] = low_twice(large), factor[half][1] = high_twice(large);
      } else if constexpr (K::kScaling == Scaling::kShort && kGroups == 2) {
        const unsigned two = *reinterpret_cast<const unsigned*>(from);
        scale[half][0] = __uint_as_float(two << 16), scale[half][1] = __uint_as_float(two & 0xffff0000u);
      } else {
#pragma unroll
        for (int j = 0; j < kGroups; ++j) {
          const int known = K::kScaling == Scaling::kShort ? 0 : type;
          scale[half][j] = scale_value(scale_bits(from, j, known), known);
        }
      }
      if constexpr (K::kZero) {  // 2^23 + the zero point is a float that takes no conversion
#pragma unroll
        for (int j = 0; j < kGroups; ++j) {
          less[half][j] =
              8388608.f - 128.f - __uint_as_float(0x4b000000u | zeros[half * 8 * K::kZeroSlot + zero_at[half] + j]);
        }
      }
    }
  }
};

// acc += scale * (c + a step of 16 rows times x), at the end of a group. low, high: the lane's words, of row lane / 4
// and 8 further down.
template <typename K>
__device__ inline void multiply(float (&acc)[K::kWide][4], float (&c)[K::kWide][4], unsigned low, unsigned high,
                                const Part<K> (&x)[K::kWide], const Scales<K>& s, int step) {
  constexpr Format kFormat = K::kFormat;
  const int own = step % 2 * (Scales<K>::kGroups - 1);  // of s
  if (!K::kOneSum && step % K::kShare == 0) {
#pragma unroll
    for (int j = 0; j < K::kWide; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float sum = kFormat == Format::kInt4 ? x[j].sums[step / K::kShare][i % Part<K>::kSums] : 0.f;
        c[j][i] = K::kZero ? s.less[i / 2][own] * sum : sum;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < elements(kFormat) / 2; i += 2) {
    unsigned a[4] = {pair<kFormat>(low, i), pair<kFormat>(high, i), pair<kFormat>(low, i + 1),
                     pair<kFormat>(high, i + 1)};
    if constexpr (K::kFp4) {
#pragma unroll
      for (int j = 0; j < 4; ++j) a[j] = mul2(a[j], s.factor[j % 2][own]);
    }
#pragma unroll
    for (int j = 0; j < K::kWide; ++j) {
      mma<bf16>(K::kOneSum ? acc[j] : c[j], a[0], a[1], a[2], a[3], x[j].pairs[step][i], x[j].pairs[step][i + 1]);
    }
  }
  if (!K::kOneSum && step % K::kShare == K::kShare - 1) {
#pragma unroll
    for (int j = 0; j < K::kWide; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[j][i] += s.scale[i / 2][own] * c[j][i];
    }
  }
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
          copy_scales(to + scale_at, extras[i] + group * unsigned(scale_size<K>(p)));
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
    } else if (scale_size<K>(p) == 2) {
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
    // The word in which the row's only scale is: one load, for which nobody waits before the tile's end.
    const unsigned char* const only_scale = p.scale + scale_row(p, n) * p.scale_row;
    const unsigned beyond = reinterpret_cast<uintptr_t>(only_scale) & 3;
    const unsigned row_scale = K::kRow ? *reinterpret_cast<const unsigned*>(only_scale - beyond) : 0;
    float further = sums_larger(K::kFormat);  // factor of the sums
    if (K::kFp4 && p.row_scale != nullptr) further *= p.row_scale[min(n, p.N - 1)];
    int scale_low[2 * K::kTall] = {}, zero_low[2 * K::kTall] = {};  // bits of where the lane's rows of scales begin
    if constexpr (!K::kRow && K::kGroups == 1) {
#pragma unroll
      for (int i = 0; i < 2 * K::kTall; ++i) {
        const int at = scale_row(p, tile * kRows + i * 8 + row);
        scale_low[i] = int(reinterpret_cast<uintptr_t>(p.scale)) + at * int(p.scale_row);
        if (K::kZero) zero_low[i] = int(reinterpret_cast<uintptr_t>(p.zero)) + at * int(p.zero_row);
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
#pragma unroll
        for (int i = 0; i < K::kTall; ++i) {
          if (!K::kRow && step % K::kShare == 0) {
            const int group = K::kGroups > 1 ? step / K::kShare : (begin + turn) >> p.shared_chunks;
            int scale_at[2], zero_at[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int at = group * scale_size<K>(p);
              scale_at[half] = K::kGroups > 1 ? at : (scale_low[2 * i + half] + at) & 3;
              zero_at[half] = K::kGroups > 1 ? group : (zero_low[2 * i + half] + group) & 3;
            }
            const int at = i * kTile;
            s[i].read(scales + at * K::kScaleSlot, zeros + at * K::kZeroSlot, scale_at, zero_at, p.scale_type);
          }
          unsigned w[4];  // both of a step, both of the next
          load_tiles(w, words_at + stage + i * kTile * kPitch + step * 16);
          multiply<K>(acc[i], c[i], w[0], w[1], part, s[i], step);
          multiply<K>(acc[i], c[i], w[2], w[3], part, s[i], step + 1);
        }
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
    const float factor = further * (K::kRow ? scale_value(row_scale >> 8 * beyond, p.scale_type) : 1.f);
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
