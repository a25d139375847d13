// A mixture of experts with weights of 4 bits for a few tokens; how is told in experts_w4.cuh, when in
// layers/fused_moe/ops/w4.py.

#include <algorithm>
#include <optional>

#include "common.cuh"
#include "experts_w4.cuh"

namespace vllm {
namespace {

using namespace experts;

void check(const Tensor& t, const char* name, std::initializer_list<int64_t> shape, ScalarType type,
           const Tensor& like) {
  bool same = t.dim() == int64_t(shape.size()) && t.scalar_type() == type && t.is_contiguous() && t.is_cuda() &&
              t.get_device_index() == like.get_device_index() && aligned16(t.data_ptr());
  int64_t d = 0;
  for (int64_t size : shape) same = same && t.size(d++) == size;
  STD_TORCH_CHECK(same, name, " has not the shape, dtype or device that it must have, or is not contiguous");
}

const unsigned char* bytes_of(const std::optional<Tensor>& t) {
  return t.has_value() ? static_cast<const unsigned char*>(t->data_ptr()) : nullptr;
}
const float* floats_of(const std::optional<Tensor>& t) { return reinterpret_cast<const float*>(bytes_of(t)); }

// whole: of which rows must be a multiple.
Stack stack(const char* name, const Tensor& words, const Tensor& scale, const std::optional<Tensor>& zero,
            const std::optional<Tensor>& row_scale, int64_t whole) {
  STD_TORCH_CHECK(words.dim() == 3 && scale.dim() == 3, name, " must be words and scales of [experts, rows, columns]");
  const bool floats = words.scalar_type() == ScalarType::Byte;
  const int64_t E = words.size(0), rows = words.size(1), columns = words.size(2) * (floats ? 2 : 8);
  const int64_t groups = floats ? columns / 32 : scale.size(2);
  check(words, name, {E, rows, words.size(2)}, floats ? ScalarType::Byte : ScalarType::Int, words);
  if (floats) {
    check(scale, name, {E, rows, columns / 16}, ScalarType::Float8_e4m3fn, words);
  } else {
    check(scale, name, {E, rows, groups}, ScalarType::BFloat16, words);
  }
  STD_TORCH_CHECK(floats ? !zero.has_value() : !row_scale.has_value(), name,
                  ": zero points belong to int4 and factors of rows to fp4");
  if (zero.has_value()) check(*zero, name, {E, rows, groups}, ScalarType::Byte, words);
  if (row_scale.has_value()) check(*row_scale, name, {E, rows}, ScalarType::Float, words);
  STD_TORCH_CHECK(columns > 0 && columns % 128 == 0 && rows % whole == 0 && rows * (columns / 2) < (int64_t{1} << 31),
                  name, " needs multiples of 128 columns and ", whole, " rows, got [", rows, ", ", columns, "]");
  const int64_t group = groups > 0 && columns % groups == 0 ? columns / groups : 0;
  STD_TORCH_CHECK(group == 32 || (group >= 128 && group % 128 == 0 && (groups == 1 || (group & (group - 1)) == 0)),
                  name, ": ", groups, " groups of ", columns, " columns cannot be read");
  Stack w{};
  w.floats = floats;
  w.row_scale = floats_of(row_scale);
  w.w = static_cast<const unsigned char*>(words.data_ptr());
  w.scale = static_cast<const unsigned char*>(scale.data_ptr());
  w.zero = bytes_of(zero);
  w.rows = int(rows), w.row_bytes = int(columns / 2), w.groups = int(groups);
  while (int64_t{128} << w.shared_chunks < group) ++w.shared_chunks;
  return w;
}

Routing routing(const Tensor& logits, const Tensor& h, int64_t experts, int64_t top_k) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.scalar_type() == ScalarType::Float && logits.stride(1) == 1 &&
                      logits.size(1) == experts + 1 && logits.is_cuda() &&
                      logits.get_device_index() == h.get_device_index(),
                  "logits must be float32 [tokens, experts + 1]");
  const int64_t T = logits.size(0);
  STD_TORCH_CHECK(
      T >= 1 && T <= kMostTokens && experts <= kMostExperts && top_k >= 1 && top_k <= kMostChoices && top_k <= experts,
      "cannot choose ", top_k, " of ", experts, " experts for ", T, " tokens");
  Routing r{};
  r.logits = static_cast<const float*>(logits.data_ptr());
  r.row = int(logits.stride(0)), r.tokens = int(T), r.experts = int(experts), r.top_k = int(top_k);
  r.most_lists = int(h.size(0) / kTogether);
  STD_TORCH_CHECK(h.size(0) == most_lists(T, experts, top_k) * kTogether,
                  "h has not 8 rows for each list there may be");
  return r;
}

template <typename Kernel, typename... Args>
void launch_with(Kernel kernel, int grid, int threads, int bytes, const Tensor& like, Args... args) {
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  int blocks = 0;
  if (grid == 0) {  // as many as there is room for
    int count = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, like.get_device_index()));
    STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, bytes));
    grid = count * std::max(1, blocks);
  }
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = bytes;
  config.stream = current_stream(like);
  config.attrs = &overlap;
  config.numAttrs = 1;
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, args...));
}

const bf16* data(const Tensor& t) { return static_cast<const bf16*>(t.data_ptr()); }

void check_stages(int64_t stages) {
  STD_TORCH_CHECK(stages == kStages || stages == kFew, "a ring has ", kFew, " or ", kStages, " stages");
}

void gate_up(const Tensor h, const Tensor x, const Tensor words, const Tensor scale, const std::optional<Tensor> zero,
             const std::optional<Tensor> row_scale, const Tensor logits, int64_t top_k, int64_t stages) {
  const Stack w = stack("w13", words, scale, zero, row_scale, 2 * kTile);
  const Routing r = routing(logits, h, words.size(0), top_k);
  check(x, "x", {r.tokens, 2 * w.row_bytes}, ScalarType::BFloat16, words);
  check(h, "h", {h.size(0), w.rows / 2}, ScalarType::BFloat16, words);
  check_stages(stages);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  with_kind<2>(w, r.experts, [&](auto kind, auto keys) {
    using K = decltype(kind);
    const int bytes = gate_up_bytes<K>(r.most_lists, int(stages));
    launch_with(gate_up_kernel<K, keys()>, 0, kWarps * 32, bytes, x, const_cast<bf16*>(data(h)), data(x), w, r,
                int(stages));
  });
}

Shared shared_expert(const std::optional<Tensor>& x, const std::optional<Tensor>& w, const std::optional<Tensor>& scale,
                     const std::optional<Tensor>& row_scale, int64_t tokens, const Stack& stack, const Tensor& like) {
  if (!w.has_value()) return {};
  const int64_t columns = w->dim() == 2 ? w->size(1) * (scale.has_value() ? 2 : 1) : 0;
  STD_TORCH_CHECK(x.has_value() && columns > 0 && columns % 32 == 0,
                  "the shared expert's weight comes with its x, and with a multiple of 32 columns");
  check(*x, "the shared expert's x", {tokens, columns}, ScalarType::BFloat16, like);
  const char* const name = "the shared expert's weight";
  if (scale.has_value()) {
    STD_TORCH_CHECK(stack.floats, name, " is bfloat16 beside int4 experts");
    check(*w, name, {stack.rows, columns / 2}, ScalarType::Byte, like);
    check(*scale, name, {stack.rows, columns / 16}, ScalarType::Float8_e4m3fn, like);
    if (row_scale.has_value()) check(*row_scale, name, {stack.rows}, ScalarType::Float, like);
  } else {
    STD_TORCH_CHECK(!row_scale.has_value(), name, ": factors of rows belong to fp4");
    check(*w, name, {stack.rows, columns}, ScalarType::BFloat16, like);
  }
  return {data(*w), data(*x), bytes_of(scale), floats_of(row_scale), int(columns)};
}

void down(const Tensor y, const Tensor h, const Tensor words, const Tensor scale, const std::optional<Tensor> zero,
          const std::optional<Tensor> row_scale, const std::optional<Tensor> shared_x,
          const std::optional<Tensor> shared_w, const std::optional<Tensor> shared_scale,
          const std::optional<Tensor> shared_row_scale, const Tensor logits, int64_t top_k, bool add, int64_t warps,
          int64_t stages) {
  const Stack w = stack("w2", words, scale, zero, row_scale, kTile);
  const Routing r = routing(logits, h, words.size(0), top_k);
  check(y, "y", {r.tokens, w.rows}, ScalarType::BFloat16, words);
  check(h, "h", {h.size(0), 2 * w.row_bytes}, ScalarType::BFloat16, words);
  check_stages(stages);
  STD_TORCH_CHECK(warps == kMostDownWarps / 2 || warps == kMostDownWarps, "down has ", kMostDownWarps / 2, " or ",
                  kMostDownWarps, " warps");
  const Shared shared = shared_expert(shared_x, shared_w, shared_scale, shared_row_scale, r.tokens, w, words);
  const torch::stable::accelerator::DeviceGuard guard(h.get_device_index());
  with_kind<1>(w, r.experts, [&](auto kind, auto keys) {
    using K = decltype(kind);
    const int bytes = down_bytes<K>(r.tokens, r.most_lists, int(warps), int(stages));
    launch_with(down_kernel<K, keys()>, w.rows / kTile, int(warps) * 32, bytes, h, const_cast<bf16*>(data(y)), data(h),
                w, r, shared, add, int(stages));
  });
}

}  // namespace
}  // namespace vllm

STABLE_TORCH_LIBRARY_FRAGMENT(vllm_c, m) {
  m.def(
      "experts_w4_gate_up(Tensor(a!) h, Tensor x, Tensor words, Tensor scale, Tensor? zero, Tensor? row_scale, "
      "Tensor logits, int top_k, int stages) -> ()");
  m.def(
      "experts_w4_down(Tensor(a!) y, Tensor h, Tensor words, Tensor scale, Tensor? zero, Tensor? row_scale, "
      "Tensor? shared_x, Tensor? shared_w, Tensor? shared_scale, Tensor? shared_row_scale, Tensor logits, int top_k, "
      "bool add, int warps, int stages) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_c, CUDA, m) {
  m.impl("experts_w4_gate_up", TORCH_BOX(&vllm::gate_up));
  m.impl("experts_w4_down", TORCH_BOX(&vllm::down));
}
