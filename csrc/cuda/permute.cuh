// Launch of permute on raw pointers.
#pragma once

#include <cuda_runtime.h>

#include "moemm/types.h"

namespace moemm::cuda {

struct PermuteArguments {
  Index index;
  const void* x;      // (T, D), rows x_stride bytes apart
  const void* order;  // (R,)
  void* out;          // (R, D)
  int64_t element_bytes, x_stride, row_bytes;
  int64_t num_rows, num_slots, slots_per_token;
};

cudaError_t launch_permute(const PermuteArguments& arguments, cudaStream_t stream);

}  // namespace moemm::cuda
