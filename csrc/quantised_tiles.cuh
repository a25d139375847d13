// What a warp does with a few tiles of a quantised W and a few rows of x: for quantised_gemm.cuh and experts_w4.cuh.
//
// W is the 16-row operand of mma.sync and x the 8-column one, so that of each product nothing is thrown away but the
// columns that x has not. A step is 16 bytes of a row, a word for each lane of a quad; a chunk is four steps. Elements
// become bfloat16 in registers, in the order in which that takes fewest instructions, and x is put into the same order.
// A group's scale multiplies the sum over the group and not the elements; so does what int4 has too much (128 and the
// zero point), times the sum of the group's x, which is one more product, with ones. Only fp4's groups are as narrow as
// half a step, of which a lane has but one: there the scale multiplies the elements, which bfloat16 holds exactly.
#pragma once

#include "quantised_elements.cuh"

namespace vllm {
namespace quantised {

using bf16 = __nv_bfloat16;

// The scales of groups: bfloat16, of a type known when the kernel runs, or not there since a row has but one. A step of
// fp4 has two of one byte, which are copied as a bfloat16 is.
enum class Scaling : int { kShort, kAny, kRow };

constexpr int kTile = 16;            // rows of W in a product
constexpr int kColumns = 8;          // rows of x in a product
constexpr int kWarps = 8;            // of a block
constexpr int kChunk = 64;           // bytes of a row: four steps
constexpr int kPitch = kChunk + 16;  // bytes from one row of a stage to the next: eight rows lie in different banks

// Which kernel. share: steps that share a scale, 4 for a chunk or more. wide: eights of x's rows. tall: sixteens of
// W's rows in a tile. keep: chunks of x that a warp keeps in registers, all that it ever needs; 0: it reads them again
// for each tile.
// asked: chunks of a warp's that are asked for together.
template <Format kForm, Scaling kScales, bool kHasZero, int kShared, int kEights, int kSixteens, int kKept,
          int kAtOnce = 1>
struct Kind {
  static constexpr Format kFormat = kForm;
  static constexpr Scaling kScaling = kScales;
  static constexpr bool kZero = kHasZero, kRow = kScales == Scaling::kRow, kFp4 = kForm == Format::kFp4;
  static constexpr bool kOneSum = kRow || kFp4;  // of all of a row's products, whatever its groups
  static constexpr int kShare = kShared, kWide = kEights, kTall = kSixteens, kKeep = kKept, kAsked = kAtOnce;
  static constexpr int kRows = kTile * kTall, kOut = kColumns * kWide, kGroups = 4 / kShare;  // of a tile; of a chunk
  // Bytes of a stage that a row's scales and zero points take: those of a chunk, or the word in which its only one is.
  static constexpr int kScaleSlot = kRow ? 0 : kGroups == 1 ? 4 : kGroups * (kScaling == Scaling::kShort ? 2 : 4);
  static constexpr int kZeroSlot = kZero ? 4 : 0;
  static constexpr int kStage = kRows * (kPitch + kScaleSlot + kZeroSlot);
  // The warps' sums of a tile: floats from one column to the next, written and read without conflicts.
  static constexpr int kSumPitch = kRows + 4, kTileSums = kWarps * kOut * kSumPitch;
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

template <typename K>
__device__ inline int scale_size(int type) {
  return K::kScaling == Scaling::kShort || type != 2 ? 2 : 4;
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

// Words of x in the order of W's pairs.
template <typename K>
__device__ inline void in_order(unsigned (&pairs)[Raw<K>::kWords], const unsigned (&x)[Raw<K>::kWords]) {
#pragma unroll
  for (int i = 0; i < Raw<K>::kWords / 2; ++i) {
    pairs[2 * i] = __byte_perm(x[i], x[i + Raw<K>::kWords / 2], 0x5410);
    pairs[2 * i + 1] = __byte_perm(x[i], x[i + Raw<K>::kWords / 2], 0x7632);
  }
}

// The same in the order of W's pairs, and for int4 what a group's products begin with, in every row of W or, where rows
// have zero points, times what is to be taken from their elements.
template <typename K>
struct Part {
  static constexpr int kPairs = elements(K::kFormat) / 2;
  static constexpr int kSpan = K::kShare > 2 ? K::kShare : 2;  // steps to be prepared together
  static constexpr int kSums = K::kKeep > 0 ? 2 : 4;           // twice, as products have them, where registers are free
  unsigned pairs[4][kPairs];
  float sums[K::kGroups][kSums];  // over all lanes, of columns 2 * (lane % 4) and the next

  // factor: of the sums, in all of a product's operand. kOrdered: x has come in the order of the pairs.
  template <bool kOrdered = false>
  __device__ void prepare(const Raw<K>& x, int first, const unsigned (&factor)[4]) {
    float c[4] = {};
#pragma unroll
    for (int step = first; step < first + kSpan; ++step) {
      const unsigned (&v)[kPairs] = x.words[step];
      if constexpr (kOrdered) {
#pragma unroll
        for (int i = 0; i < kPairs; ++i) pairs[step][i] = v[i];
      } else {
        in_order<K>(pairs[step], v);
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
        const unsigned large = large_scales(*reinterpret_cast<const unsigned*>(from), threadIdx.x / 2 % 2);
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

// Which rows of scales and zero points are a lane's: bits of where they begin, of every eighth row of a tile from
// lane / 4 on. They are asked for only where a chunk has one scale or none, which may lie anywhere in its word.
template <typename K>
struct ScaleRows {
  int scale[2 * K::kTall], zero[2 * K::kTall];
};

// The scales and zero points of the steps that begin with this one, of sixteen rows: those in a stage at row lane / 4
// of them, the i-th sixteen of a tile. group: that of the chunk in its row, where it has but one.
template <typename K>
__device__ inline void read_scales(Scales<K>& s, const unsigned char* scales, const unsigned char* zeros, int step,
                                   int i, const ScaleRows<K>& rows, int group, int type) {
  const int index = K::kGroups > 1 ? step / K::kShare : group;
  int scale_at[2], zero_at[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int at = index * scale_size<K>(type);
    scale_at[half] = K::kGroups > 1 ? at : (rows.scale[2 * i + half] + at) & 3;
    zero_at[half] = K::kGroups > 1 ? index : (rows.zero[2 * i + half] + index) & 3;
  }
  const int at = i * kTile;
  s.read(scales + at * K::kScaleSlot, zeros + at * K::kZeroSlot, scale_at, zero_at, type);
}

// acc += two steps of a chunk of W times x. scales, zeros: of row lane / 4 in the stage; words: where the lane names
// rows to load_tiles, in the stage's first step; group: as for read_scales; meanwhile: called when all that is asked of
// the stage has been.
template <typename K, typename F>
__device__ inline void multiply_steps(float (&acc)[K::kTall][K::kWide][4], float (&c)[K::kTall][K::kWide][4],
                                      Scales<K> (&s)[K::kTall], const unsigned char* scales, const unsigned char* zeros,
                                      unsigned words, const Part<K> (&x)[K::kWide], int step, const ScaleRows<K>& rows,
                                      int group, int type, const F& meanwhile) {
  unsigned w[K::kTall][4];  // both of a step, both of the next
#pragma unroll
  for (int i = 0; i < K::kTall; ++i) {
    load_tiles(w[i], words + i * kTile * kPitch + step * 16);
    if (!K::kRow && step % K::kShare == 0) read_scales<K>(s[i], scales, zeros, step, i, rows, group, type);
  }
  meanwhile();
#pragma unroll
  for (int i = 0; i < K::kTall; ++i) {
    multiply<K>(acc[i], c[i], w[i][0], w[i][1], x, s[i], step);
    multiply<K>(acc[i], c[i], w[i][2], w[i][3], x, s[i], step + 1);
  }
}

#endif

}  // namespace quantised
}  // namespace vllm
