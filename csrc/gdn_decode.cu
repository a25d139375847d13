// One decode step of a GDN layer between its projections: convolution update, gating, l2norm, delta rule and gated RMS
// norm in one launch. The arithmetic is that of fused_gdn_decode_torch (fla/ops/fused_decode.py); states are [slots,
// Hv, V, K].
//
// A cluster of thread blocks serves one row and one key head: the value heads that share the key head, each cut into
// blocks of kRows rows of its state. The cluster is what lets one launch do everything: its barrier tells when all
// blocks have read the window of q and k, so that it may be rolled, and through distributed shared memory the blocks of
// a head add up the norm's sum of squares.
//
// Rounding follows the separate kernels: to the activations' dtype after the convolution and before the norm, fp32 in
// between. Instead of S' q after the update, a block takes e^g (S q) + delta (k q), so that one pass over S serves both
// products.

#include <optional>

#include "common.cuh"

#pragma nv_diag_suppress 177  // for sm_80, which has no clusters, the kernel is empty and its helpers unused

namespace vllm {
namespace {

constexpr int kTaps = 4;   // of the convolution
constexpr int kGroup = 8;  // threads that share a row of the state: 8 x 16 bytes, a whole cache line, an instruction
constexpr int kMaxCluster = 8;  // what every device with clusters can launch

// A vector of parameters in float32 or in the activations' dtype.
struct Vector {
  const void* data;
  bool wide;
  template <typename T>
  __device__ float at(int i) const {
    return wide ? static_cast<const float*>(data)[i] : to_float(static_cast<const T*>(data)[i]);
  }
};

struct Problem {
  const void *x, *z, *a, *b, *conv_weight, *conv_bias, *slots;
  void *windows, *state, *out;
  Vector A_log, dt_bias, norm_weight;
  int64_t x_row, z_row, a_row, b_row, weight_channel, weight_tap, window_slot, window_channel, window_tap, state_slot;
  int64_t slot_count;
  int key_heads, heads_a_key;
  float scale, norm_eps, l2_eps;
  bool wide_slots, silu, sigmoid_gate, l2norm, early;
};

__device__ inline void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
__device__ inline void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// *address = value in the shared memory of another block of the cluster.
__device__ inline void store_remote(float* address, int rank, float value) {
#if __CUDA_ARCH__ >= 900
  unsigned remote;
  const unsigned local = static_cast<unsigned>(__cvta_generic_to_shared(address));
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(local), "r"(rank));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(remote), "f"(value) : "memory");
#endif
}

__device__ inline float sigmoid(float x) { return 1.f / (1.f + __expf(-x)); }
__device__ inline float softplus(float x) { return x > 20.f ? x : log1pf(__expf(x)); }

// Sum over the kGroup threads that share a row.
__device__ inline float group_sum(float value) {
#pragma unroll
  for (int step = kGroup / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

// One channel's inputs: the window's three, oldest first, and the token's.
template <typename T>
struct Channel {
  T in[kTaps];
  float weight[kTaps], bias;

  __device__ void load_weight(const Problem& p, int64_t channel) {
    const T* w = static_cast<const T*>(p.conv_weight) + channel * p.weight_channel;
#pragma unroll
    for (int j = 0; j < kTaps; ++j) weight[j] = to_float(w[j * p.weight_tap]);
    bias = p.conv_bias ? to_float(static_cast<const T*>(p.conv_bias)[channel]) : 0.f;
  }
  __device__ void load_token(const Problem& p, int64_t row, int64_t channel) {
    in[kTaps - 1] = static_cast<const T*>(p.x)[row * p.x_row + channel];
  }
  __device__ T* window(const Problem& p, int64_t slot, int64_t channel) const {
    return static_cast<T*>(p.windows) + slot * p.window_slot + channel * p.window_channel;
  }
  __device__ void load_window(const Problem& p, int64_t slot, int64_t channel) {
    const T* from = window(p, slot, channel);
#pragma unroll
    for (int j = 0; j < kTaps - 1; ++j) in[j] = from[j * p.window_tap];
  }
  __device__ void store_window(const Problem& p, int64_t slot, int64_t channel) const {
    T* to = window(p, slot, channel);
#pragma unroll
    for (int j = 0; j < kTaps - 1; ++j) to[j * p.window_tap] = in[j + 1];
  }
  __device__ float convolved(bool silu) const {
    float sum = bias;
#pragma unroll
    for (int j = 0; j < kTaps; ++j) sum += to_float(in[j]) * weight[j];
    if (silu) sum *= sigmoid(sum);
    return to_float(from_float<T>(sum));
  }
};

// kRows rows of one head's state, K = V = kDim. Threads: groups of kGroup along K, kPasses rows each.
template <typename T, typename S, int kDim, int kRows, int kPasses>
__global__ void __launch_bounds__(kRows / kPasses * kGroup) gdn_decode_kernel(const __grid_constant__ Problem p) {
#if __CUDA_ARCH__ >= 900
  constexpr int kVec = 16 / sizeof(S), kPacks = kDim / (kGroup * kVec), kParts = kDim / kRows;
  constexpr int kThreads = kRows / kPasses * kGroup, kWarps = kThreads / 32, kGroups = kThreads / kGroup;
  constexpr int kItems = 2 * kDim / kThreads;  // channels of q and k a thread convolves
  static_assert(kItems * kThreads == 2 * kDim && kRows <= kThreads && kPacks > 0);
  using Values = Pack<S, kVec>;

  __shared__ __align__(16) float query_key[2 * kDim];  // q, then k
  __shared__ float value[kRows], output[kRows];
  __shared__ float squares[kParts * kWarps];  // of every block of this head

  cluster_arrive();  // I have started: my shared memory may be written
  const int thread = threadIdx.x, warp = thread / 32, group = thread / kGroup, lane = thread % kGroup;
  const int cluster = p.heads_a_key * kParts, rank = blockIdx.x % cluster, part = rank % kParts;
  const int key_head = blockIdx.x / cluster % p.key_heads, head = key_head * p.heads_a_key + rank / kParts;
  const int64_t row = blockIdx.x / (cluster * p.key_heads), heads = int64_t(p.key_heads) * p.heads_a_key;
  const int64_t key_dim = int64_t(p.key_heads) * kDim;
  const int64_t tile = (head * int64_t(kDim) + part * kRows) * kDim;  // of the slot's state
  const int64_t own = head * int64_t(kDim) + part * kRows + thread;  // this thread's row of the head, if thread < kRows
  const bool has_row = thread < kRows;
  const auto channel_of = [&](int item) {
    const int i = thread + item * kThreads;
    return i < kDim ? key_head * int64_t(kDim) + i : key_dim + key_head * int64_t(kDim) + i - kDim;
  };
  const auto read_slot = [&] {
    return p.wide_slots ? __ldcg(static_cast<const long long*>(p.slots) + row)
                        : static_cast<long long>(__ldcg(static_cast<const int*>(p.slots) + row));
  };

  // Parameters do not change from step to step, so they need not wait for the kernel before. The slot may change: what
  // it says now is good for bringing its state into the L2 cache, and is read again below.
  Channel<T> qk[kItems], v;
#pragma unroll
  for (int i = 0; i < kItems; ++i) qk[i].load_weight(p, channel_of(i));
  if (has_row) v.load_weight(p, 2 * key_dim + own);
  const float decay = -__expf(p.A_log.at<T>(head)), bias = p.dt_bias.at<T>(head);
  const float norm_weight = has_row ? p.norm_weight.at<T>(part * kRows + thread) : 0.f;
  int64_t slot = -1;
  if (p.early) {
    slot = read_slot();
    if (slot >= p.slot_count) slot = -1;
    if (slot >= 0) {
      const char* from = reinterpret_cast<const char*>(static_cast<const S*>(p.state) + slot * p.state_slot + tile);
      for (int line = thread; line < int(kRows * kDim * sizeof(S) / 128); line += kThreads) {
        prefetch(from + line * 128);
      }
    }
  }
  wait_for_predecessor();
  let_successor_start();

#pragma unroll
  for (int i = 0; i < kItems; ++i) qk[i].load_token(p, row, channel_of(i));
  if (has_row) v.load_token(p, row, 2 * key_dim + own);
  const float a = to_float(static_cast<const T*>(p.a)[row * p.a_row + head]);
  const float b = to_float(static_cast<const T*>(p.b)[row * p.b_row + head]);
  const float z = has_row ? to_float(static_cast<const T*>(p.z)[row * p.z_row + own]) : 0.f;
  T* const out = static_cast<T*>(p.out) + row * heads * kDim + own;

  Values s[kPasses][kPacks];
  const auto state_at = [&](int pass, int pack) {
    return static_cast<S*>(p.state) + slot * p.state_slot + tile + int64_t(pass * kGroups + group) * kDim +
           (pack * kGroup + lane) * kVec;
  };
  const auto load_slot = [&] {
#pragma unroll
    for (int i = 0; i < kItems; ++i) qk[i].load_window(p, slot, channel_of(i));
    if (has_row) v.load_window(p, slot, 2 * key_dim + own);
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
#pragma unroll
      for (int pack = 0; pack < kPacks; ++pack) {
        const float4 bits = __ldcg(reinterpret_cast<const float4*>(state_at(pass, pack)));
        s[pass][pack] = *reinterpret_cast<const Values*>(&bits);
      }
    }
  };
  if (slot >= 0) load_slot();  // while the index is read again
  const int64_t now = read_slot();
  if (now != slot) {
    slot = now;
    if (slot >= 0) load_slot();
  }
  if (slot < 0) {  // padding, for every block of the cluster
    if (has_row) *out = from_float<T>(0.f);
    cluster_wait();
    return;
  }

#pragma unroll
  for (int i = 0; i < kItems; ++i) query_key[thread + i * kThreads] = qk[i].convolved(p.silu);
  if (has_row) value[thread] = v.convolved(p.silu);
  __syncthreads();

  // [packs of this thread's columns]; lengths are divided out of the products
  float q[kPacks][kVec], k[kPacks][kVec], qq = 0.f, kk = 0.f, qk_dot = 0.f;
#pragma unroll
  for (int pack = 0; pack < kPacks; ++pack) {
    const int column = (pack * kGroup + lane) * kVec;
#pragma unroll
    for (int j = 0; j < kVec; j += 4) {
      *reinterpret_cast<float4*>(&q[pack][j]) = *reinterpret_cast<const float4*>(&query_key[column + j]);
      *reinterpret_cast<float4*>(&k[pack][j]) = *reinterpret_cast<const float4*>(&query_key[kDim + column + j]);
    }
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      qq += q[pack][j] * q[pack][j];
      kk += k[pack][j] * k[pack][j];
      qk_dot += q[pack][j] * k[pack][j];
    }
  }
  float sq[kPasses], sk[kPasses];
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    sq[pass] = sk[pass] = 0.f;
#pragma unroll
    for (int pack = 0; pack < kPacks; ++pack) {
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        sq[pass] += to_float(s[pass][pack].v[j]) * q[pack][j];
        sk[pass] += to_float(s[pass][pack].v[j]) * k[pack][j];
      }
    }
  }
  const float forget = __expf(decay * softplus(a + bias)), beta = sigmoid(b);
  qq = group_sum(qq);
  kk = group_sum(kk);
  const float q_factor = p.scale * (p.l2norm ? rsqrtf(qq + p.l2_eps) : 1.f);
  const float k_factor = p.l2norm ? rsqrtf(kk + p.l2_eps) : 1.f;
  qk_dot = group_sum(qk_dot) * q_factor * k_factor;

  float delta[kPasses], sum = 0.f;
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int r = pass * kGroups + group;
    delta[pass] = beta * (value[r] - forget * k_factor * group_sum(sk[pass]));
    const float o = forget * q_factor * group_sum(sq[pass]) + delta[pass] * qk_dot;
    const float rounded = to_float(from_float<T>(o));
    if (lane == 0) output[r] = rounded;
    sum += rounded * rounded;
  }
#pragma unroll
  for (int step = kGroup; step < 32; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  cluster_wait();  // everyone has started
  if (thread % 32 < kParts) store_remote(&squares[part * kWarps + warp], rank - part + thread % 32, sum);
  __syncwarp();
  cluster_arrive();  // I have read the windows and told my sum; the stores below need not be over for that

#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const float step = delta[pass] * k_factor;
#pragma unroll
    for (int pack = 0; pack < kPacks; ++pack) {
      Values next;
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        next.v[j] = from_float<S>(forget * to_float(s[pass][pack].v[j]) + step * k[pack][j]);
      }
      *reinterpret_cast<Values*>(state_at(pass, pack)) = next;
    }
  }
  if (has_row) v.store_window(p, slot, 2 * key_dim + own);
  cluster_wait();

  if (has_row) {
    float total = 0.f;
#pragma unroll
    for (int i = 0; i < kParts * kWarps; ++i) total += squares[i];
    const float gate = p.sigmoid_gate ? sigmoid(z) : z * sigmoid(z);
    *out = from_float<T>(output[thread] * rsqrtf(total / kDim + p.norm_eps) * norm_weight * gate);
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if ((i * kWarps + warp) % cluster == rank) qk[i].store_window(p, slot, channel_of(i));
  }
#endif
}

template <typename T, typename S, int kDim, int kRows, int kPasses>
void launch_rows(const Problem& problem, int64_t rows, cudaStream_t stream) {
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {unsigned(problem.heads_a_key * (kDim / kRows)), 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(rows * problem.key_heads * attributes[0].val.clusterDim.x);
  config.blockDim = dim3(kRows / kPasses * kGroup);
  config.stream = stream;
  config.attrs = attributes;
#ifdef VLLM_NO_PDL  // for measuring what it is worth
  config.numAttrs = 1;
#else
  config.numAttrs = 2;
#endif
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, gdn_decode_kernel<T, S, kDim, kRows, kPasses>, problem));
}

template <typename T, typename S>
void launch_dim(const Problem& problem, int64_t rows, int dim, int rows_a_block, cudaStream_t stream) {
  if (dim == 128) {
    (rows_a_block == 32 ? launch_rows<T, S, 128, 32, 2> : launch_rows<T, S, 128, 64, 4>)(problem, rows, stream);
  } else {
    (rows_a_block == 32 ? launch_rows<T, S, 64, 32, 2> : launch_rows<T, S, 64, 64, 4>)(problem, rows, stream);
  }
}

void check_vector(const Tensor& vector, const char* name, int64_t size, const Tensor& like) {
  STD_TORCH_CHECK(vector.dim() == 1 && vector.size(0) == size && vector.is_contiguous() && vector.is_cuda(), name,
                  " must be one contiguous vector of ", size, " values on the device");
  STD_TORCH_CHECK(vector.scalar_type() == like.scalar_type() || vector.scalar_type() == ScalarType::Float, name,
                  " must have the dtype of mixed_qkv, or be float32");
}

Vector as_vector(const Tensor& vector) { return {vector.data_ptr(), vector.scalar_type() == ScalarType::Float}; }

void gdn_decode(const Tensor out, const Tensor mixed_qkv, const Tensor z, const Tensor a, const Tensor b,
                const Tensor conv_state, const Tensor conv_weight, const std::optional<Tensor> conv_bias,
                const Tensor A_log, const Tensor dt_bias, const Tensor norm_weight, double eps, const Tensor ssm_state,
                const Tensor state_indices, double scale, bool silu, bool sigmoid_gate, bool l2norm,
                int64_t rows_a_block, bool early) {
  STD_TORCH_CHECK(mixed_qkv.dim() == 2 && ssm_state.dim() == 4,
                  "mixed_qkv must be [B, dim], ssm_state [slots, Hv, V, K]");
  const int64_t rows = mixed_qkv.size(0), dim = mixed_qkv.size(1);
  const int64_t heads = ssm_state.size(1), head_dim = ssm_state.size(2);
  const ScalarType type = mixed_qkv.scalar_type();
  STD_TORCH_CHECK(ssm_state.size(3) == head_dim && (head_dim == 64 || head_dim == 128),
                  "needs K = V = 64 or 128, got K = ", ssm_state.size(3), " and V = ", head_dim);
  const int64_t key_heads = (dim - heads * head_dim) / (2 * head_dim);
  STD_TORCH_CHECK(key_heads > 0 && dim == (2 * key_heads + heads) * head_dim && heads % key_heads == 0, "rows of ", dim,
                  " do not split into q, k of Hk x ", head_dim, " and v of ", heads, " x ", head_dim);
  const int64_t heads_a_key = heads / key_heads;
  STD_TORCH_CHECK(rows_a_block == 32 || rows_a_block == 64, "rows_a_block must be 32 or 64, got ", rows_a_block);
  STD_TORCH_CHECK(heads_a_key * (head_dim / rows_a_block) <= kMaxCluster, "a cluster holds ", kMaxCluster,
                  " blocks, and ", heads_a_key, " heads of ", head_dim, " rows in blocks of ", rows_a_block,
                  " need more");
  const auto check_rows = [&](const Tensor& t, const char* name, int64_t size) {
    STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == size && t.stride(1) == 1 && t.is_cuda() &&
                        t.scalar_type() == type,
                    name, " must be [", rows, ", ", size, "] with contiguous rows, in the dtype of mixed_qkv");
  };
  check_rows(mixed_qkv, "mixed_qkv", dim);
  check_rows(z, "z", heads * head_dim);
  check_rows(a, "a", heads);
  check_rows(b, "b", heads);
  STD_TORCH_CHECK(out.is_contiguous() && out.numel() == rows * heads * head_dim && out.scalar_type() == type,
                  "out must be a contiguous [", rows, ", ", heads, ", ", head_dim, "] in the dtype of mixed_qkv");
  STD_TORCH_CHECK(conv_weight.dim() == 2 && conv_weight.size(0) == dim && conv_weight.size(1) == kTaps &&
                      conv_weight.scalar_type() == type,
                  "conv_weight must be [", dim, ", ", kTaps, "] in the dtype of mixed_qkv");
  STD_TORCH_CHECK(conv_state.dim() == 3 && conv_state.size(1) == dim && conv_state.size(2) >= kTaps - 1 &&
                      conv_state.scalar_type() == type,
                  "conv_state must be [slots, ", dim, ", >= ", kTaps - 1, "] in the dtype of mixed_qkv");
  STD_TORCH_CHECK(!conv_bias.has_value() || (conv_bias->dim() == 1 && conv_bias->size(0) == dim &&
                                             conv_bias->is_contiguous() && conv_bias->scalar_type() == type),
                  "conv_bias must be [", dim, "] in the dtype of mixed_qkv");
  check_vector(A_log, "A_log", heads, mixed_qkv);
  check_vector(dt_bias, "dt_bias", heads, mixed_qkv);
  check_vector(norm_weight, "norm_weight", head_dim, mixed_qkv);
  const ScalarType state_type = ssm_state.scalar_type(), index_type = state_indices.scalar_type();
  const bool wide_state = state_type == ScalarType::Float;
  STD_TORCH_CHECK(wide_state || state_type == ScalarType::BFloat16, "states are kept in float32 or bfloat16");
  STD_TORCH_CHECK(ssm_state.stride(3) == 1 && ssm_state.stride(2) == head_dim &&
                      ssm_state.stride(1) == head_dim * head_dim && ssm_state.stride(0) % 8 == 0 &&
                      aligned16(ssm_state.data_ptr()),
                  "slots of the state pool must be contiguous and begin at multiples of 16 bytes");
  STD_TORCH_CHECK(state_indices.dim() == 1 && state_indices.size(0) == rows && state_indices.is_contiguous() &&
                      (index_type == ScalarType::Int || index_type == ScalarType::Long),
                  "state_indices must be ", rows, " contiguous int32 or int64 values");
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half, "mixed_qkv must be bfloat16 or float16");
  if (rows == 0) return;
  STD_TORCH_CHECK(rows * heads <= (int64_t{1} << 28), "too many rows: ", rows);

  Problem p{};
  p.x = mixed_qkv.data_ptr();
  p.z = z.data_ptr();
  p.a = a.data_ptr();
  p.b = b.data_ptr();
  p.conv_weight = conv_weight.data_ptr();
  p.conv_bias = conv_bias.has_value() ? conv_bias->data_ptr() : nullptr;
  p.slots = state_indices.data_ptr();
  p.windows = conv_state.data_ptr();
  p.state = ssm_state.data_ptr();
  p.out = out.data_ptr();
  p.A_log = as_vector(A_log);
  p.dt_bias = as_vector(dt_bias);
  p.norm_weight = as_vector(norm_weight);
  p.x_row = mixed_qkv.stride(0);
  p.z_row = z.stride(0);
  p.a_row = a.stride(0);
  p.b_row = b.stride(0);
  p.weight_channel = conv_weight.stride(0);
  p.weight_tap = conv_weight.stride(1);
  p.window_slot = conv_state.stride(0);
  p.window_channel = conv_state.stride(1);
  p.window_tap = conv_state.stride(2);
  p.state_slot = ssm_state.stride(0);
  p.slot_count = ssm_state.size(0);
  p.key_heads = int(key_heads);
  p.heads_a_key = int(heads_a_key);
  p.scale = float(scale);
  p.norm_eps = float(eps);
  p.l2_eps = 1e-6f;
  p.wide_slots = index_type == ScalarType::Long;
  p.silu = silu;
  p.sigmoid_gate = sigmoid_gate;
  p.l2norm = l2norm;
  p.early = early;

  const torch::stable::accelerator::DeviceGuard guard(mixed_qkv.get_device_index());
  int major = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, mixed_qkv.get_device_index()));
  STD_TORCH_CHECK(major >= 9, "thread block clusters need sm_90 or newer");
  const cudaStream_t stream = current_stream(mixed_qkv);
  const auto run = type == ScalarType::BFloat16
                       ? (wide_state ? launch_dim<__nv_bfloat16, float> : launch_dim<__nv_bfloat16, __nv_bfloat16>)
                       : (wide_state ? launch_dim<__half, float> : launch_dim<__half, __nv_bfloat16>);
  run(p, rows, int(head_dim), int(rows_a_block), stream);
}

}  // namespace
}  // namespace vllm

STABLE_TORCH_LIBRARY_FRAGMENT(vllm_c, m) {
  m.def(
      "gdn_decode(Tensor(a!) out, Tensor mixed_qkv, Tensor z, Tensor a, Tensor b, Tensor(b!) conv_state, "
      "Tensor conv_weight, Tensor? conv_bias, Tensor A_log, Tensor dt_bias, Tensor norm_weight, float eps, "
      "Tensor(c!) ssm_state, Tensor state_indices, float scale, bool silu, bool sigmoid_gate, bool l2norm, "
      "int rows_a_block, bool early) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_c, CUDA, m) { m.impl("gdn_decode", TORCH_BOX(&vllm::gdn_decode)); }
