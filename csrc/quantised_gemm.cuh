// The device side of quantised_gemm.cu: y = x W' for a few rows of x and weights of 4 or 8 bits, at the speed at which
// W arrives from memory.
//
// W is the 16-row operand of mma.sync and x the 8-column one, so that of each product nothing is thrown away but the
// columns that x has not. A step is 16 bytes of a row, a word for each lane of a quad; a chunk is four steps. Elements
// become bfloat16 in registers, in the order in which that takes fewest instructions, and x is put into the same order.
// A group's scale multiplies the sum over the group and not the elements; so does what int4 has too much (128 and the
// zero point), times the sum of the group's x, which is one more product, with ones.
//
// A block walks over tiles of 16 rows. One warp asks the copy engine for them, with their scales, into a ring of stages
// in shared memory; eight warps multiply, each every eighth chunk, and add up what they have at the end of a tile.
#pragma once

#include "hopper.cuh"

namespace vllm {
namespace quantised {

using bf16 = __nv_bfloat16;

enum class Format : int { kInt4, kInt8, kFp8 };

// Where the kernel finds the scales of groups: in the ring (bfloat16 or float32), where they are, or nowhere, since
// there is one a row.
enum class Scaling : int { kShort, kFloat, kInPlace, kRow };

constexpr int kTile = 16;     // rows of W
constexpr int kColumns = 8;   // rows of x in a product
constexpr int kWarps = 8;     // that multiply
constexpr int kChunk = 64;    // bytes of a row: four steps
constexpr int kPanel = 1024;  // bytes of a row in a stage
constexpr int kPad = 16;      // bytes after each row of a stage, so that eight rows lie in different banks
constexpr int kMostStages = 16;
constexpr int kSumPitch =
    20;  // floats from one column of a tile's sums to the next: written and read without conflicts

struct Problem {
  int M, N;
  int row_bytes;  // of W
  int stages, stage_bytes;
  int late;              // stages still to ask for when the next kernel may start
  int64_t x_row, y_row;  // elements
  const unsigned char *w, *scale, *zero;
  int64_t w_row, scale_row, zero_row;  // bytes
  int scale_rows;                      // rows of W that share a scale
  int scale_type;                      // 0: bfloat16, 1: float16, 2: float32
  int shared_chunks;                   // chunks that share a scale, as a power of two
  int scale_pitch, zero_pitch;         // bytes of a row's in a stage; 0: they are read where they are
};

__host__ __device__ constexpr int elements(Format format) { return format == Format::kInt4 ? 8 : 4; }  // of a word

// Bytes of shared memory for the warps' sums of two tiles.
__host__ __device__ constexpr int sum_bytes(int wide) { return 2 * kWarps * kColumns * wide * kSumPitch * 4; }

#if __CUDA_ARCH__ >= 900

// Pair i of a word: int4 (0,4) (1,5) (2,6) (3,7), 128 too large; 8 bits (0,2) (1,3).
template <Format kFormat>
__device__ inline unsigned pair(unsigned word, int i) {
  if constexpr (kFormat == Format::kInt4) {
    return mask_or(word >> (4 * i), 0x000f000fu, 0x43004300u);
  } else if constexpr (kFormat ==
                       Format::kInt8) {  // 128 + the low seven bits, less 256, or 128 where the high bit is set
    const unsigned bytes = word >> (8 * i);
    return sub2(mask_or(bytes, 0x007f007fu, 0x43004300u), (bytes & 0x00800080u) ^ 0x43804380u);
  } else {  // exponent and mantissa are bfloat16's but for the bias, 120 less
    const unsigned bytes = word << (8 - 8 * i);
    return mul2((bytes & 0x80008000u) | (bytes >> 4 & 0x07f007f0u), 0x7b807b80u);
  }
}

__device__ inline float read_scale(const unsigned char* scales, int index, int type) {
  if (type == 2) return reinterpret_cast<const float*>(scales)[index];
  const unsigned short bits = reinterpret_cast<const unsigned short*>(scales)[index];
  return type == 1 ? __half2float(__ushort_as_half(bits)) : __uint_as_float(unsigned(bits) << 16);
}

// One lane's part of a chunk of x: the pairs of its columns, and for int4 the sums of each step, over all lanes.
template <Format kFormat>
struct Part {
  static constexpr int kPairs = elements(kFormat) / 2;
  unsigned pairs[4][kPairs];
  float sums[4][2];  // of columns 2 * (lane % 4) and the next

  // x: the lane's row and column of step 0.
  __device__ void load(const bf16* x, int chunk) {
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const bf16* const from = x + (chunk * 4 + step) * (4 * elements(kFormat));
      if constexpr (kFormat == Format::kInt4) {
        const uint4 v = *reinterpret_cast<const uint4*>(from);
        pairs[step][0] = v.x, pairs[step][1] = v.y, pairs[step][2] = v.z, pairs[step][3] = v.w;
      } else {
        const uint2 v = *reinterpret_cast<const uint2*>(from);
        pairs[step][0] = v.x, pairs[step][1] = v.y;
      }
    }
  }
  // To be called once, when the loads may be waited for.
  __device__ void prepare() {
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      unsigned v[kPairs];
#pragma unroll
      for (int i = 0; i < kPairs; ++i) v[i] = pairs[step][i];
#pragma unroll
      for (int i = 0; i < kPairs / 2; ++i) {
        pairs[step][2 * i] = __byte_perm(v[i], v[i + kPairs / 2], 0x5410);
        pairs[step][2 * i + 1] = __byte_perm(v[i], v[i + kPairs / 2], 0x7632);
      }
      if constexpr (kFormat == Format::kInt4) {
        constexpr unsigned kOnes = 0x3f803f80u;
        float c[4] = {0.f, 0.f, 0.f, 0.f};
        mma<bf16>(c, kOnes, kOnes, kOnes, kOnes, pairs[step][0], pairs[step][1]);
        mma<bf16>(c, kOnes, kOnes, kOnes, kOnes, pairs[step][2], pairs[step][3]);
        sums[step][0] = c[0], sums[step][1] = c[1];
      }
    }
  }
};

// A lane's scales and zero points of one chunk, of row lane / 4 and of the one 8 further down.
template <Scaling kScaling, bool kZero, int kShare>
struct Scales {
  static constexpr int kGroups = 4 / kShare;
  float scale[2][kGroups], zero[2][kGroups];

  // scales, zeros: of the lower row; pitches: bytes to the other.
  __device__ void read(const unsigned char* scales, int scale_pitch, const unsigned char* zeros, int zero_pitch,
                       int chunk, const Problem& p) {
    const int group = kGroups > 1 ? chunk * kGroups : chunk >> p.shared_chunks;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const unsigned char* const from = scales + half * scale_pitch;
      if constexpr (kScaling == Scaling::kShort && kGroups == 4) {
        const uint2 four = *reinterpret_cast<const uint2*>(from + group * 2);
        const unsigned twos[2] = {four.x, four.y};
#pragma unroll
        for (int j = 0; j < kGroups; ++j) {
          scale[half][j] = __uint_as_float(j % 2 == 0 ? twos[j / 2] << 16 : twos[j / 2] & 0xffff0000u);
        }
      } else {
        const int type = kScaling == Scaling::kShort ? 0 : kScaling == Scaling::kFloat ? 2 : p.scale_type;
#pragma unroll
        for (int j = 0; j < kGroups; ++j) scale[half][j] = read_scale(from, group + j, type);
      }
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
        zero[half][j] = kZero ? -128.f - float(zeros[half * zero_pitch + group + j]) : -136.f;
      }
    }
  }
};

// acc += a chunk of 16 rows times kWide parts of x. words: the lane's of step 0, row lane / 4.
template <Format kFormat, Scaling kScaling, bool kZero, int kShare, int kWide>
__device__ inline void multiply(float (&acc)[kWide][4], const unsigned char* words, const Part<kFormat> (&x)[kWide],
                                const Scales<kScaling, kZero, kShare>& s) {
  constexpr int kGroups = 4 / kShare, kSteps = kShare;
  constexpr bool kRow = kScaling == Scaling::kRow;
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    float c[kWide][4] = {}, sum[kWide][2] = {};
#pragma unroll
    for (int step = group * kSteps; step < (group + 1) * kSteps; ++step) {
      const unsigned low = *reinterpret_cast<const unsigned*>(words + step * 16);
      const unsigned high = *reinterpret_cast<const unsigned*>(words + 8 * (kPanel + kPad) + step * 16);
#pragma unroll
      for (int i = 0; i < elements(kFormat) / 2; i += 2) {
        const unsigned a[4] = {pair<kFormat>(low, i), pair<kFormat>(high, i), pair<kFormat>(low, i + 1),
                               pair<kFormat>(high, i + 1)};
#pragma unroll
        for (int j = 0; j < kWide; ++j) {
          mma<bf16>(kRow ? acc[j] : c[j], a[0], a[1], a[2], a[3], x[j].pairs[step][i], x[j].pairs[step][i + 1]);
        }
      }
      if constexpr (kFormat == Format::kInt4) {
#pragma unroll
        for (int j = 0; j < kWide; ++j) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            sum[j][i] = step == group * kSteps ? x[j].sums[step][i] : sum[j][i] + x[j].sums[step][i];
          }
        }
      }
    }
    if constexpr (!kRow) {
#pragma unroll
      for (int j = 0; j < kWide; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float product = kFormat == Format::kInt4 ? c[j][i] + s.zero[i / 2][group] * sum[j][i % 2] : c[j][i];
          acc[j][i] += s.scale[i / 2][group] * product;
        }
      }
    }
  }
}

#endif

// kShare: steps that share a scale, 4 for a chunk or more. kWide: eights of x's rows. kKeep: chunks
// of x that a warp keeps in registers, all that it ever needs; 0: it reads them again for each tile.
template <Format kFormat, Scaling kScaling, bool kZero, int kShare, int kWide, int kKeep>
__global__ void __launch_bounds__((kWarps + 1) * 32, 1)
    quantised_gemm_kernel(bf16* y, const bf16* x, const __grid_constant__ Problem p) {
#if __CUDA_ARCH__ >= 900
  constexpr int kOut = kColumns * kWide, kPitch = kPanel + kPad, kChunks = kPanel / kChunk;
  constexpr int kTurns = kChunks / kWarps;  // chunks of a stage that a warp takes
  constexpr bool kRow = kScaling == Scaling::kRow, kInRing = kScaling == Scaling::kShort || kScaling == Scaling::kFloat;
  constexpr int kScaleSize = kScaling == Scaling::kShort ? 2 : 4;
  unsigned char* const memory = dynamic_memory();
  __shared__ uint64_t full[kMostStages], empty[kMostStages];
  const unsigned full_at = shared_address(full), empty_at = shared_address(empty);
  unsigned char* const ring = memory + sum_bytes(kWide);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int all_tiles = (p.N + kTile - 1) / kTile, panels = (p.row_bytes + kPanel - 1) / kPanel;
  const int first = int64_t(all_tiles) * blockIdx.x / gridDim.x;
  const int tiles = int(int64_t(all_tiles) * (blockIdx.x + 1) / gridDim.x) - first;
  if (threadIdx.x == 0) {
    for (int i = 0; i < p.stages; ++i) barrier_init(full_at + 8 * i, 1), barrier_init(empty_at + 8 * i, kWarps * 32);
    barrier_init_done();
  }
  __syncthreads();

  if (warp == kWarps) {
    const unsigned ring_at = shared_address(ring), row = lane % kTile;
    int stage = 0, phase = 1, left = tiles * panels;
    const int late = min(p.late, left - 1);
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      const int n = (first + tile) * kTile + row, rows = min(kTile, p.N - (first + tile) * kTile);
      const int64_t group_row = n / p.scale_rows;
#pragma unroll 1
      for (int panel = 0; panel < panels; ++panel) {
        // Weights do not change while a model runs, so the first ones need not wait for the kernel that writes x.
        const int bytes = min(kPanel, p.row_bytes - panel * kPanel), chunks = bytes / kChunk;
        const auto groups = [&](int of) { return kShare < 4 ? of * (4 / kShare) : of >> p.shared_chunks; };
        const int scales = kInRing ? groups(chunks) * kScaleSize : 0, zeros = kInRing && kZero ? groups(chunks) : 0;
        barrier_wait(empty_at + 8 * stage, phase);
        const unsigned to = ring_at + stage * p.stage_bytes, done = full_at + 8 * stage;
        if (lane == 0) barrier_expect(done, rows * (bytes + scales + zeros));
        __syncwarp();
        if (row < rows) {
          if (lane < kTile) {
            bulk_copy(to + row * kPitch, p.w + n * p.w_row + panel * kPanel, bytes, done);
          } else if (kInRing) {
            const int before = groups(panel * kChunks);
            bulk_copy(to + kTile * kPitch + row * p.scale_pitch,
                      p.scale + group_row * p.scale_row + before * kScaleSize, scales, done);
            if (kZero) {
              bulk_copy(to + kTile * (kPitch + p.scale_pitch) + row * p.zero_pitch,
                        p.zero + group_row * p.zero_row + before, zeros, done);
            }
          }
        }
        if (--left == late) let_successor_start();
        if (++stage == p.stages) stage = 0, phase ^= 1;
      }
    }
    wait_for_predecessor();
    return;
  }

  wait_for_predecessor();
  const int row = lane / 4, quarter = lane % 4;
  const bf16* from[kWide];
#pragma unroll
  for (int j = 0; j < kWide; ++j) {
    from[j] = x + min(j * kColumns + row, p.M - 1) * p.x_row + quarter * elements(kFormat);
  }
  constexpr int kKept = kKeep > 0 ? kKeep : 1;
  Part<kFormat> kept[kKept][kWide];
  if constexpr (kKeep > 0) {
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const int chunk = i * kWarps + warp;
      if (chunk * kChunk < p.row_bytes) {
#pragma unroll
        for (int j = 0; j < kWide; ++j) kept[i][j].load(from[j], chunk), kept[i][j].prepare();
      }
    }
  }
  int stage = 0, phase = 0;
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    const int out_row = threadIdx.x % kTile, n = (first + tile) * kTile + out_row;  // of this thread's outputs
    float row_scale = 1.f;
    if (kRow && n < p.N) row_scale = read_scale(p.scale + n / p.scale_rows * p.scale_row, 0, p.scale_type);
    float acc[kWide][4] = {};
    const auto take = [&](int panel, int turn, const unsigned char* base, const Part<kFormat>(&part)[kWide]) {
      const int chunk = turn * kWarps + warp;
      Scales<kScaling, kZero, kShare> s;
      if constexpr (kInRing) {
        const unsigned char* const scales = base + kTile * kPitch;
        s.read(scales + row * p.scale_pitch, 8 * p.scale_pitch, scales + kTile * p.scale_pitch + row * p.zero_pitch,
               8 * p.zero_pitch, chunk, p);
      } else if constexpr (!kRow) {
        const int low = min((first + tile) * kTile + row, p.N - 1) / p.scale_rows;
        const int high = min((first + tile) * kTile + row + 8, p.N - 1) / p.scale_rows;
        s.read(p.scale + low * p.scale_row, (high - low) * int(p.scale_row), p.zero + low * p.zero_row,
               (high - low) * int(p.zero_row), panel * kChunks + chunk, p);
      }
      multiply<kFormat, kScaling, kZero, kShare, kWide>(acc, base + row * kPitch + quarter * 4 + chunk * kChunk, part,
                                                        s);
    };
    const auto next_stage = [&] {
      barrier_arrive(empty_at + 8 * stage);
      if (++stage == p.stages) stage = 0, phase ^= 1;
    };
    if constexpr (kKeep > 0) {
#pragma unroll
      for (int panel = 0; panel < kKeep / kTurns; ++panel) {
        if (panel < panels) {
          barrier_wait(full_at + 8 * stage, phase);
#pragma unroll
          for (int turn = 0; turn < kTurns; ++turn) {
            if (panel * kPanel + (turn * kWarps + warp) * kChunk < p.row_bytes) {
              take(panel, turn, ring + stage * p.stage_bytes, kept[panel * kTurns + turn]);
            }
          }
          next_stage();
        }
      }
    } else {
#pragma unroll 1
      for (int panel = 0; panel < panels; ++panel) {
        const int chunks = min(kChunks, (p.row_bytes - panel * kPanel) / kChunk);
        bool waited = false;
#pragma unroll 1
        for (int turn = 0; turn < kTurns; ++turn) {
          const int chunk = turn * kWarps + warp;
          if (chunk >= chunks) break;
#pragma unroll
          for (int j = 0; j < kWide; ++j) kept[0][j].load(from[j], panel * kChunks + chunk);
          if (!waited) barrier_wait(full_at + 8 * stage, phase), waited = true;
#pragma unroll
          for (int j = 0; j < kWide; ++j) kept[0][j].prepare();
          take(panel, turn, ring + stage * p.stage_bytes, kept[0]);
        }
        if (!waited) barrier_wait(full_at + 8 * stage, phase);
        next_stage();
      }
    }
    // [warps, columns, rows]; whoever writes a buffer again has met all who read it, at the tile between
    float* const sums = reinterpret_cast<float*>(memory) + (tile & 1) * (kWarps * kOut * kSumPitch);
#pragma unroll
    for (int j = 0; j < kWide; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums[(warp * kOut + j * kColumns + 2 * quarter + i % 2) * kSumPitch + row + i / 2 * 8] = acc[j][i];
      }
    }
    sync_threads(1, kWarps * 32);
#pragma unroll
    for (int column = threadIdx.x / kTile; column < kOut; column += kWarps * 32 / kTile) {
      float sum = 0.f;
#pragma unroll
      for (int j = 0; j < kWarps; ++j) sum += sums[(j * kOut + column) * kSumPitch + out_row];
      if (column < p.M && n < p.N) y[column * p.y_row + n] = __float2bfloat16_rn(sum * row_scale);
    }
  }
#endif
}

// How the kernel meets the scales; share 0: it cannot.
struct Plan {
  Scaling scaling;
  int share;
};

// Plans for scales of these columns, of which the rest of `p` is known; those that the copy engine brings have to come
// in pieces of 16 bytes for every panel.
inline Plan plan_scales(Problem& p, Format format, int64_t columns, int64_t group) {
  const int64_t step = 4 * elements(format), whole = 4 * step, in_panel = kPanel / kChunk;
  const int size = p.scale_type == 2 ? 4 : 2;
  if (group >= columns && format != Format::kInt4) return {Scaling::kRow, 4};
  int64_t chunks = 1;  // that share a scale
  while (whole * chunks < group && whole * chunks < columns) chunks *= 2, ++p.shared_chunks;
  const bool few = group < whole;
  const int share = few ? int(group / step) : 4;
  const bool known = share == 4 || (share == 1 && format == Format::kInt4) || (share == 2 && format == Format::kInt8);
  if (!known || columns % whole != 0 || (few ? group % step != 0 : group < columns && whole * chunks != group))
    return {};
  const auto pieces = [&](int64_t row_bytes) {  // of one panel
    const int64_t here = row_bytes / kChunk, n = few ? here * (whole / group) : here / chunks;
    return (few || here % chunks == 0) && n * size % 16 == 0 && (p.zero == nullptr || n % 16 == 0);
  };
  const auto aligned = [](const unsigned char* at, int64_t row) {
    return reinterpret_cast<uintptr_t>(at) % 16 == 0 && row % 16 == 0;
  };
  const bool has_ring = share != 2 && (p.scale_type == 0 || (p.scale_type == 2 && format != Format::kInt4));
  const int64_t first = p.row_bytes < kPanel ? p.row_bytes : kPanel;
  if (!has_ring || chunks > in_panel || !pieces(first) || !pieces(p.row_bytes % kPanel) ||
      !aligned(p.scale, p.scale_row) || (p.zero != nullptr && !aligned(p.zero, p.zero_row))) {
    return {Scaling::kInPlace, share};
  }
  const int64_t most = few ? in_panel * (whole / group) : in_panel / chunks;
  p.scale_pitch = int(most * size + 16);
  p.zero_pitch = p.zero == nullptr ? 0 : int(most + 16);
  return {p.scale_type == 0 ? Scaling::kShort : Scaling::kFloat, share};
}

// Calls run with the kernel for a problem.
template <typename Run>
void with_kernel(const Problem& p, Format format, Plan plan, Run run) {
  using std::integral_constant;
  const auto of = [&](auto form, auto scaling, auto zero, auto share) {
    constexpr Format kFormat = decltype(form)::value;
    constexpr Scaling kScaling = decltype(scaling)::value;
    constexpr bool kZero = decltype(zero)::value;
    constexpr int kShare = decltype(share)::value;
    if (p.M > 16) return run(quantised_gemm_kernel<kFormat, kScaling, kZero, kShare, 4, 0>, 4);
    if (p.M > 8) return run(quantised_gemm_kernel<kFormat, kScaling, kZero, kShare, 2, 0>, 2);
    if (p.row_bytes <= kPanel) return run(quantised_gemm_kernel<kFormat, kScaling, kZero, kShare, 1, 2>, 1);
    return run(quantised_gemm_kernel<kFormat, kScaling, kZero, kShare, 1, 0>, 1);
  };
  constexpr integral_constant<Scaling, Scaling::kShort> shorts{};
  constexpr integral_constant<Scaling, Scaling::kFloat> floats{};
  constexpr integral_constant<Scaling, Scaling::kInPlace> in_place{};
  constexpr integral_constant<Scaling, Scaling::kRow> row{};
  constexpr integral_constant<int, 1> one{};
  constexpr integral_constant<int, 2> two{};
  constexpr integral_constant<int, 4> four{};
  constexpr std::false_type no_zero{};
  if (format == Format::kInt4) {
    constexpr integral_constant<Format, Format::kInt4> int4{};
    const auto shared = [&](auto zero, auto share) {
      plan.scaling == Scaling::kShort ? of(int4, shorts, zero, share) : of(int4, in_place, zero, share);
    };
    const auto with = [&](auto zero) { plan.share == 1 ? shared(zero, one) : shared(zero, four); };
    return p.zero != nullptr ? with(std::true_type()) : with(no_zero);
  }
  const auto eight_bits = [&](auto form) {
    switch (plan.scaling) {
      case Scaling::kRow:
        return of(form, row, no_zero, four);
      case Scaling::kShort:
        return of(form, shorts, no_zero, four);
      case Scaling::kFloat:
        return of(form, floats, no_zero, four);
      case Scaling::kInPlace:
        return plan.share == 2 ? of(form, in_place, no_zero, two) : of(form, in_place, no_zero, four);
    }
  };
  if (format == Format::kInt8) return eight_bits(integral_constant<Format, Format::kInt8>());
  return eight_bits(integral_constant<Format, Format::kFp8>());
}

}  // namespace quantised
}  // namespace vllm
