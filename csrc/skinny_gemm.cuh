// The device side of skinny_gemm.cu: y = x W' for a few rows of x, at the speed at which W arrives from memory.
//
// A block walks over tiles of 8 rows of W. One warp asks the copy engine for whole rows (4 KiB of them where they are
// longer), into a ring of stages in shared memory; the other warps multiply what has arrived on tensor cores, each a
// part of the columns. A warp meets the same columns in every tile, so it keeps its part of x in registers. Where the
// ring is small enough, the next kernel's block moves in beside this one and fills its own while this one finishes.
//
// A product sums over k in any order: thread t of a quad reads 16 bytes of its row of W, whatever number of elements
// that is, and the same elements of x, and calls them the k that mma.sync wants from it. x is the 16-row operand, W the
// 8-column one. Quantised elements turn into bfloat16 in registers, in an order that takes few instructions; x is put
// into the same order once.
//
// What stands around a projection in a layer can be part of it, for plain weights. An RMS norm in front of it: the
// warps add up the squares of their parts of x and exchange them once, while the first weights arrive. The add behind
// it: the outputs are added to what is there, fetched a tile ahead. Both round as kernels of their own would.
//
// There are two warps to a scheduler and hundreds of cycles to a tile, so what a tile costs is the length of its chain
// of instructions: all sizes but the rows' number are template parameters, and loops over tiles have no division in
// them.
#pragma once

#include <cuda_fp8.h>

#include "hopper.cuh"
#include "values.cuh"

#pragma nv_diag_suppress 177  // for sm_80, which has no copy engine, the kernel is empty and its helpers unused

namespace vllm {
namespace skinny {

enum class Format : int { kPlain, kInt4, kInt8, kFp8, kFp4 };

constexpr int kRows = 8;  // of W in a tile
constexpr int kMaxStages = 16;
constexpr int kPad = 64;  // bytes after a row in shared memory: two neighbouring rows lie in different banks

__host__ __device__ constexpr int bits_of(Format format) {
  return format == Format::kPlain ? 16 : format == Format::kInt8 || format == Format::kFp8 ? 8 : 4;
}

// How a kernel for up to 8 * kXTiles rows of x and kPanels times kPanel columns cuts them. x takes at most 64 registers
// of a thread.
template <Format kFormat, int kXTiles, int kPanel, int kPanels>
struct Cut {
  static constexpr int kUnit = 512 / bits_of(kFormat);  // columns in 64 bytes, which a quad reads at once
  static constexpr int kPairs = kUnit / 8;              // registers of two elements that a thread gets of a unit
  static constexpr int kWanted = kXTiles * kPanel * kPanels > 4096 ? 16 : 8;
  static constexpr int kWarps = kPanel / kUnit < kWanted ? kPanel / kUnit : kWanted;  // that multiply
  static constexpr int kThreads = (kWarps + 1) * 32;
  static constexpr int kUnits = kPanel / (kWarps * kUnit);   // of a panel that a warp takes
  static constexpr int kTogether = kUnits < 4 ? kUnits : 4;  // that it reads before it multiplies
  static constexpr int kOut = kRows * 8 * kXTiles;           // outputs of a tile
  static constexpr int kPartial = 2 * kWarps * kOut * 4;     // bytes of two tiles' sums
  static constexpr int kPitch = kPanel * bits_of(kFormat) / 8 + kPad;
  // The last stages, if x comes through them before W does: the copy engine brings whole rows sooner than eight warps
  // fetch their pieces of them. Not where x takes more stages, or where rows are short: there it gains nothing.
  static constexpr int kXStages =
      kFormat == Format::kPlain && kPanel == 2048 && kXTiles * kPanels <= 2 ? kXTiles * kPanels : 0;
  static_assert(kUnits % kTogether == 0 && kOut <= kWarps * 32, "");
};

// Floats of 8 and 4 bits keep their exponents' bits in bfloat16, which makes them smaller by these powers of two. The
// scale makes good for all of it but a factor of 256, which it might not hold; that is left to the sum.
constexpr float kLift = 256.f;
__host__ __device__ constexpr float lost(Format format) {
  return format == Format::kFp8 ? 0x1p120f : format == Format::kFp4 ? 0x1p126f : 1.f;
}

// Where the scales are and how exact they are.
enum class Scaling : int { kRow, kShort, kExact };  // of whole rows only; of groups: bfloat16 holds them, or does not

// What is folded into a product.
enum class Fold : int { kNone, kNorm, kAdd };

struct Problem {
  int M, N;
  int stages, stage_bytes;
  int late;                            // stages still to ask for when the next kernel may start
  int64_t x_row, y_row;                // elements
  int64_t w_row, scale_row, zero_row;  // bytes
  const unsigned char *w, *scale, *zero;
  int group_shift;                  // log2 of the columns that share a scale
  int scale_rows;                   // rows of W that share one
  int scale_type;                   // 0: bfloat16, 1: float16, 2: float32, 3: fp8
  int scale_pitch;                  // bytes of a row's scales in a stage
  const unsigned char* row_scales;  // of whole rows, applied to the sums; or null
  int64_t row_scale_row;            // bytes
  int row_scale_rows, row_scale_type;
  float lift;        // factor that makes good for the small numbers that 8- and 4-bit floats become
  const void* norm;  // weight of the norm, one element of x's type a column; its factor is norm_offset larger
  float norm_eps, norm_offset;
};

#if __CUDA_ARCH__ >= 900
__device__ inline unsigned twice(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)) * 0x10001u; }

__device__ inline float read_scale(const unsigned char* scale, int index, int type) {
  if (type == 2) return reinterpret_cast<const float*>(scale)[index];
  if (type == 3) return __half2float(__nv_cvt_fp8_to_halfraw(scale[index], __NV_E4M3));
  const unsigned short bits = reinterpret_cast<const unsigned short*>(scale)[index];
  return type == 1 ? __half2float(__ushort_as_half(bits)) : __bfloat162float(__ushort_as_bfloat16(bits));
}

// A scale as the sum of two bfloat16: one multiplication with each leaves (almost) the rounding of the exact product.
template <Format kFormat, Scaling kScaling>
struct Scale {
  unsigned high = 0, low = 0;
  __device__ void read(const unsigned char* scales, int index, int type) {
    const int known = kFormat == Format::kFp4 ? 3 : kScaling == Scaling::kShort ? 0 : type;
    const float x = read_scale(scales, index, known) * (lost(kFormat) > 1.f ? lost(kFormat) / kLift : 1.f);
    high = twice(x);
    if (kScaling == Scaling::kExact) low = twice(x - __uint_as_float(high << 16));
  }
  __device__ unsigned times(unsigned q) const {
    if (kScaling == Scaling::kRow) return lost(kFormat) > 1.f ? mul2(q, twice(lost(kFormat))) : q;
    return kScaling == Scaling::kExact ? fma2(q, high, mul2(q, low)) : mul2(q, high);
  }
};

// The elements of one 32-bit word as pairs, in the order in which they come cheapest; `x_pairs` is the same for x.
// int4: 128 + zero, twice.
template <Format kFormat, Scaling kScaling>
__device__ inline void to_pairs(unsigned word, const Scale<kFormat, kScaling>& scale, unsigned zero, unsigned* pairs) {
  if constexpr (kFormat == Format::kInt4) {  // (0,4) (1,5) (2,6) (3,7)
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // 0x4300 is 128, whose last bit is worth 1
      pairs[i] = scale.times(sub2((word >> (4 * i) & 0x000f000fu) | 0x43004300u, zero));
    }
  } else if constexpr (kFormat == Format::kInt8) {  // (0,2) (1,3)
#pragma unroll
    for (int i = 0; i < 2; ++i) {  // 128 + the low seven bits, minus 256 or 128 by the high bit: q - 128
      const unsigned bytes = word >> (8 * i);
      pairs[i] = scale.times(sub2((bytes & 0x007f007fu) | 0x43004300u, (bytes & 0x00800080u) ^ 0x43804380u));
    }
  } else if constexpr (kFormat == Format::kFp8) {  // (0,2) (1,3)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const unsigned bytes = word << (8 - 8 * i);
      pairs[i] = scale.times((bytes & 0x80008000u) | (bytes >> 4 & 0x07f007f0u));
    }
  } else {  // (0,4) (1,5) (2,6) (3,7)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const unsigned sign = word << (12 - 4 * i) & 0x80008000u;
      pairs[i] = scale.times(sign | ((i < 2 ? word << (6 - 4 * i) : word >> (4 * i - 6)) & 0x01c001c0u));
    }
  }
}

template <Format kFormat>
__device__ inline void x_pairs(const uint4& x, unsigned* pairs) {  // of eight elements
  if constexpr (kFormat == Format::kPlain) {
    pairs[0] = x.x, pairs[1] = x.y, pairs[2] = x.z, pairs[3] = x.w;
  } else if constexpr (bits_of(kFormat) == 8) {
    pairs[0] = __byte_perm(x.x, x.y, 0x5410), pairs[1] = __byte_perm(x.x, x.y, 0x7632);
    pairs[2] = __byte_perm(x.z, x.w, 0x5410), pairs[3] = __byte_perm(x.z, x.w, 0x7632);
  } else {
    pairs[0] = __byte_perm(x.x, x.z, 0x5410), pairs[1] = __byte_perm(x.x, x.z, 0x7632);
    pairs[2] = __byte_perm(x.y, x.w, 0x5410), pairs[3] = __byte_perm(x.y, x.w, 0x7632);
  }
}

// sum and the squares of two elements.
template <typename T>
__device__ inline float add_squares(float sum, unsigned pair) {
  const auto two = *reinterpret_cast<const Pack<T, 2>*>(&pair);
  const float low = to_float(two.v[0]), high = to_float(two.v[1]);
  return fmaf(high, high, fmaf(low, low, sum));
}

// Two elements times `inverse` and each its factor.
template <typename T>
__device__ inline unsigned scaled(unsigned pair, unsigned weights, float inverse, float offset) {
  auto two = *reinterpret_cast<const Pack<T, 2>*>(&pair);
  const auto w = *reinterpret_cast<const Pack<T, 2>*>(&weights);
#pragma unroll
  for (int i = 0; i < 2; ++i) two.v[i] = from_float<T>(to_float(two.v[i]) * inverse * (to_float(w.v[i]) + offset));
  return *reinterpret_cast<const unsigned*>(&two);
}
#endif

template <typename T, Format kFormat, Scaling kScaling, int kXTiles, int kPanel, int kPanels, Fold kFold>
__global__ void __launch_bounds__((Cut<kFormat, kXTiles, kPanel, kPanels>::kThreads),
                                  (Cut<kFormat, kXTiles, kPanel, kPanels>::kWarps <= 8 ? 2 : 1))
    skinny_gemm_kernel(T* y, const T* x, const __grid_constant__ Problem p) {
#if __CUDA_ARCH__ >= 900
  using C = Cut<kFormat, kXTiles, kPanel, kPanels>;
  constexpr int kWarps = C::kWarps, kUnit = C::kUnit, kPairs = C::kPairs, kOut = C::kOut, kPitch = C::kPitch;
  constexpr int kRowBytes = kPanel * bits_of(kFormat) / 8;
  constexpr bool kPlain = kFormat == Format::kPlain, kGroups = !kPlain && kScaling != Scaling::kRow;
  static_assert(kPlain || kFold == Fold::kNone, "");
#if __CUDA_ARCH__ >= 1200
  constexpr int kXStages = 0;  // 99 KiB hold two of these stages
#else
  constexpr int kXStages = C::kXStages;
#endif
  unsigned char* const memory = dynamic_memory();  // the sums of the warps, two tiles; the ring
  __shared__ uint64_t full[kMaxStages], empty[kMaxStages], summed[2], known;
  unsigned char* const ring = memory + C::kPartial;
  const unsigned full_at = shared_address(full), empty_at = shared_address(empty), summed_at = shared_address(summed);
  const unsigned known_at = shared_address(&known);

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int all_tiles = (p.N + kRows - 1) / kRows;
  const int first = int64_t(all_tiles) * blockIdx.x / gridDim.x;
  const int tiles = int(int64_t(all_tiles) * (blockIdx.x + 1) / gridDim.x) - first;
  if (threadIdx.x == 0) {
#pragma unroll 1
    for (int i = 0; i < p.stages; ++i) {
      barrier_init(full_at + 8 * i, 1);
      barrier_init(empty_at + 8 * i, kWarps * 32);
    }
    barrier_init(summed_at, kWarps * 32);
    barrier_init(summed_at + 8, kWarps * 32);
    barrier_init(known_at, 1);
    barrier_init_done();
  }
  __syncthreads();

  if (warp == kWarps) {
    const unsigned ring_at = shared_address(ring);
    const int groups = kGroups ? kPanel >> p.group_shift : 0;
    const int scales = kGroups ? p.scale_pitch : 0, zeros = kGroups && p.zero ? groups : 0;
    int stage = 0, phase = 1, left = tiles * kPanels;
    const int late = min(p.late, left - 1), x_stage = p.stages - kXStages;
    const auto ask_for_x = [&] {  // row m to row m % 8 of a stage, as W's rows lie
      wait_for_predecessor();
      if (lane == 0) barrier_expect(known_at, p.M * kPanels * kRowBytes);
      __syncwarp();
      if (lane >= p.M) return;
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) {
        const unsigned to = ring_at + (x_stage + panel * kXTiles + lane / kRows) * p.stage_bytes;
        bulk_copy(to + lane % kRows * kPitch, x + lane * p.x_row + panel * kPanel, kRowBytes, known_at);
      }
    };
    int before_x = min(x_stage, left);  // stages that are filled while x is not known
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      const int n = (first + tile) * kRows + lane % kRows, rows = min(kRows, p.N - (first + tile) * kRows);
#pragma unroll 1
      for (int panel = 0; panel < kPanels; ++panel) {
        // Weights do not change while a model runs, so the first ones need not wait for the kernel that writes x.
        if (kXStages && before_x-- == 0) ask_for_x();
        barrier_wait(empty_at + 8 * stage, kXStages ? phase ^ int(stage >= x_stage) : phase);
        const unsigned to = ring_at + stage * p.stage_bytes;
        if (lane == 0) barrier_expect(full_at + 8 * stage, rows * (kRowBytes + scales + zeros));
        __syncwarp();
        if (lane % kRows < rows) {
          if (lane < kRows) {
            bulk_copy(to + lane * kPitch, p.w + n * p.w_row + panel * kRowBytes, kRowBytes, full_at + 8 * stage);
          } else if (kGroups && lane < 2 * kRows) {
            bulk_copy(to + kRows * kPitch + (lane - kRows) * scales,
                      p.scale + n / p.scale_rows * p.scale_row + panel * scales, scales, full_at + 8 * stage);
          } else if (lane >= 2 * kRows && lane < 3 * kRows && zeros) {
            bulk_copy(to + kRows * (kPitch + scales) + (lane - 2 * kRows) * zeros,
                      p.zero + n / p.scale_rows * p.zero_row + panel * zeros, zeros, full_at + 8 * stage);
          }
        }
        if (--left == late) let_successor_start();
        if (++stage == p.stages) stage = 0, phase ^= 1;
      }
    }
    if (kXStages && before_x >= 0) ask_for_x();
    wait_for_predecessor();
    return;
  }

  const T* const norm = static_cast<const T*>(p.norm) + warp * kUnit;
  if (kFold == Fold::kNorm && lane < kPanels * C::kUnits) prefetch(norm + lane * (kWarps * kUnit));
  wait_for_predecessor();
  const int row = lane / 4, quarter = lane % 4;  // of a tile and of x; of a unit
  unsigned xs[kPanels * C::kUnits][kXTiles][kPairs];
  const int from = row * kPitch + warp * 64 + quarter * 16;
  const unsigned char* const x_at = ring + (p.stages - kXStages) * p.stage_bytes + from;
  if (kXStages) barrier_wait(known_at, 0);
#pragma unroll
  for (int u = 0; u < kPanels * C::kUnits; ++u) {
    const int k = (u * kWarps + warp) * kUnit + quarter * (kUnit / 4);
#pragma unroll
    for (int j = 0; j < kXTiles; ++j) {
#pragma unroll
      for (int at = 0; at < kUnit / 4; at += 8) {
        uint4 eight{};
        if (j * 8 + row < p.M) {
          const int stage = u / C::kUnits * kXTiles + j, unit = u % C::kUnits;
          eight = *(kXStages ? reinterpret_cast<const uint4*>(x_at + stage * p.stage_bytes + unit * kWarps * 64)
                             : reinterpret_cast<const uint4*>(x + (j * 8 + row) * p.x_row + k + at));
        }
        x_pairs<kFormat>(eight, &xs[u][j][at / 2]);
      }
    }
  }
  if constexpr (kXStages > 0) {
    // Here and below every lane arrives for itself: what it has read is read. One that spoke for its warp would be
    // right too and no faster, but racecheck does not see how it knows.
#pragma unroll
    for (int i = 1; i <= kXStages; ++i) barrier_arrive(empty_at + 8 * (p.stages - i));
  }
  if constexpr (kFold == Fold::kNorm) {
    // [rows, warps], where the sums of the second tile will be: by then all warps have multiplied the first
    float* const all = reinterpret_cast<float*>(memory) + kWarps * kOut;
#pragma unroll
    for (int j = 0; j < kXTiles; ++j) {
      float sum = 0.f;
#pragma unroll
      for (int u = 0; u < kPanels * C::kUnits; ++u) {
#pragma unroll
        for (int i = 0; i < kPairs; ++i) sum = add_squares<T>(sum, xs[u][j][i]);
      }
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      if (quarter == 0) all[(j * 8 + row) * kWarps + warp] = sum;
    }
    sync_threads(1, kWarps * 32);
    float inverse[kXTiles];
#pragma unroll
    for (int j = 0; j < kXTiles; ++j) {
      float sum = 0.f;
#pragma unroll
      for (int i = 0; i < kWarps; ++i) sum += all[(j * 8 + row) * kWarps + i];
      inverse[j] = rsqrtf(sum / (kPanels * kPanel) + p.norm_eps);
    }
#pragma unroll
    for (int u = 0; u < kPanels * C::kUnits; ++u) {
      const uint4 eight = *reinterpret_cast<const uint4*>(norm + u * (kWarps * kUnit) + quarter * (kUnit / 4));
      const unsigned weights[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
      for (int j = 0; j < kXTiles; ++j) {
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          unmade(xs[u][j][i]);
          xs[u][j][i] = scaled<T>(xs[u][j][i], weights[i], inverse[j], p.norm_offset);
        }
      }
    }
  }
  int group[C::kUnits][2];  // where this thread's scales are in a stage; fp4 has two in 16 bytes
  if constexpr (kGroups) {
#pragma unroll
    for (int u = 0; u < C::kUnits; ++u) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        group[u][half] = ((u * kWarps + warp) * kUnit + quarter * (kUnit / 4) + half * 16) >> p.group_shift;
      }
    }
  }
  // A thread's output of a tile, and its sums: whoever has none adds up what others do, and does not store it.
  const int out = threadIdx.x % kOut, out_m = out / kRows;
  int out_n = first * kRows + out % kRows;
  const bool stores = threadIdx.x < kOut && out_m < p.M;
  T* out_y = y + out_m * p.y_row + out_n;
  const auto finish = [&](int tile, float row_scale, T old) {
    const float* const sums = reinterpret_cast<const float*>(memory) + (tile & 1) * (kWarps * kOut) + out;
    barrier_wait(summed_at + 8 * (tile & 1), tile >> 1 & 1);
    if (stores && out_n < p.N) {
      float sum = 0.f;
#pragma unroll
      for (int j = 0; j < kWarps; ++j) sum += sums[j * kOut];
      T result = from_float<T>(kPlain ? sum : sum * row_scale);
      if (kFold == Fold::kAdd) result = from_float<T>(to_float(result) + to_float(old));
      *out_y = result;
    }
    out_n += kRows, out_y += kRows;
  };
  constexpr int kTall = (kXTiles + 1) / 2;       // tiles of 16 rows of x
  constexpr int kChains = kXTiles == 1 ? 2 : 1;  // sums that do not wait for each other
  float row_scale = p.lift, next_scale = p.lift;
  T old{}, next_old{};
  int stage = 0, phase = 0;
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    float acc[kChains][kTall][4] = {};
    if (!kPlain && p.row_scales) {
      const int n = (first + tile) * kRows + out % kRows;
      if (stores && n < p.N) {
        const int at = p.row_scale_rows == 1 ? n : n / p.row_scale_rows;
        next_scale = p.lift * read_scale(p.row_scales + at * p.row_scale_row, 0, p.row_scale_type);
      }
    }
    if (kFold == Fold::kAdd) {  // the outputs before this tile's are still to be finished
      const int ahead = tile > 0 ? kRows : 0;
      if (stores && out_n + ahead < p.N) next_old = out_y[ahead];
    }
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      const unsigned char* const base = ring + stage * p.stage_bytes;
      barrier_wait(full_at + 8 * stage, phase);
#pragma unroll
      for (int begin = 0; begin < C::kUnits; begin += C::kTogether) {
        uint4 raw[C::kTogether];
#pragma unroll
        for (int i = 0; i < C::kTogether; ++i) {
          raw[i] = *reinterpret_cast<const uint4*>(base + from + (begin + i) * kWarps * 64);
        }
#pragma unroll
        for (int i = 0; i < C::kTogether; ++i) {
          const unsigned words[4] = {raw[i].x, raw[i].y, raw[i].z, raw[i].w};
          unsigned b[kPairs];
          if constexpr (kPlain) {
#pragma unroll
            for (int j = 0; j < 4; ++j) b[j] = words[j];
          } else {
            constexpr int kHalves = kFormat == Format::kFp4 ? 2 : 1;
            const unsigned char* const scales = base + kRows * kPitch + row * p.scale_pitch;
#pragma unroll
            for (int half = 0; half < kHalves; ++half) {
              Scale<kFormat, kScaling> scale;
              unsigned zero = 0x43084308u;
              if constexpr (kGroups) {
                const int at = group[begin + i][half];
                scale.read(scales, at, p.scale_type);
                if (kFormat == Format::kInt4 && p.zero) {
                  const unsigned char* const zeros = base + kRows * (kPitch + p.scale_pitch);
                  zero = 0x43004300u + zeros[row * (kPanel >> p.group_shift) + at] * 0x10001u;
                }
              }
#pragma unroll
              for (int j = half * 4 / kHalves; j < (half + 1) * 4 / kHalves; ++j) {
                to_pairs<kFormat, kScaling>(words[j], scale, zero, b + j * (kPairs / 4));
              }
            }
          }
          const auto& v = xs[panel * C::kUnits + begin + i];
#pragma unroll
          for (int j = 0; j < kPairs; j += 4) {
            if constexpr (kXTiles == 1) {
              // the 16 rows are x twice, with the next k in the second half: of each product one half counts
              mma<T>(acc[0][0], v[0][j], v[0][j + 2], v[0][j + 1], v[0][j + 3], b[j], b[j + 1]);
              mma<T>(acc[1][0], v[0][j], v[0][j + 2], v[0][j + 1], v[0][j + 3], b[j + 2], b[j + 3]);
            } else {
#pragma unroll
              for (int i = j; i < j + 4; i += 2) {
#pragma unroll
                for (int t = 0; t < kTall; ++t) {
                  mma<T>(acc[0][t], v[2 * t][i], v[2 * t + 1][i], v[2 * t][i + 1], v[2 * t + 1][i + 1], b[i], b[i + 1]);
                }
              }
            }
          }
        }
      }
      barrier_arrive(empty_at + 8 * stage);
      if (++stage == p.stages) stage = 0, phase ^= 1;
    }
    // what the warps have left of the tile before, when they are all a tile further
    if (tile > 0) finish(tile - 1, row_scale, old);
    row_scale = next_scale, old = next_old;
    float* const sums = reinterpret_cast<float*>(memory) + ((tile & 1) * kWarps + warp) * kOut + lane * 2;
#pragma unroll
    for (int j = 0; j < kXTiles; ++j) {
      float2 two = make_float2(acc[0][j / 2][j % 2 * 2], acc[0][j / 2][j % 2 * 2 + 1]);
      if (kXTiles == 1) two.x += acc[kChains - 1][0][2], two.y += acc[kChains - 1][0][3];
      *reinterpret_cast<float2*>(sums + j * 64) = two;
    }
    barrier_arrive(summed_at + 8 * (tile & 1));  // every lane for itself: what it wrote and has read is done
  }
  if (tiles > 0) finish(tiles - 1, row_scale, old);
#endif
}

}  // namespace skinny
}  // namespace vllm
