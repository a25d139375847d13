// A mixture of experts with int4 weights, for few choices an expert; how is told in experts_int4.cuh, when in
// layers/fused_moe/ops/int4.py.

#include <optional>

#include "common.cuh"
#include "experts_int4.cuh"

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

Matrix matrix(const char* name, const Tensor& words, const Tensor& scale, const std::optional<Tensor>& zero) {
  STD_TORCH_CHECK(words.dim() == 3 && words.scalar_type() == ScalarType::Int && words.is_contiguous(), name,
                  " must be int32 words [experts, rows, columns / 8]");
  const int64_t E = words.size(0), rows = words.size(1), columns = words.size(2) * 8;
  STD_TORCH_CHECK(columns > 0 && columns % (kUnit * kChunk) == 0, name, " needs a multiple of 128 columns, got ",
                  columns);
  STD_TORCH_CHECK(scale.dim() == 3 && scale.size(2) > 0 && columns % scale.size(2) == 0, name,
                  " has no regular groups");
  const int64_t groups = scale.size(2), group = columns / groups;
  STD_TORCH_CHECK(group == kUnit || (group % (kUnit * kChunk) == 0 && (group & (group - 1)) == 0), name, ": groups of ",
                  group, " columns cannot be read");
  check(scale, name, {E, rows, groups}, ScalarType::BFloat16, words);
  if (zero.has_value()) check(*zero, name, {E, rows, groups}, ScalarType::Byte, words);
  Matrix m{};
  m.words = static_cast<const unsigned char*>(words.data_ptr());
  m.scale = static_cast<const unsigned short*>(scale.data_ptr());
  m.zero = zero.has_value() ? static_cast<const unsigned char*>(zero->data_ptr()) : nullptr;
  m.rows = int(rows), m.columns = int(columns), m.groups = int(groups);
  while (group >> m.shared_chunks > kUnit * kChunk) ++m.shared_chunks;
  return m;
}

template <typename... Params, typename... Args>
void launch_with(void (*kernel)(Params...), dim3 grid, int threads, int bytes, const Tensor& like, Args&&... args) {
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = bytes;
  config.stream = current_stream(like);
  config.attrs = &overlap;
  config.numAttrs = 1;
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(std::forward<Args>(args))...));
}

// Calls run with what differs at compile time: zero points, units that share a scale, and columns, where there are as
// many as the models of 35B and 80B have.
template <int kUsual, typename Run>
void by_format(const Matrix& w, Run run) {
  using std::integral_constant;
  const bool zero = w.zero != nullptr, unit = w.columns / w.groups == kUnit;
  const auto sized = [&](auto has_zero, auto share) {
    w.columns == kUsual ? run(has_zero, share, integral_constant<int, kUsual>())
                        : run(has_zero, share, integral_constant<int, 0>());
  };
  const auto with = [&](auto has_zero) {
    unit ? sized(has_zero, integral_constant<int, 1>()) : sized(has_zero, integral_constant<int, kChunk>());
  };
  zero ? with(std::true_type()) : with(std::false_type());
}

template <typename Run>
void by_experts(int64_t experts, Run run) {
  experts <= 256 ? run(std::integral_constant<int, 8>()) : run(std::integral_constant<int, 16>());
}

void check_x(const Tensor& x, const char* name, int64_t columns) {
  STD_TORCH_CHECK(x.dim() == 2 && x.scalar_type() == ScalarType::BFloat16 && x.is_contiguous() && x.is_cuda() &&
                      x.size(1) == columns && aligned16(x.data_ptr()),
                  name, " must be bfloat16 [rows, ", columns, "], contiguous and on the device");
}

Choices by_top_k(int64_t top_k) {
  Choices choices{};
  choices.top_k = int(top_k), choices.inverse = unsigned(((int64_t(1) << 32) + top_k - 1) / top_k);
  return choices;
}

// The logits [T, experts, and one of the shared expert's gate] of a few tokens.
Choices by_logits(const Tensor& logits, const Tensor& chosen, const Tensor& x, const Matrix& w, int64_t experts,
                  int64_t top_k) {
  const int64_t T = logits.dim() == 2 ? logits.size(0) : 0;
  STD_TORCH_CHECK(
      T > 0 && logits.scalar_type() == ScalarType::Float && logits.stride(1) == 1 && logits.size(1) == experts + 1,
      "logits must be float32 [tokens, experts + 1]");
  STD_TORCH_CHECK(top_k >= 1 && top_k <= kMostChoices && top_k <= experts && experts <= 32 * kMostKeys,
                  "cannot choose ", top_k, " of ", experts, " experts");
  check(chosen, "chosen", {T * top_k}, ScalarType::Int, x);
  Choices choices = by_top_k(top_k);
  choices.experts = int(experts), choices.logits_row = int(logits.stride(0));
  choices.logits = static_cast<const float*>(logits.data_ptr());
  choices.chosen = static_cast<int*>(chosen.data_ptr());
  return choices;
}

Choices by_blocks(const Tensor& order, const Tensor& block_expert, const Tensor& block_rows, const Tensor& x,
                  int64_t top_k) {
  const int64_t blocks = block_rows.numel();
  check(order, "order", {blocks * kTogether}, ScalarType::Int, x);
  check(block_expert, "block_expert", {blocks}, ScalarType::Int, x);
  check(block_rows, "block_rows", {blocks}, ScalarType::Int, x);
  Choices choices = by_top_k(top_k);
  choices.order = static_cast<const int*>(order.data_ptr());
  choices.block_expert = static_cast<const int*>(block_expert.data_ptr());
  choices.block_rows = static_cast<const int*>(block_rows.data_ptr());
  return choices;
}

bf16* data(const Tensor& t) { return static_cast<bf16*>(t.data_ptr()); }

void gate_up_token(const Tensor h, const Tensor x, const Tensor words, const Tensor scale,
                   const std::optional<Tensor> zero, const Tensor logits, const Tensor chosen, int64_t top_k) {
  const Matrix w = matrix("w13", words, scale, zero);
  check_x(x, "x", w.columns);
  check_x(h, "h", w.rows / 2);
  const Choices choices = by_logits(logits, chosen, x, w, words.size(0), top_k);
  STD_TORCH_CHECK(w.rows % (2 * kTile) == 0 && h.size(0) == x.size(0) * top_k && logits.size(0) == x.size(0),
                  "x, h, logits and w13 do not go together");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int bytes = Rows<>(w).bytes(2 * kTile);
  by_format<2048>(w, [&](auto has_zero, auto share, auto columns) {
    by_experts(choices.experts, [&](auto keys) {
      launch_with(gate_up_kernel<false, has_zero(), share(), keys(), columns()>, dim3(w.rows / 2 / kTile, h.size(0)),
                  kWarps * 32, bytes, x, data(h), data(x), w, choices);
    });
  });
}

void gate_up_blocks(const Tensor h, const Tensor x, const Tensor words, const Tensor scale,
                    const std::optional<Tensor> zero, const Tensor order, const Tensor block_expert,
                    const Tensor block_rows, int64_t top_k) {
  const Matrix w = matrix("w13", words, scale, zero);
  check_x(x, "x", w.columns);
  check_x(h, "h", w.rows / 2);
  const Choices choices = by_blocks(order, block_expert, block_rows, x, top_k);
  STD_TORCH_CHECK(w.rows % (2 * kTile) == 0 && h.size(0) == x.size(0) * top_k, "x, h and w13 do not go together");
  if (block_rows.numel() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int bytes = Rows<>(w).bytes(2 * kTile);
  by_format<2048>(w, [&](auto has_zero, auto share, auto columns) {
    launch_with(gate_up_kernel<true, has_zero(), share(), 1, columns()>, dim3(w.rows / 2 / kTile, block_rows.numel()),
                kWarps * 32, bytes, x, data(h), data(x), w, choices);
  });
}

void down_token(const Tensor y, const Tensor h, const Tensor words, const Tensor scale,
                const std::optional<Tensor> zero, const std::optional<Tensor> shared_x,
                const std::optional<Tensor> shared_w, const Tensor logits, const Tensor chosen, int64_t top_k,
                bool early, bool add) {
  const Matrix w = matrix("w2", words, scale, zero);
  check_x(h, "h", w.columns);
  check_x(y, "y", w.rows);
  const Choices choices = by_logits(logits, chosen, h, w, words.size(0), top_k);
  STD_TORCH_CHECK(w.rows % kTile == 0 && h.size(0) == y.size(0) * top_k && logits.size(0) == y.size(0),
                  "h, y, logits and w2 do not go together");
  Shared shared{};
  if (shared_w.has_value()) {
    STD_TORCH_CHECK(shared_x.has_value(), "the shared expert's weight comes with its x");
    check_x(*shared_w, "the shared expert's weight", shared_w->size(1));
    check_x(*shared_x, "the shared expert's x", shared_w->size(1));
    STD_TORCH_CHECK(shared_w->size(0) == w.rows && shared_w->size(1) % kUnit == 0 && shared_x->size(0) == y.size(0),
                    "the shared expert's weight must be [", w.rows, ", multiple of 32]");
    shared.w = static_cast<const unsigned char*>(shared_w->data_ptr());
    shared.x = data(*shared_x);
    shared.columns = int(shared_w->size(1));
  }
  const torch::stable::accelerator::DeviceGuard guard(h.get_device_index());
  const int bytes = int(top_k) * Rows<>(w).bytes(kTile) + (shared.w ? kTile * plain_pitch(shared.columns) : 0);
  by_format<512>(w, [&](auto has_zero, auto share, auto columns) {
    by_experts(choices.experts, [&](auto keys) {
      launch_with(down_token_kernel<has_zero(), share(), keys(), columns()>, dim3(w.rows / kTile, y.size(0)),
                  32 * choices.top_k, bytes, h, data(y), data(h), w, choices, shared, early, add);
    });
  });
}

void down_blocks(const Tensor y, const Tensor h, const Tensor words, const Tensor scale,
                 const std::optional<Tensor> zero, const Tensor order, const Tensor block_expert,
                 const Tensor block_rows) {
  const Matrix w = matrix("w2", words, scale, zero);
  check_x(h, "h", w.columns);
  check_x(y, "y", w.rows);
  const Choices choices = by_blocks(order, block_expert, block_rows, h, 1);
  constexpr int kRows = kWarps * kTile;
  STD_TORCH_CHECK(w.rows % kRows == 0 && h.size(0) == y.size(0), "h, y and w2 do not go together");
  if (block_rows.numel() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(h.get_device_index());
  const int bytes = Rows<>(w).bytes(kRows);
  by_format<512>(w, [&](auto has_zero, auto share, auto columns) {
    launch_with(down_blocks_kernel<has_zero(), share(), columns()>, dim3(w.rows / kRows, block_rows.numel()),
                kWarps * 32, bytes, h, data(y), data(h), w, choices);
  });
}

}  // namespace
}  // namespace vllm

STABLE_TORCH_LIBRARY_FRAGMENT(vllm_c, m) {
  m.def(
      "experts_gate_up_token(Tensor(a!) h, Tensor x, Tensor words, Tensor scale, Tensor? zero, Tensor logits, "
      "Tensor(b!) chosen, int top_k) -> ()");
  m.def(
      "experts_gate_up_blocks(Tensor(a!) h, Tensor x, Tensor words, Tensor scale, Tensor? zero, Tensor order, "
      "Tensor block_expert, Tensor block_rows, int top_k) -> ()");
  m.def(
      "experts_down_token(Tensor(a!) y, Tensor h, Tensor words, Tensor scale, Tensor? zero, Tensor? shared_x, "
      "Tensor? shared_w, Tensor logits, Tensor chosen, int top_k, bool early, bool add) -> ()");
  m.def(
      "experts_down_blocks(Tensor(a!) y, Tensor h, Tensor words, Tensor scale, Tensor? zero, Tensor order, "
      "Tensor block_expert, Tensor block_rows) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_c, CUDA, m) {
  m.impl("experts_gate_up_token", TORCH_BOX(&vllm::gate_up_token));
  m.impl("experts_gate_up_blocks", TORCH_BOX(&vllm::gate_up_blocks));
  m.impl("experts_down_token", TORCH_BOX(&vllm::down_token));
  m.impl("experts_down_blocks", TORCH_BOX(&vllm::down_blocks));
}
