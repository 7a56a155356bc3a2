// What route_topk allocates and returns, on any device. T tokens, E experts, K chosen, M modalities.
#pragma once

#include <ATen/ops/empty.h>

#include "moemm/checks.h"
#include "moemm/dispatch.h"

namespace moemm {

struct RouteResults {
  at::Tensor gates, experts;  // (T, K)
  at::Tensor sums;            // (2 M E + 2 M,): load, prob, z, tokens

  RouteResults(const at::Tensor& logits, const at::Tensor& allowed, int64_t top_k) {
    const auto wide = logits.options().dtype(accumulator_of(logits.scalar_type()));
    gates = at::empty({logits.size(0), top_k}, wide);
    experts = at::empty({logits.size(0), top_k}, logits.options().dtype(at::kLong));
    sums = at::empty({2 * allowed.numel() + 2 * allowed.size(0)}, wide);
  }

  // The sums apart: outputs of an op may not share memory.
  RouteOutputs outputs(const at::Tensor& allowed) const {
    const int64_t size = allowed.numel(), rows = allowed.size(0);
    return {gates,
            experts,
            sums.narrow(0, 0, size).view(allowed.sizes()).clone(),
            sums.narrow(0, size, size).view(allowed.sizes()).clone(),
            sums.narrow(0, 2 * size, rows).clone(),
            sums.narrow(0, 2 * size + rows, rows).clone()};
  }
};

}  // namespace moemm
