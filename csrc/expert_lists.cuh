// Which tokens chose which experts: every block of experts_w4.cuh finds out for itself, for up to 64 tokens.
#pragma once

#include "hopper.cuh"

namespace vllm {
namespace experts {

constexpr int kMostTokens = 64, kMostExperts = 512, kMostChoices = 32;  // choices: of a token
constexpr int kTogether = 8;                                            // tokens of a list

struct Routing {        // a token's choices are the best of its logits
  const float* logits;  // [tokens, experts and, in one column more, the shared expert's gate]
  int row, tokens, experts, top_k;
  int most_lists;
};

// Lists that there may be: one for each choice, or for each 8 of them and each expert that leaves one unfilled.
__host__ __device__ constexpr int64_t most_lists(int64_t tokens, int64_t experts, int64_t top_k) {
  const int64_t choices = tokens * top_k, unfilled = (choices + experts * (kTogether - 1)) / kTogether;
  return choices < unfilled ? choices : unfilled;
}

// Chosen experts, in ascending order: how many tokens each has, and which.
struct Lists {
  float* share;                   // [lists, 8]; for down
  unsigned short* expert;         // [lists]
  unsigned char *tokens, *token;  // [lists], [lists, 8]
  int count;

  static __host__ __device__ constexpr int bytes(int most, bool shares) {
    return (most * (kTogether * (shares ? 5 : 1) + 3) + 127) / 128 * 128;
  }
  __device__ Lists(unsigned char* at, int most, bool shares) {
    share = reinterpret_cast<float*>(at);
    token = at + (shares ? most * kTogether * 4 : 0);
    expert = reinterpret_cast<unsigned short*>(token + most * kTogether);
    tokens = reinterpret_cast<unsigned char*>(expert + most);
    count = 0;
  }
};

struct Scratch {                        // what is needed until the lists are there
  unsigned chosen_by[2][kMostExperts];  // tokens as bits
  unsigned short first[kMostExperts], chosen[kMostTokens * kMostChoices];
  float share[kMostTokens * kMostChoices];
  int lists[kMostExperts / 32];
};

#if __CUDA_ARCH__ >= 900

// The choices of a token are the largest keys: logits rounded to an order of integers, and experts counted down. With
// logits as a lane has them, lane k gets choice k < top_k.
template <int kKeys>
__device__ inline int choose(const float (&logits)[kKeys], int experts, int top_k) {
  const int lane = threadIdx.x % 32, low = (1 << (32 - __clz(experts - 1))) - 1;
  int keys[kKeys], mine = 0;
#pragma unroll
  for (int i = 0; i < kKeys; ++i) {
    const int e = lane + 32 * i, bits = __float_as_int(logits[i]);
    keys[i] = e < experts ? ((bits ^ (bits >> 31 & 0x7fffffff)) & ~low) | (low - e) : INT32_MIN;
  }
  for (int k = 0; k < top_k; ++k) {
    int most[8];
#pragma unroll
    for (int i = 0; i < kKeys; ++i) most[i % 8] = i < 8 ? keys[i] : max(most[i % 8], keys[i]);
#pragma unroll
    for (int half = 4; half > 0; half /= 2) {
#pragma unroll
      for (int i = 0; i < half; ++i) most[i] = max(most[i], most[i + half]);
    }
    const int best = __reduce_max_sync(0xffffffffu, most[0]);
#pragma unroll
    for (int i = 0; i < kKeys; ++i) keys[i] = keys[i] == best ? INT32_MIN : keys[i];
    if (lane == k) mine = low - (best & low);
  }
  return min(mine, experts - 1);
}

// The share of choice k in its token, by lane: softmax over the chosen logits.
__device__ inline float share_of(float logit, int top_k) {
  const int lane = threadIdx.x % 32;
  float most = lane < top_k ? logit : -INFINITY;
  for (int step = 16; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, step));
  const float share = lane < top_k ? __expf(logit - most) : 0.f;
  float sum = share;
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  return share / sum;
}

// All threads of a block make its lists.
template <int kKeys, bool kShares>
__device__ inline void make_lists(Lists& to, Scratch& s, const Routing& r) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, threads = blockDim.x;
  for (int i = threadIdx.x; i < 2 * kMostExperts; i += threads) s.chosen_by[i / kMostExperts][i % kMostExperts] = 0;
  __syncthreads();
  float logits[kKeys] = {};
  const auto load = [&](int t) {
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      if (lane + 32 * i < r.experts) logits[i] = __ldcg(r.logits + int64_t(t) * r.row + lane + 32 * i);
    }
  };
  if (warp < r.tokens) load(warp);
  for (int t = warp; t < r.tokens; t += warps) {
    float own[kKeys];
#pragma unroll
    for (int i = 0; i < kKeys; ++i) own[i] = logits[i];
    if (t + warps < r.tokens) load(t + warps);
    const int expert = choose(own, r.experts, r.top_k);
    float share = 0.f;
    if (kShares) share = share_of(lane < r.top_k ? __ldcg(r.logits + int64_t(t) * r.row + expert) : 0.f, r.top_k);
    if (lane < r.top_k) {
      atomicOr(&s.chosen_by[t / 32][expert], 1u << t % 32);
      s.chosen[t * r.top_k + lane] = (unsigned short)expert;
      if (kShares) s.share[t * r.top_k + lane] = share;
    }
  }
  __syncthreads();
  const int groups = (r.experts + 31) / 32;  // of experts, one a lane
  const auto tokens_of = [&](int expert) { return __popc(s.chosen_by[0][expert]) + __popc(s.chosen_by[1][expert]); };
  for (int group = warp; group < groups; group += warps) {
    const int lists = (tokens_of(group * 32 + lane) + kTogether - 1) / kTogether;
    int sum = lists;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int before = __shfl_up_sync(0xffffffffu, sum, step);
      if (lane >= step) sum += before;
    }
    s.first[group * 32 + lane] = (unsigned short)(sum - lists);
    if (lane == 31) s.lists[group] = sum;
  }
  __syncthreads();
  for (int group = 0; group < groups; ++group) {
    if (group % warps == warp) {
      const int expert = group * 32 + lane, tokens = tokens_of(expert), first = to.count + s.first[expert];
      s.first[expert] = (unsigned short)first;
      for (int i = 0; i * kTogether < tokens; ++i) {
        to.expert[first + i] = (unsigned short)expert;
        to.tokens[first + i] = (unsigned char)min(kTogether, tokens - i * kTogether);
      }
    }
    to.count += s.lists[group];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < r.tokens * r.top_k; i += threads) {
    const int t = i / r.top_k, expert = s.chosen[i];
    const unsigned earlier = (1u << t % 32) - 1;
    const int before = t < 32 ? __popc(s.chosen_by[0][expert] & earlier)
                              : __popc(s.chosen_by[0][expert]) + __popc(s.chosen_by[1][expert] & earlier);
    const int at = s.first[expert] * kTogether + before;
    to.token[at] = (unsigned char)t;
    if (kShares) to.share[at] = s.share[i];
  }
  __syncthreads();
}

#endif

}  // namespace experts
}  // namespace vllm
