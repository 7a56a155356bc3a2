// What the kernels share: 16-byte accesses, grids over rows, index errors. Includes no torch header.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <initializer_list>
#include <type_traits>

#include "moemm/types.h"

namespace moemm::cuda {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kAccessBytes = 16;

template <typename scalar_t, int count>
struct alignas(sizeof(scalar_t) * count) Pack {
  scalar_t item[count];
};

template <typename scalar_t>
using Accumulator = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

__device__ inline float widen(float value) {
  return value;
}
__device__ inline double widen(double value) {
  return value;
}
__device__ inline float widen(__nv_bfloat16 value) {
  return __bfloat162float(value);
}
template <typename scalar_t>
__device__ inline scalar_t narrow(Accumulator<scalar_t> value) {
  // torch builds with the implicit conversions of bfloat16 switched off.
  if constexpr (std::is_same_v<scalar_t, __nv_bfloat16>)
    return __float2bfloat16(value);
  else
    return value;
}

// Ends the kernel: an index out of range is an error, never a wild access. The host sees it at the next call.
__device__ __noinline__ inline void trap_bad_index(const char* name, int64_t at, int64_t value, int64_t size) {
  printf("moemm: %s holds %lld at flat position %lld; allowed is 0 to %lld, or -1 for none\n", name,
         static_cast<long long>(value), static_cast<long long>(at), static_cast<long long>(size - 1));
  __trap();
}

// Whether rows that start at `data` and lie `stride` bytes apart can be read 16 bytes at a time.
inline bool aligned(std::initializer_list<const void*> data, std::initializer_list<int64_t> bytes) {
  for (const void* one : data) {
    if (reinterpret_cast<uintptr_t>(one) % kAccessBytes != 0) return false;
  }
  for (const int64_t one : bytes) {
    if (one % kAccessBytes != 0) return false;
  }
  return true;
}

inline int64_t bytes_of(Element element) {
  return element == Element::kDouble ? 8 : element == Element::kFloat ? 4 : 2;
}

// Blocks of kThreads: threads along a row of `units` accesses first, then as many rows as fit.
struct RowGrid {
  dim3 threads;
  dim3 blocks;

  RowGrid(int64_t num_rows, int64_t units) {
    unsigned along = 1;
    while (along < kThreads && along < units) along *= 2;
    threads = dim3(along, kThreads / along);
    constexpr int64_t kMaxBlocks = 0x7fffffff;
    const int64_t needed = (num_rows + threads.y - 1) / threads.y;
    blocks = dim3(static_cast<unsigned>(needed < kMaxBlocks ? needed : kMaxBlocks));
  }
};

__device__ inline int64_t first_row() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
}
__device__ inline int64_t row_step() {
  return static_cast<int64_t>(gridDim.x) * blockDim.y;
}

}  // namespace moemm::cuda
