// Stored elements of W as bfloat16, two to a register, for quantised_gemm.cuh.
#pragma once

#include "hopper.cuh"

namespace vllm {
namespace quantised {

enum class Format : int { kInt4, kInt8, kFp8, kFp4 };

__host__ __device__ constexpr int elements(Format format) {  // of a word
  return format == Format::kInt4 || format == Format::kFp4 ? 8 : 4;
}

// What is missing from fp8 elements, which no bfloat16 has room for beside all of x: x is made as much larger as leaves
// products and sums ordinary floats, and sums the rest.
constexpr unsigned kLarger = 0x5f805f80u;  // 2^64, twice
// fp4's scales, up to 448, come 2^119 times as large, which bfloat16 just holds. So elements are 2^-7 of the number,
// from 2^-17 to 21: x stays as it is, and only the sums are made larger.
__host__ __device__ constexpr float sums_larger(Format format) {
  return format == Format::kFp8 ? float(int64_t{1} << 56) : format == Format::kFp4 ? 128.f : 1.f;
}

#if __CUDA_ARCH__ >= 900

// Pair i of a word: 4 bits (0,4) (1,5) (2,6) (3,7), int4 128 too large; 8 bits (0,2) (1,3).
template <Format kFormat>
__device__ inline unsigned pair(unsigned word, int i) {
  if constexpr (kFormat == Format::kInt4) {
    return mask_or(word >> (4 * i), 0x000f000fu, 0x43004300u);
  } else if constexpr (kFormat == Format::kInt8) {
    // 128 + the low seven bits, less 256, or 128 where the high bit is set
    const unsigned bytes = word >> (8 * i);
    return sub2(mask_or(bytes, 0x007f007fu, 0x43004300u), mask_not_or(bytes, 0x00800080u, 0x43004300u));
  } else if constexpr (kFormat == Format::kFp4) {
    // Exponent and mantissa are bfloat16's but for the bias, 2^-126 of the number, where the sign is six bits further
    // up. Signs come there for two pairs at once, one of which is then in its place.
    const unsigned two =
        i < 2 ? choose_bits(0x88008800u, word << 8, word << 2) : choose_bits(0x88008800u, word, word >> 6);
    return (i % 2 == 0 ? two << 4 : two) & 0x81c081c0u;
  } else {  // the same of 8 bits: 2^-120 of the number
    const unsigned bytes = word << (8 - 8 * i);
    return (bytes & 0x80008000u) | (bytes >> 4 & 0x07f007f0u);
  }
}

// fp4's scales in bytes i and i + 2 of a word, 2^119 times as large.
__device__ inline unsigned large_scales(unsigned word, int i) {
  return mul2(mul2(pair<Format::kFp8>(word, i), 0x7f007f00u), 0x77807780u);  // 2^127 and 2^112
}

#endif

}  // namespace quantised
}  // namespace vllm
