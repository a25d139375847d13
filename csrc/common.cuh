// What every kernel file shares with its host side: the launch, and the way out of torch's stable ABI.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <utility>

#include "hopper.cuh"
#include "values.cuh"

namespace vllm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, cudaStream_t stream, Args&&... args) {
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = stream;
  config.attrs = &overlap;
#ifdef VLLM_NO_PDL  // for measuring what it is worth
  config.numAttrs = 0;
#else
  config.numAttrs = 1;  // devices older than sm_90 ignore it
#endif
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(std::forward<Args>(args))...));
}

// A matrix on the device of `like`, whose rows are contiguous and begin at multiples of so many bytes.
inline void check_rows(const Tensor& t, const char* name, int64_t alignment, const Tensor& like) {
  STD_TORCH_CHECK(t.dim() == 2 && t.is_cuda() && t.get_device_index() == like.get_device_index() &&
                      (t.size(1) <= 1 || t.stride(1) == 1),
                  name, " must be a matrix of contiguous rows on the device of x");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(t.data_ptr()) % alignment == 0 &&
                      (t.size(0) == 1 || t.stride(0) * t.element_size() % alignment == 0),
                  "rows of ", name, " must begin at multiples of ", alignment, " bytes");
}

inline bool aligned16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace vllm
