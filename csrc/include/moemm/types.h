// Types that CPU and CUDA code share. Includes no torch header.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MOEMM_HOST_DEVICE __host__ __device__
#else
#define MOEMM_HOST_DEVICE
#endif

namespace moemm {

// Marks a row of `order` that is padding, or a slot of `inverse` that was dropped.
constexpr int64_t kNone = -1;

// Whether `index` names one of `size` entries, or none.
MOEMM_HOST_DEVICE inline bool in_range(int64_t index, int64_t size) {
  return index >= kNone && index < size;
}

// Element and index types of tensors, on their way from the torch part to the kernels.
enum class Element { kFloat, kDouble, kBFloat16 };
enum class Index { kInt32, kInt64 };

}  // namespace moemm
