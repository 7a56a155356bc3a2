// plan: where each slot of each token goes, so that the rows of each expert lie together.
#include "plan.h"

#include <torch/library.h>

#include <tuple>

namespace moemm::cpu {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> plan(const at::Tensor& experts, int64_t num_experts,
                                                                    int64_t alignment) {
  constexpr const char* op = "moemm::plan";
  check_experts(op, experts, num_experts);
  const int64_t num_rows = check_plan_rows(op, experts, num_experts, alignment);
  Plan made;
  dispatch_index(experts, [&]<typename index_t>(std::type_identity<index_t>) {
    made = make_plan<index_t>(op, experts, num_experts, alignment, num_rows);
  });
  return {made.counts, made.offsets, made.order, made.inverse};
}

}  // namespace

TORCH_LIBRARY_IMPL(moemm, CPU, m) {
  m.impl("plan", &plan);
}

}  // namespace moemm::cpu
