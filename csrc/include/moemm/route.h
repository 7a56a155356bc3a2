// What route_topk and its backward pass take, allocate and return, on any device.
// T tokens, E experts, K chosen, M modalities.
#pragma once

#include <ATen/ops/empty.h>

#include <optional>

#include "moemm/checks.h"
#include "moemm/dispatch.h"

namespace moemm {

// The arguments of both passes, dense; bias is undefined where there is none.
struct RouteInputs {
  at::Tensor logits, modality, allowed, bias;
  int64_t num_tokens, num_experts, num_modalities;

  RouteInputs(const at::Tensor& logits_, const at::Tensor& modality_, const at::Tensor& allowed_,
              const std::optional<at::Tensor>& bias_)
      : logits(with_dense_rows(logits_)),
        modality(modality_.contiguous()),
        allowed(allowed_.contiguous()),
        bias(bias_ ? bias_->to(accumulator_of(logits_.scalar_type())).contiguous() : at::Tensor()),
        num_tokens(logits_.size(0)),
        num_experts(logits_.size(1)),
        num_modalities(allowed_.size(0)) {}
};

// What else the backward pass takes, dense, and the gradient that it fills.
struct RouteGradients {
  at::Tensor dgates, dprob, dz, experts;
  at::Tensor dlogits;  // (T, E), contiguous

  RouteGradients(const at::Tensor& dgates_, const at::Tensor& dprob_, const at::Tensor& dz_, const at::Tensor& experts_,
                 const at::Tensor& logits)
      : dgates(dgates_.contiguous()),
        dprob(dprob_.contiguous()),
        dz(dz_.contiguous()),
        experts(experts_.contiguous()),
        dlogits(at::empty(logits.sizes(), logits.options().memory_format(at::MemoryFormat::Contiguous))) {}
};

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
