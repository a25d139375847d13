// Which of quantised_gemm.cuh's kernels multiplies with a weight.
#pragma once

#include "quantised_once.cuh"

namespace vllm {
namespace quantised {

// How the kernel meets the scales; share 0: it cannot.
struct Plan {
  Scaling scaling;
  int share;
};

// Plans for scales of these columns, of which the rest of `p` is known.
inline Plan plan_scales(Problem& p, Format format, int64_t columns, int64_t group) {
  const int64_t step = 4 * elements(format), whole = 4 * step;
  if (format == Format::kFp4) {  // two groups of a step as one
    if (group != 16) return {};
    group = step;
  }
  int bits = 0;
  while (int64_t{1} << bits < p.scale_rows) ++bits;
  p.inverse_shift = 31 + bits;  // exact for all n below 2^31
  p.inverse = unsigned(((int64_t{1} << p.inverse_shift) + p.scale_rows - 1) / p.scale_rows);
  if (group >= columns && elements(format) == 4) return {Scaling::kRow, 4};
  int64_t chunks = 1;  // that share a scale
  while (whole * chunks < group && whole * chunks < columns) chunks *= 2, ++p.shared_chunks;
  const bool few = group < whole;
  const int share = few ? int(group / step) : 4;
  const bool known = share == 4 || (share == 1 && elements(format) == 8) || (share == 2 && format == Format::kInt8);
  if (!known || columns % whole != 0 || (few ? group % step != 0 : group < columns && whole * chunks != group))
    return {};
  // Several of a row come in one piece, which has to begin at a multiple of its size.
  const auto aligned = [&](const unsigned char* at, int64_t row, int size) {
    const int64_t rows = (p.N + p.scale_rows - 1) / p.scale_rows, piece = 4 / share * size;
    return !few || (reinterpret_cast<uintptr_t>(at) % piece == 0 && (rows == 1 || row % piece == 0));
  };
  if (!aligned(p.scale, p.scale_row, p.scale_type == 2 ? 4 : 2) || !aligned(p.zero, p.zero_row, 1)) return {};
  return {p.scale_type == 0 ? Scaling::kShort : Scaling::kAny, share};
}

constexpr int kTallBytes = 144 << 10;  // shared memory enough for tall tiles and any rows of x

// Calls run with the kind of kernel for a problem, so many blocks, two to a multiprocessor, and as many bytes of shared
// memory for each; and with whether it is the kernel for one tile a block.
template <typename Run>
void with_kind(const Problem& p, Format format, Plan plan, int blocks, int memory, Run run) {
  using std::integral_constant;
  // Every tile reads all of x again, be it flat or tall.
  const auto bytes = [&](int rows) {  // that pass through the busiest block
    const int64_t tiles = (p.N + rows - 1) / rows, x = int64_t{2} * p.M * p.row_bytes * elements(format) / 4;
    return (tiles + blocks - 1) / blocks * (int64_t{1} * rows * p.row_bytes + x);
  };
  const bool tall = memory >= kTallBytes && bytes(2 * kTile) < bytes(kTile);
  const auto of = [&](auto form, auto scaling, auto zero, auto share) {
    constexpr Format kFormat = decltype(form)::value;
    constexpr Scaling kScaling = decltype(scaling)::value;
    constexpr bool kZero = decltype(zero)::value;
    constexpr int kShare = decltype(share)::value;
    constexpr int kKeep = elements(kFormat) == 8 ? 2 : 4;
    // Four bits come with as many requests for scales as for weights, unless a tile's are asked for together.
    constexpr int kAsked = elements(kFormat) == 8 ? 2 : 1;
    // Where a warp's part of x has room in registers it is fetched once, but for int4's sums and sixteen rows of x.
    const bool few = p.row_bytes <= kKeep * kWarps * kChunk;
    const bool keep = few && (kAsked == 1 || p.row_bytes % (kAsked * kWarps * kChunk) == 0);
    const bool once = few && 2 * ((p.N + kTile - 1) / kTile) <= blocks;
    constexpr std::true_type one_tile{};
    constexpr std::false_type many{};
    if (p.M > 16 && tall) return run(Kind<kFormat, kScaling, kZero, kShare, 4, 2, 0>(), many);
    if (p.M > 16) return run(Kind<kFormat, kScaling, kZero, kShare, 4, 1, 0>(), many);
    if (p.M > 8 && once) return run(Kind<kFormat, kScaling, kZero, kShare, 2, 1, kKeep>(), one_tile);
    if constexpr (kFormat != Format::kInt4) {
      if (p.M > 8 && keep) return run(Kind<kFormat, kScaling, kZero, kShare, 2, 1, kKeep, kAsked>(), many);
    }
    if (p.M > 8 && tall) return run(Kind<kFormat, kScaling, kZero, kShare, 2, 2, 0>(), many);
    if (p.M > 8) return run(Kind<kFormat, kScaling, kZero, kShare, 2, 1, 0>(), many);
    if (once) return run(Kind<kFormat, kScaling, kZero, kShare, 1, 1, kKeep>(), one_tile);
    if (keep) return run(Kind<kFormat, kScaling, kZero, kShare, 1, 1, kKeep, kAsked>(), many);
    if (tall) return run(Kind<kFormat, kScaling, kZero, kShare, 1, 2, 0>(), many);
    return run(Kind<kFormat, kScaling, kZero, kShare, 1, 1, 0>(), many);
  };
  constexpr integral_constant<Scaling, Scaling::kShort> shorts{};
  constexpr integral_constant<Scaling, Scaling::kAny> any{};
  constexpr integral_constant<Scaling, Scaling::kRow> row{};
  constexpr integral_constant<int, 1> one{};
  constexpr integral_constant<int, 2> two{};
  constexpr integral_constant<int, 4> four{};
  constexpr std::false_type no_zero{};
  const auto typed = [&](auto form, auto zero, auto share) {
    return plan.scaling == Scaling::kShort ? of(form, shorts, zero, share) : of(form, any, zero, share);
  };
  if (format == Format::kInt4) {
    constexpr integral_constant<Format, Format::kInt4> int4{};
    const auto with = [&](auto zero) { return plan.share == 1 ? typed(int4, zero, one) : typed(int4, zero, four); };
    return p.zero != nullptr ? with(std::true_type()) : with(no_zero);
  }
  if (format == Format::kFp4) return of(integral_constant<Format, Format::kFp4>(), shorts, no_zero, one);
  constexpr integral_constant<Format, Format::kInt8> int8{};
  constexpr integral_constant<Format, Format::kFp8> fp8{};
  if (plan.scaling == Scaling::kRow) {
    return format == Format::kInt8 ? of(int8, row, no_zero, four) : of(fp8, row, no_zero, four);
  }
  if (format == Format::kFp8) return typed(fp8, no_zero, four);
  return plan.share == 2 ? typed(int8, no_zero, two) : typed(int8, no_zero, four);
}

}  // namespace quantised
}  // namespace vllm
