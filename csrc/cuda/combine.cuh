// Launches of combine and its backward pass on raw pointers.
#pragma once

#include <cuda_runtime.h>

#include "moemm/types.h"

namespace moemm::cuda {

struct CombineArguments {
  Element element;
  Index index;
  const void* y;         // (R, D), rows y_stride elements apart
  const void* inverse;   // (T, K)
  const void* gates;     // (T, K) float, double where y is double; nullptr: all one
  const void* residual;  // (T, D), rows residual_stride elements apart; nullptr: zeros
  void* out;             // (T, D)
  int64_t y_stride, residual_stride, width;
  int64_t num_tokens, slots_per_token, num_rows;
};

struct CombineBackwardArguments {
  Element element;
  Index index;
  const void* grad;     // (T, D), rows grad_stride elements apart
  const void* y;        // (R, D), rows y_stride elements apart
  const void* inverse;  // (T, K)
  const void* gates;    // (T, K) float, double where y is double
  void* dy;             // (R, D)
  void* dgates;         // (T, K) of the gates' type
  uint8_t* marked;      // (R,) scratch: rows that some slot names
  int64_t grad_stride, y_stride, width;
  int64_t num_tokens, slots_per_token, num_rows;
};

cudaError_t launch_combine(const CombineArguments& arguments, cudaStream_t stream);
cudaError_t launch_combine_backward(const CombineBackwardArguments& arguments, cudaStream_t stream);

}  // namespace moemm::cuda
