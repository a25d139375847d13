// RMSNorm, alone and with the residual add in front of it: y = x / rms(x) * (w + offset), where offset is 0, or 1 for
// checkpoints that store w - 1 (Gemma, Qwen3.5, Qwen3-Next). All arithmetic is fp32.
//
// The add rounds the new residual to its dtype before the norm reads it. Adding in one kernel and normalising in the
// next does the same, so the fused form gives the same numbers as the two steps.

#include "common.cuh"

namespace vllm {
namespace {

constexpr int kThreads = 1024;         // a row gets so many threads before they take two packs each: fewer were slower
constexpr int kShortRowThreads = 128;  // several short rows share a block of this size
constexpr int kMaxWarps = 1024 / 32;

// Where row r of x begins: a view of at most two leading dimensions, such as the q heads inside a fused qkv projection.
struct Rows {
  int64_t count, inner, outer_stride, inner_stride;
  __host__ __device__ int64_t offset(int64_t r) const {
    return inner == count ? r * inner_stride : r / inner * outer_stride + r % inner * inner_stride;
  }
};

struct Norm {
  int hidden;
  float eps, offset;
};

// Sum over the threads of one row: blockDim.x of them, a power of two below a warp or a number of whole warps.
__device__ float row_sum(float value) {
  const int width = blockDim.x < 32 ? blockDim.x : 32;
  for (int step = width / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  if (blockDim.x <= 32) return value;
  __shared__ float partial[kMaxWarps];
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  if (lane == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  value = lane < warps ? partial[lane] : 0.f;
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

// x -> out, or with kAdd: residual += x, norm(residual) -> out. out may be x: a thread writes only what it has read.
// The row stays in registers, kPacks packs of kVec values a thread; with kPacks == 0 it is read a second time instead.
template <typename T, typename W, int kVec, int kPacks, bool kAdd>
__global__ void norm_rows(T* out, const T* x, T* residual, const W* weight, Rows rows, Norm norm) {
  using Values = Pack<T, kVec>;
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool live = row < rows.count;  // the others stay for the shuffles
  const int packs = live ? norm.hidden / kVec : 0;
  const auto* in = reinterpret_cast<const Values*>(x + (live ? rows.offset(row) : 0));
  auto* res = reinterpret_cast<Values*>(residual + row * norm.hidden);
  auto* to = reinterpret_cast<Values*>(out + row * norm.hidden);
  const auto* scale = reinterpret_cast<const Pack<W, kVec>*>(weight);

  const auto read = [&](int i) {
    Values value = in[i];
    if constexpr (kAdd) {
      const Values old = res[i];
#pragma unroll
      for (int j = 0; j < kVec; ++j) value.v[j] = from_float<T>(to_float(value.v[j]) + to_float(old.v[j]));
      res[i] = value;
    }
    return value;
  };
  const auto squares = [](const Values& value) {
    float sum = 0.f;
#pragma unroll
    for (int j = 0; j < kVec; ++j) sum += to_float(value.v[j]) * to_float(value.v[j]);
    return sum;
  };
  const auto write = [&](int i, Values value, const Pack<W, kVec>& w, float inverse) {
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      value.v[j] = from_float<T>(to_float(value.v[j]) * inverse * (to_float(w.v[j]) + norm.offset));
    }
    to[i] = value;
  };

  wait_for_predecessor();
  float sum = 0.f;
  if constexpr (kPacks > 0) {
    Values kept[kPacks];
    Pack<W, kVec> w[kPacks];
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int i = threadIdx.x + p * blockDim.x;
      if (i < packs) {
        kept[p] = read(i);
        w[p] = scale[i];  // under way while the row is summed
        sum += squares(kept[p]);
      }
    }
    const float inverse = rsqrtf(row_sum(sum) / norm.hidden + norm.eps);
    let_successor_start();
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int i = threadIdx.x + p * blockDim.x;
      if (i < packs) write(i, kept[p], w[p], inverse);
    }
  } else {
    for (int i = threadIdx.x; i < packs; i += blockDim.x) sum += squares(read(i));
    const float inverse = rsqrtf(row_sum(sum) / norm.hidden + norm.eps);
    let_successor_start();
    for (int i = threadIdx.x; i < packs; i += blockDim.x) write(i, kAdd ? res[i] : in[i], scale[i], inverse);
  }
}

struct Plan {
  int packs_a_thread;  // 0: the scalar kernel, for tails, unaligned views and very long rows
  dim3 grid, block;
};

Plan make_plan(int64_t rows, int hidden, int vec, bool aligned) {
  const int packs = hidden / vec;
  if (!aligned || hidden % vec != 0 || packs > 4 * 1024) {
    const int threads = hidden >= 1024 ? 1024 : (hidden + 31) / 32 * 32;
    return {0, dim3(rows), dim3(threads)};
  }
  if (packs <= 32) {
    int width = 1;
    while (width < packs) width *= 2;
    const int rows_a_block = kShortRowThreads / width;
    return {1, dim3((rows + rows_a_block - 1) / rows_a_block), dim3(width, rows_a_block)};
  }
  int each = 1;
  while (each < 4 && packs > each * kThreads) each *= 2;
  const int threads = ((packs + each - 1) / each + 31) / 32 * 32;
  return {each, dim3(rows), dim3(threads)};
}

template <typename T, typename W, bool kAdd>
void run(const Tensor& out, const Tensor& x, const Tensor* residual, const Tensor& weight, Rows rows, Norm norm) {
  constexpr int kVec = 16 / sizeof(T);
  T* to = static_cast<T*>(out.data_ptr());
  const T* from = static_cast<const T*>(x.data_ptr());
  T* res = kAdd ? static_cast<T*>(residual->data_ptr()) : nullptr;
  const W* w = static_cast<const W*>(weight.data_ptr());
  const bool aligned = aligned16(to) && aligned16(from) && aligned16(res) && aligned16(w) &&
                       rows.outer_stride % kVec == 0 && rows.inner_stride % kVec == 0;
  const Plan plan = make_plan(rows.count, norm.hidden, kVec, aligned);
  const auto kernel = plan.packs_a_thread == 0   ? norm_rows<T, W, 1, 0, kAdd>
                      : plan.packs_a_thread == 1 ? norm_rows<T, W, kVec, 1, kAdd>
                      : plan.packs_a_thread == 2 ? norm_rows<T, W, kVec, 2, kAdd>
                                                 : norm_rows<T, W, kVec, 4, kAdd>;
  launch(kernel, plan.grid, plan.block, current_stream(x), to, from, res, w, rows, norm);
}

template <bool kAdd>
void check_and_run(const Tensor& out, const Tensor& x, const Tensor* residual, const Tensor& weight, double eps,
                   bool plus_one) {
  const int64_t dim = x.dim(), hidden = dim > 0 ? x.size(dim - 1) : 0;
  STD_TORCH_CHECK(hidden > 0, "x needs a last dimension of at least 1");
  STD_TORCH_CHECK(weight.dim() == 1 && weight.is_contiguous() && weight.size(0) == hidden,
                  "weight must be one contiguous vector of ", hidden, " values, the last dimension of x");
  STD_TORCH_CHECK(weight.is_cuda() && weight.get_device_index() == x.get_device_index(),
                  "weight must be on the device of x");
  const auto check_like_x = [&](const Tensor& other, const char* name) {
    bool same = other.dim() == dim && other.scalar_type() == x.scalar_type() && other.is_contiguous() &&
                other.is_cuda() && other.get_device_index() == x.get_device_index();
    for (int64_t d = 0; same && d < dim; ++d) same = other.size(d) == x.size(d);
    STD_TORCH_CHECK(same, name, " must be contiguous, with the shape, dtype and device of x");
  };
  check_like_x(out, "out");
  if (kAdd) check_like_x(*residual, "residual");

  const int64_t count = x.numel() / hidden;
  STD_TORCH_CHECK(hidden <= INT32_MAX && count <= INT32_MAX, "too many values: ", count, " rows of ", hidden);
  Rows rows{count, count, 0, hidden};
  if (!x.is_contiguous()) {
    STD_TORCH_CHECK(!kAdd && (dim == 2 || dim == 3) && x.stride(dim - 1) == 1,
                    "x must be contiguous, or a 2- or 3-dimensional view whose last dimension is");
    rows = dim == 2 ? Rows{count, count, 0, x.stride(0)} : Rows{count, x.size(1), x.stride(0), x.stride(1)};
    if (dim == 3 && x.size(1) == count) rows.outer_stride = 0;
  }
  if (count == 0) return;

  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Norm norm{int(hidden), float(eps), plus_one ? 1.f : 0.f};
  const ScalarType type = x.scalar_type(), weight_type = weight.scalar_type();
  STD_TORCH_CHECK(weight_type == type || weight_type == ScalarType::Float,
                  "weight must have the dtype of x, or be float32");
  const bool wide = weight_type == ScalarType::Float;
  if (type == ScalarType::BFloat16) {
    (wide ? run<__nv_bfloat16, float, kAdd> : run<__nv_bfloat16, __nv_bfloat16, kAdd>)(out, x, residual, weight, rows,
                                                                                       norm);
  } else if (type == ScalarType::Half) {
    (wide ? run<__half, float, kAdd> : run<__half, __half, kAdd>)(out, x, residual, weight, rows, norm);
  } else {
    STD_TORCH_CHECK(type == ScalarType::Float, "x must be bfloat16, float16 or float32");
    run<float, float, kAdd>(out, x, residual, weight, rows, norm);
  }
}

void rms_norm(const Tensor out, const Tensor x, const Tensor weight, double eps, bool plus_one) {
  check_and_run<false>(out, x, nullptr, weight, eps, plus_one);
}

void fused_add_rms_norm(const Tensor x, const Tensor residual, const Tensor weight, double eps, bool plus_one) {
  check_and_run<true>(x, x, &residual, weight, eps, plus_one);
}

}  // namespace
}  // namespace vllm

STABLE_TORCH_LIBRARY_FRAGMENT(vllm_c, m) {
  m.def("rms_norm(Tensor(a!) out, Tensor x, Tensor weight, float eps, bool plus_one) -> ()");
  m.def("fused_add_rms_norm(Tensor(a!) x, Tensor(b!) residual, Tensor weight, float eps, bool plus_one) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_c, CUDA, m) {
  m.impl("rms_norm", TORCH_BOX(&vllm::rms_norm));
  m.impl("fused_add_rms_norm", TORCH_BOX(&vllm::fused_add_rms_norm));
}
