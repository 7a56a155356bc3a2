// Launch of plan on raw pointers.
#pragma once

#include <cuda_runtime.h>

#include "moemm/types.h"

namespace moemm::cuda {

constexpr int64_t kMaxPlanExperts = 1024;  // what shared memory holds
constexpr int64_t kPlanSlots = 2048;       // slots that one block sorts

struct PlanArguments {
  Index index;
  const void* experts;  // (T K,)
  int64_t* histograms;  // (blocks, E) scratch, blocks = ceil(T K / kPlanSlots)
  int64_t* counts;      // (E,)
  int64_t* offsets;     // (E + 1,), multiples of alignment
  void* order;          // (R,)
  void* inverse;        // (T K,)
  int64_t num_slots, num_experts, num_rows, alignment;
};

cudaError_t launch_plan(const PlanArguments& arguments, cudaStream_t stream);

}  // namespace moemm::cuda
