// y = x W' for a few rows of x; how is told in skinny_gemm.cuh, when in layers/ops/skinny_gemm.py.

#include <algorithm>
#include <optional>

#include "common.cuh"
#include "skinny_gemm.cuh"

namespace vllm {
namespace {

using skinny::Cut;
using skinny::Fold;
using skinny::Format;
using skinny::Problem;
using skinny::Scaling;

template <typename T, Format kFormat, Scaling kScaling, int kXTiles, int kPanel, int kPanels, Fold kFold>
void run(const Tensor& out, const Tensor& x, Problem p, int ring) {
  using C = Cut<kFormat, kXTiles, kPanel, kPanels>;
  const int device = x.get_device_index();
  int processors = 0, limit = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  const auto kernel = skinny::skinny_gemm_kernel<T, kFormat, kScaling, kXTiles, kPanel, kPanels, kFold>;
  cudaFuncAttributes own{};
  STD_CUDA_CHECK(cudaFuncGetAttributes(&own, kernel));
  int groups = 0;
  if (p.scale != nullptr) {
    groups = kPanel >> p.group_shift;
    p.scale_pitch = groups * (p.scale_type == 3 ? 1 : p.scale_type == 2 ? 4 : 2);
    STD_TORCH_CHECK(p.scale_pitch % 16 == 0 && (p.zero == nullptr || groups % 16 == 0), groups, " scales or zeros of ",
                    kPanel, " columns cannot be copied as pieces of 16 bytes");
  }
  p.stage_bytes = skinny::kRows * (C::kPitch + p.scale_pitch + (p.zero == nullptr ? 0 : groups));
  const int wanted = std::max(ring, C::kPartial + (1 + std::max(1, C::kXStages)) * p.stage_bytes);
  const int room = std::min(wanted, limit - int(own.sharedSizeBytes)) - C::kPartial;
  p.stages = std::min(skinny::kMaxStages, room / p.stage_bytes);
  STD_TORCH_CHECK(p.stages >= 2, "no shared memory for two stages of ", p.stage_bytes, " bytes");
  const int dynamic = C::kPartial + p.stages * p.stage_bytes;
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, dynamic));

  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(std::min(processors, (p.N + skinny::kRows - 1) / skinny::kRows));
  config.blockDim = dim3(C::kThreads);
  config.dynamicSmemBytes = dynamic;
  config.stream = current_stream(x);
  config.attrs = &overlap;
  config.numAttrs = 1;
  STD_CUDA_CHECK(
      cudaLaunchKernelEx(&config, kernel, static_cast<T*>(out.data_ptr()), static_cast<const T*>(x.data_ptr()), p));
}

template <typename T, Format kFormat, Scaling kScaling, Fold kFold, int kPanel, int kPanels>
void run_rows(const Tensor& out, const Tensor& x, const Problem& p, int ring) {
  if (p.M <= 8) return run<T, kFormat, kScaling, 1, kPanel, kPanels, kFold>(out, x, p, ring);
  if (p.M <= 16) return run<T, kFormat, kScaling, 2, kPanel, kPanels, kFold>(out, x, p, ring);
  if constexpr (kPanels == 1) return run<T, kFormat, kScaling, 4, kPanel, kPanels, kFold>(out, x, p, ring);
  STD_TORCH_CHECK(false, "needs at most 16 rows of x with ", kPanel * kPanels, " columns, got ", p.M);
}

template <typename T, Format kFormat, Scaling kScaling, Fold kFold = Fold::kNone>
void run_columns(const Tensor& out, const Tensor& x, const Problem& p, int ring) {
  switch (x.size(1)) {
    case 512:  // too few for the warps where 16 bytes are 32 columns
      if constexpr (skinny::bits_of(kFormat) > 4) return run_rows<T, kFormat, kScaling, kFold, 512, 1>(out, x, p, ring);
      break;
    case 2048:
      return run_rows<T, kFormat, kScaling, kFold, 2048, 1>(out, x, p, ring);
    case 4096:
      return run_rows<T, kFormat, kScaling, kFold, 2048, 2>(out, x, p, ring);
  }
  STD_TORCH_CHECK(false, "takes 512 (8 bits and more), 2048 or 4096 columns, got ", x.size(1));
}

int scale_type(const Tensor& scale) {
  switch (scale.scalar_type()) {
    case ScalarType::BFloat16:
      return 0;
    case ScalarType::Half:
      return 1;
    case ScalarType::Float:
      return 2;
    case ScalarType::Float8_e4m3fn:
      return 3;
    default:
      STD_TORCH_CHECK(false, "scales must be bfloat16, float16, float32 or float8_e4m3fn");
  }
  return -1;
}

// Scales and zeros of a quantised weight.
void describe_scales(Problem& p, Format format, const Tensor& scale, const std::optional<Tensor>& zero,
                     const std::optional<Tensor>& row_scale, int64_t group, int64_t scale_rows, const Tensor& x) {
  const int64_t K = x.size(1);
  STD_TORCH_CHECK(scale_rows >= 1 && group >= 1 && scale.dim() == 2 &&
                      scale.size(0) == (p.N + scale_rows - 1) / scale_rows && scale.size(1) == (K + group - 1) / group,
                  "scale must hold one number for each ", scale_rows, " x ", group, " of [", p.N, ", ", K, "]");
  const auto of_rows = [&](const Tensor& scales, int64_t rows) {
    p.row_scales = static_cast<const unsigned char*>(scales.data_ptr());
    p.row_scale_row = scales.stride(0) * scales.element_size();
    p.row_scale_rows = int(rows);
    p.row_scale_type = scale_type(scales);
  };
  if (group >= K) {
    STD_TORCH_CHECK(!zero.has_value() && !row_scale.has_value(), "with one scale a row there is nothing beside it");
    return of_rows(scale, scale_rows);
  }
  while (int64_t{1} << p.group_shift < group) ++p.group_shift;
  STD_TORCH_CHECK(int64_t{1} << p.group_shift == group && group >= (format == Format::kInt4 ? 32 : 16) && group <= 512,
                  "groups of ", group, " columns cannot be read");
  check_rows(scale, "scale", 16, x);
  p.scale = static_cast<const unsigned char*>(scale.data_ptr());
  p.scale_type = scale_type(scale);
  p.scale_row = scale.stride(0) * scale.element_size();
  p.scale_rows = int(scale_rows);
  if (zero.has_value()) {
    STD_TORCH_CHECK(format == Format::kInt4 && zero->scalar_type() == ScalarType::Byte &&
                        zero->size(0) == scale.size(0) && zero->size(1) == scale.size(1),
                    "zero must be uint8 of the scale's shape, with int4");
    check_rows(*zero, "zero", 16, x);
    p.zero = static_cast<const unsigned char*>(zero->data_ptr());
    p.zero_row = zero->stride(0);
  }
  if (row_scale.has_value()) {
    STD_TORCH_CHECK(row_scale->dim() == 1 && row_scale->size(0) == p.N, "row_scale must hold one number for each of ",
                    p.N, " rows");
    of_rows(*row_scale, 1);
  }
  if (format == Format::kFp8 || format == Format::kFp4) p.lift = skinny::kLift;
}

// Checks what every form of the product asks for. out.size(0) or out.size(1) may be 0: then there is nothing to do.
Problem describe(const Tensor& out, const Tensor& x, const Tensor& weight, Format kind, int64_t late) {
  const ScalarType type = x.scalar_type();
  const bool plain = kind == Format::kPlain;
  STD_TORCH_CHECK(x.dim() == 2 && out.dim() == 2 && weight.dim() == 2, "x, weight and out must be matrices");
  check_rows(x, "x", 16, x);
  check_rows(out, "out", 2, x);
  const int64_t M = x.size(0), K = x.size(1), N = weight.size(0), bits = skinny::bits_of(kind);
  STD_TORCH_CHECK(weight.size(1) * weight.element_size() * 8 == K * bits && (!plain || weight.scalar_type() == type),
                  "weight [", N, ", ", weight.size(1), "] does not hold ", K, " columns of ", bits, " bits");
  STD_TORCH_CHECK(out.size(0) == M && out.size(1) == N && out.scalar_type() == type, "out must be [", M, ", ", N,
                  "] in the dtype of x");
  STD_TORCH_CHECK(M <= 32 && N < (1 << 30), "needs at most 32 rows of x, got ", M);
  check_rows(weight, "weight", 16, x);
  int major = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, x.get_device_index()));
  STD_TORCH_CHECK(major >= 9, "the copy engine needs sm_90 or newer");
  Problem p{};
  p.M = int(M);
  p.N = int(N);
  p.late = int(late);
  p.x_row = x.stride(0);
  p.y_row = out.stride(0);
  p.w = static_cast<const unsigned char*>(weight.data_ptr());
  p.w_row = weight.stride(0) * weight.element_size();
  p.scale_rows = 1;
  p.lift = 1.f;
  return p;
}

void skinny_gemm(const Tensor out, const Tensor x, const Tensor weight, const std::optional<Tensor> scale,
                 const std::optional<Tensor> zero, const std::optional<Tensor> row_scale, int64_t format, int64_t group,
                 int64_t scale_rows, int64_t ring, int64_t late) {
  const ScalarType type = x.scalar_type();
  const Format kind = Format(format);
  const bool plain = kind == Format::kPlain;
  STD_TORCH_CHECK(format >= 0 && format <= int64_t(Format::kFp4), "no format ", format);
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || (plain && type == ScalarType::Half),
                  "x must be bfloat16, or float16 with plain weights");
  Problem p = describe(out, x, weight, kind, late);
  if (p.M == 0 || p.N == 0) return;
  if (!plain) {
    STD_TORCH_CHECK(scale.has_value(), "quantised weights have a scale");
    describe_scales(p, kind, *scale, zero, row_scale, group, scale_rows, x);
  }
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  using bf16 = __nv_bfloat16;
  const bool grouped = p.scale != nullptr, exact = p.scale_type == 1 || p.scale_type == 2;
  switch (kind) {
    case Format::kPlain:
      return type == ScalarType::Half ? run_columns<__half, Format::kPlain, Scaling::kRow>(out, x, p, int(ring))
                                      : run_columns<bf16, Format::kPlain, Scaling::kRow>(out, x, p, int(ring));
    case Format::kInt4:
      STD_TORCH_CHECK(grouped, "int4 with one scale a row has no kernel");
      return exact ? run_columns<bf16, Format::kInt4, Scaling::kExact>(out, x, p, int(ring))
                   : run_columns<bf16, Format::kInt4, Scaling::kShort>(out, x, p, int(ring));
    case Format::kInt8:
      return grouped ? run_columns<bf16, Format::kInt8, Scaling::kExact>(out, x, p, int(ring))
                     : run_columns<bf16, Format::kInt8, Scaling::kRow>(out, x, p, int(ring));
    case Format::kFp8:
      return grouped ? run_columns<bf16, Format::kFp8, Scaling::kExact>(out, x, p, int(ring))
                     : run_columns<bf16, Format::kFp8, Scaling::kRow>(out, x, p, int(ring));
    case Format::kFp4:
      STD_TORCH_CHECK(grouped && p.scale_type == 3, "fp4 has scales in fp8 for its groups");
      return run_columns<bf16, Format::kFp4, Scaling::kShort>(out, x, p, int(ring));
  }
}

void skinny_gemm_norm(const Tensor out, const Tensor x, const Tensor weight, const Tensor norm, double eps,
                      bool plus_one, int64_t ring, int64_t late) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16, "x must be bfloat16");
  Problem p = describe(out, x, weight, Format::kPlain, late);
  STD_TORCH_CHECK(norm.dim() == 1 && norm.size(0) == x.size(1) && norm.is_contiguous() && aligned16(norm.data_ptr()) &&
                      norm.scalar_type() == ScalarType::BFloat16 && norm.is_cuda() &&
                      norm.get_device_index() == x.get_device_index(),
                  "the norm's weight must be ", x.size(1), " bfloat16 side by side on the device of x");
  if (p.M == 0 || p.N == 0) return;
  p.norm = norm.data_ptr();
  p.norm_eps = float(eps);
  p.norm_offset = plus_one ? 1.f : 0.f;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  run_columns<__nv_bfloat16, Format::kPlain, Scaling::kRow, Fold::kNorm>(out, x, p, int(ring));
}

void skinny_gemm_add(const Tensor total, const Tensor x, const Tensor weight, int64_t ring, int64_t late) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16, "x must be bfloat16");
  const Problem p = describe(total, x, weight, Format::kPlain, late);
  if (p.M == 0 || p.N == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  run_columns<__nv_bfloat16, Format::kPlain, Scaling::kRow, Fold::kAdd>(total, x, p, int(ring));
}

}  // namespace
}  // namespace vllm

STABLE_TORCH_LIBRARY_FRAGMENT(vllm_c, m) {
  m.def(
      "skinny_gemm(Tensor(a!) out, Tensor x, Tensor weight, Tensor? scale, Tensor? zero, Tensor? row_scale, "
      "int format, int group, int scale_rows, int ring, int late) -> ()");
  m.def(
      "skinny_gemm_norm(Tensor(a!) out, Tensor x, Tensor weight, Tensor norm, float eps, bool plus_one, int ring, "
      "int late) -> ()");
  m.def("skinny_gemm_add(Tensor(a!) total, Tensor x, Tensor weight, int ring, int late) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_c, CUDA, m) {
  m.impl("skinny_gemm", TORCH_BOX(&vllm::skinny_gemm));
  m.impl("skinny_gemm_norm", TORCH_BOX(&vllm::skinny_gemm_norm));
  m.impl("skinny_gemm_add", TORCH_BOX(&vllm::skinny_gemm_add));
}
