// The device side of quantised_gemm.cu where a block has but one tile of W, and each of its warps few chunks of that.
//
// Then a launch takes as long as what happens after x is known. So W becomes bfloat16 before that, exactly and with its
// zero points taken off, and stays in registers: what is left is to fetch x, to multiply, and to add up.
#pragma once

#include "quantised_gemm.cuh"

namespace vllm {
namespace quantised {

#if __CUDA_ARCH__ >= 900

// A lane's part of a chunk: the left operands of its products, of row lane / 4 and of the one 8 further down.
template <typename K>
struct Ready {
  static constexpr int kPairs = elements(K::kFormat) / 2;
  unsigned pairs[4][kPairs][2];
  float scale[K::kGroups][2];

  // Arguments as in multiply_steps.
  __device__ void read(const unsigned char* scales, const unsigned char* zeros, unsigned words, const ScaleRows<K>& own,
                       int group, int type) {
    Scales<K> s;
#pragma unroll
    for (int step = 0; step < 4; step += 2) {
      if (!K::kRow && step % K::kShare == 0) read_scales<K>(s, scales, zeros, step, 0, own, group, type);
      unsigned w[4];
      load_tiles(w, words + step * 16);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = step + i / 2, which = i / 2 * (Scales<K>::kGroups - 1), half = i % 2;
        if (!K::kRow && !K::kFp4) scale[at / K::kShare][half] = s.scale[half][which];
        unsigned less = 0x43084308u;  // 136
        if (K::kZero) less = __byte_perm(__float_as_uint(-s.less[half][which]), 0, 0x3232);
#pragma unroll
        for (int j = 0; j < kPairs; ++j) {
          const unsigned two = pair<K::kFormat>(w[i], j);
          pairs[at][j][half] = K::kFormat == Format::kInt4   ? sub2(two, less)
                               : K::kFormat == Format::kFp8  ? mul2(two, 0x7b807b80u)  // 2^120
                               : K::kFormat == Format::kInt8 ? two
                                                             : mul2(two, s.factor[half][which]);
        }
      }
    }
  }
};

#endif

// Of a problem with no more tiles than blocks and at most K::kKeep chunks a warp.
template <typename K>
__global__ void __launch_bounds__(kWarps * 32, K::kWide > 1 ? 1 : 2)
    quantised_once_kernel(bf16* y, const bf16* x, const __grid_constant__ Problem p) {
#if __CUDA_ARCH__ >= 900
  constexpr int kWide = K::kWide, kRows = K::kRows, kKept = K::kKeep;
  static_assert(K::kTall == 1 && K::kAsked == 1 && kKept > 0, "");
  let_successor_start();
  const int lane = threadIdx.x % 32, row = lane / 4, quarter = lane % 4;
  const int warp = __shfl_sync(0xffffffffu, int(threadIdx.x / 32), 0);
  const int chunks = p.row_bytes / kChunk, tile = blockIdx.x, n = out_row<K, 1>(tile);
  const int begin = chunks * warp / kWarps, mine = chunks * (warp + 1) / kWarps - begin;
  float* const sums = reinterpret_cast<float*>(dynamic_memory());
  unsigned char* const ring = dynamic_memory() + K::kTileSums * 4 + warp * (kKept * K::kStage);
  const unsigned ring_at = shared_address(ring);

  Asker<K> asker(p, lane, begin, mine, tile, mine);
#pragma unroll
  for (int i = 0; i < kKept; ++i) asker.ask(ring_at + i * K::kStage);
  float factor = K::kFp4 ? sums_larger(K::kFormat) : 1.f;
  if (K::kFp4 && p.row_scale != nullptr) factor *= p.row_scale[min(n, p.N - 1)];
  if (K::kRow)
    factor = scale_value(scale_bits(p.scale + uint64_t(scale_row(p, n)) * p.scale_row, 0, p.scale_type), p.scale_type);
  ScaleRows<K> own{};
  if constexpr (!K::kRow && K::kGroups == 1) own = scale_rows<K>(p, tile * kRows + row);
  copy_wait<0>();
  __syncwarp();
  Ready<K> w[kKept];
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    const int stage = i * K::kStage;
    const unsigned char* const scales = ring + stage + kRows * kPitch + row * K::kScaleSlot;
    const unsigned char* const zeros = ring + stage + kRows * (kPitch + K::kScaleSlot) + row * K::kZeroSlot;
    const unsigned words_at = ring_at + stage + lane % 16 * kPitch + lane / 16 * 16;
    if (i < mine) w[i].read(scales, zeros, words_at, own, (begin + i) >> p.shared_chunks, p.scale_type);
  }
  wait_for_predecessor();

  float acc[1][kWide][4] = {};
  Raw<K> raw[kKept][kWide];
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
#pragma unroll
    for (int j = 0; j < kWide; ++j) {
      const int from = min(j * kColumns + row, p.M - 1) * int(p.x_row) + quarter * elements(K::kFormat);
      if (i < mine) raw[i][j].template load<4>(x + from, begin + i, 0);
    }
  }
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    if (i < mine) {
#pragma unroll
      for (int j = 0; j < kWide; ++j) {
        float c[4] = {};  // of each chunk its own: no product waits for another chunk's
#pragma unroll
        for (int step = 0; step < 4; ++step) {
          unsigned v[Ready<K>::kPairs];
          in_order<K>(v, raw[i][j].words[step]);
#pragma unroll
          for (int k = 0; k < Ready<K>::kPairs; k += 2) {
            const auto& a = w[i].pairs[step];
            mma<bf16>(c, a[k][0], a[k][1], a[k + 1][0], a[k + 1][1], v[k], v[k + 1]);
          }
          if (step % K::kShare == K::kShare - 1) {
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              acc[0][j][k] += K::kOneSum ? c[k] : w[i].scale[step / K::kShare][k / 2] * c[k];
              c[k] = 0.f;
            }
          }
        }
      }
    }
  }
  put_sums<K>(sums, acc);
  __syncthreads();
  add_up<K, 1>(y, sums, factor, p, tile, p.N);
#endif
}

}  // namespace quantised
}  // namespace vllm
