// y = x W' for a few rows of x and quantised weights; how is told in quantised_gemm.cuh, when in
// layers/ops/skinny_gemm.py.

#include <algorithm>
#include <optional>

#include "common.cuh"
#include "quantised_gemm_plan.cuh"

namespace vllm {
namespace {

using namespace quantised;

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, device));
  return value;
}

template <typename K, bool kOnce>
constexpr auto kernel_of() {
  if constexpr (kOnce) {
    return quantised_once_kernel<K>;
  } else {
    return quantised_gemm_kernel<K>;
  }
}

template <typename K, bool kOnce>
void run(const Tensor& out, const Tensor& x, Problem p, int64_t ring) {
  const int device = x.get_device_index(), limit = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  constexpr int kSums = kOnce ? K::kTileSums * 4 : kSumBytes<K>;
  const auto bytes = [](int stages) { return kSums + kWarps * stages * K::kStage; };
  p.stages = bytes(kStages) <= std::min<int64_t>(ring, limit) ? kStages : kFew;
  // What a block takes beyond its need leaves room for fewer others beside it.
  const int dynamic = std::max<int64_t>(bytes(kOnce ? K::kKeep : p.stages), std::min<int64_t>(ring, limit));
  const auto kernel = kernel_of<K, kOnce>();
  STD_TORCH_CHECK(dynamic <= limit, "no shared memory for ", kFew, " stages of ", K::kStage, " bytes");
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, dynamic));
  int blocks = 0;
  STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kWarps * 32, dynamic));

  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  const int most = std::max(1, blocks) * attribute(cudaDevAttrMultiProcessorCount, device);
  const int tiles = (p.N + K::kRows - 1) / K::kRows;
  config.gridDim = dim3(kOnce ? tiles : std::min(most, tiles));
  config.blockDim = dim3(kWarps * 32);
  config.dynamicSmemBytes = dynamic;
  config.stream = current_stream(x);
  config.attrs = &overlap;
  config.numAttrs = 1;
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<bf16*>(out.data_ptr()),
                                    static_cast<const bf16*>(x.data_ptr()), p));
}

int scale_type(const Tensor& scale, Format format) {
  const ScalarType type = scale.scalar_type();
  if (format == Format::kFp4) {
    STD_TORCH_CHECK(type == ScalarType::Float8_e4m3fn, "scales of uint8 weights must be float8_e4m3fn");
    return 0;
  }
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half || type == ScalarType::Float,
                  "scales must be bfloat16, float16 or float32");
  return type == ScalarType::BFloat16 ? 0 : type == ScalarType::Half ? 1 : 2;
}

void check_scales(Problem& p, Format format, const Tensor& scale, const std::optional<Tensor>& zero,
                  const std::optional<Tensor>& row_scale, int64_t columns, int64_t group, int64_t scale_rows) {
  const int64_t groups = (columns + group - 1) / group;
  STD_TORCH_CHECK(scale_rows >= 1 && scale.dim() == 2 && scale.stride(1) == 1 &&
                      scale.size(0) == (p.N + scale_rows - 1) / scale_rows && scale.size(1) == groups,
                  "scale must hold one number for each ", scale_rows, " x ", group, " of [", p.N, ", ", columns, "]");
  STD_TORCH_CHECK(scale.stride(0) < (1 << 24), "rows of scale are too far apart");
  p.scale = static_cast<const unsigned char*>(scale.data_ptr());
  p.scale_type = scale_type(scale, format);
  p.scale_row = unsigned(scale.stride(0) * scale.element_size());
  p.scale_rows = int(scale_rows);
  if (zero.has_value()) {
    STD_TORCH_CHECK(format == Format::kInt4 && zero->scalar_type() == ScalarType::Byte && zero->dim() == 2 &&
                        zero->stride(1) == 1 && zero->size(0) == scale.size(0) && zero->size(1) == groups &&
                        zero->stride(0) < (1 << 24),
                    "zero must be uint8 of the scale's shape, with int4");
    p.zero = static_cast<const unsigned char*>(zero->data_ptr());
    p.zero_row = unsigned(zero->stride(0));
  }
  if (row_scale.has_value()) {
    STD_TORCH_CHECK(format == Format::kFp4 && row_scale->scalar_type() == ScalarType::Float && row_scale->dim() == 1 &&
                        row_scale->size(0) == p.N && (p.N == 1 || row_scale->stride(0) == 1),
                    "row_scale must be float32 [", p.N, "], with fp4");
    p.row_scale = static_cast<const float*>(row_scale->data_ptr());
  }
}

void quantised_gemm(const Tensor out, const Tensor x, const Tensor weight, const Tensor scale,
                    const std::optional<Tensor> zero, const std::optional<Tensor> row_scale, int64_t bits,
                    int64_t group, int64_t scale_rows, int64_t ring, int64_t late) {
  STD_TORCH_CHECK(bits == 4 || bits == 8, "weights of ", bits, " bits have no kernel");
  const bool floats = weight.scalar_type() != ScalarType::Int, four = bits == 4;
  const Format format = floats ? (four ? Format::kFp4 : Format::kFp8) : four ? Format::kInt4 : Format::kInt8;
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16 && out.scalar_type() == ScalarType::BFloat16,
                  "x and out must be bfloat16");
  STD_TORCH_CHECK(x.dim() == 2 && out.dim() == 2 && weight.dim() == 2, "x, weight and out must be matrices");
  STD_TORCH_CHECK(!floats || weight.scalar_type() == (four ? ScalarType::Byte : ScalarType::Float8_e4m3fn),
                  "weight must be int32 words, float8_e4m3fn or, for floats of 4 bits, uint8");
  check_rows(x, "x", 16, x);
  check_rows(out, "out", 2, x);
  check_rows(weight, "weight", 16, x);
  const int64_t M = x.size(0), K = x.size(1), N = weight.size(0);
  Problem p{};
  p.M = int(M), p.N = int(N), p.row_bytes = int(K * bits / 8), p.late = int(late);
  STD_TORCH_CHECK(weight.size(1) * weight.element_size() == p.row_bytes && p.row_bytes % kChunk == 0, "weight [", N,
                  ", ", weight.size(1), "] does not hold ", K, " columns of ", bits, " bits in pieces of ", kChunk,
                  " bytes");
  STD_TORCH_CHECK(out.size(0) == M && out.size(1) == N && M <= 32 && N < (1 << 30), "out must be [", M, ", ", N,
                  "], of at most 32 rows");
  if (M == 0 || N == 0) return;
  p.x_row = x.stride(0), p.y_row = out.stride(0);
  p.w = static_cast<const unsigned char*>(weight.data_ptr());
  p.w_row = unsigned(weight.stride(0) * weight.element_size());
  STD_TORCH_CHECK(p.x_row < (1 << 26) && weight.stride(0) < (1 << 24), "rows of x or weight are too far apart");
  STD_TORCH_CHECK(group >= 1, "groups of ", group, " columns cannot be read");
  check_scales(p, format, scale, zero, row_scale, K, group, scale_rows);
  const Plan plan = plan_scales(p, format, K, group);
  STD_TORCH_CHECK(plan.share > 0, "groups of ", group, " of ", K, " columns, or where they lie, cannot be read");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int device = x.get_device_index();
  STD_TORCH_CHECK(attribute(cudaDevAttrComputeCapabilityMajor, device) >= 9,
                  "overlapping launches need sm_90 or newer");
  with_kind(p, format, plan, 2 * attribute(cudaDevAttrMultiProcessorCount, device),
            attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
            [&](auto kind, auto once) { run<decltype(kind), once.value>(out, x, p, ring); });
}

}  // namespace
}  // namespace vllm

STABLE_TORCH_LIBRARY_FRAGMENT(vllm_c, m) {
  m.def(
      "quantised_gemm(Tensor(a!) out, Tensor x, Tensor weight, Tensor scale, Tensor? zero, Tensor? row_scale, "
      "int bits, int group, int scale_rows, int ring, int late) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_c, CUDA, m) { m.impl("quantised_gemm", TORCH_BOX(&vllm::quantised_gemm)); }
