// The plan of a dispatch: slots sorted by expert, stable. T tokens, K slots a token, E experts, R rows.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <vector>

#include "moemm/checks.h"
#include "moemm/dispatch.h"

namespace moemm::cpu {

struct Plan {
  at::Tensor counts;   // (E,) int64
  at::Tensor offsets;  // (E + 1,) int64: first row of each expert; the last entry ends the last expert
  at::Tensor order;    // (R,)
  at::Tensor inverse;  // (T, K)
};

// Slots that one histogram covers; fixed, so that the work is cut alike on any number of threads.
constexpr int64_t kPlanChunk = 16384;

// First free row of each (chunk, expert), from the histograms; rows of an expert start at a multiple of `alignment`.
inline std::vector<int64_t> first_rows(const std::vector<int64_t>& histograms, int64_t num_chunks, int64_t num_experts,
                                       int64_t alignment, Plan& plan) {
  auto* counts = plan.counts.mutable_data_ptr<int64_t>();
  auto* offsets = plan.offsets.mutable_data_ptr<int64_t>();
  std::vector<int64_t> next(histograms.size());
  int64_t row = 0;
  for (int64_t expert = 0; expert < num_experts; ++expert) {
    offsets[expert] = row;
    const int64_t start = row;
    for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
      next[chunk * num_experts + expert] = row;
      row += histograms[chunk * num_experts + expert];
    }
    counts[expert] = row - start;
    row = start + (counts[expert] + alignment - 1) / alignment * alignment;
  }
  offsets[num_experts] = row;
  return next;
}

// num_rows < 0: as many as the aligned groups need; else that many, those after the last group without a slot.
template <typename index_t>
Plan make_plan(const char* op, const at::Tensor& experts, int64_t num_experts, int64_t alignment, int64_t num_rows) {
  const auto dense = experts.contiguous();
  const auto options = experts.options();
  const int64_t num_slots = experts.numel(), num_chunks = (num_slots + kPlanChunk - 1) / kPlanChunk;
  const auto* ids = dense.const_data_ptr<index_t>();
  Plan plan{at::empty({num_experts}, options.dtype(at::kLong)), at::empty({num_experts + 1}, options.dtype(at::kLong)),
            at::Tensor(), at::empty(experts.sizes(), options)};
  std::vector<int64_t> histograms(num_chunks * num_experts, 0);
  at::parallel_for(0, num_chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      auto* histogram = histograms.data() + chunk * num_experts;
      for (int64_t slot = chunk * kPlanChunk; slot < std::min((chunk + 1) * kPlanChunk, num_slots); ++slot) {
        if (!in_range(ids[slot], num_experts)) throw_bad_index(op, "experts", slot, ids[slot], num_experts);
        if (ids[slot] != kNone) ++histogram[ids[slot]];
      }
    }
  });
  auto next = first_rows(histograms, num_chunks, num_experts, alignment, plan);
  plan.order = at::empty({num_rows < 0 ? plan.offsets.const_data_ptr<int64_t>()[num_experts] : num_rows}, options);
  auto* order = plan.order.mutable_data_ptr<index_t>();
  auto* inverse = plan.inverse.mutable_data_ptr<index_t>();
  std::fill_n(order, plan.order.numel(), static_cast<index_t>(kNone));
  at::parallel_for(0, num_chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      auto* free = next.data() + chunk * num_experts;
      for (int64_t slot = chunk * kPlanChunk; slot < std::min((chunk + 1) * kPlanChunk, num_slots); ++slot) {
        const int64_t row = ids[slot] == kNone ? kNone : free[ids[slot]]++;
        inverse[slot] = static_cast<index_t>(row);
        if (row != kNone) order[row] = static_cast<index_t>(slot);
      }
    }
  });
  return plan;
}

}  // namespace moemm::cpu
