// Bodies over single rows, and the gather-sum that combine and the backward pass of permute share.
// T tokens, D width, K slots a token, R rows.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <vector>

#include "moemm/checks.h"
#include "moemm/dispatch.h"
#include "simd.h"

namespace moemm::cpu {

// Elements that are worth handing to another thread.
constexpr int64_t kGrain = 32768;

inline int64_t grain_of(int64_t elements_per_item) {
  return std::max<int64_t>(1, kGrain / (elements_per_item + 1));
}

template <typename acc_t, typename scalar_t>
struct Source {
  const scalar_t* row;
  acc_t gate;
};

// out[i] = sum over sources of gate * row[i]; a block of sums stays in registers, so each byte is touched once.
template <typename acc_t, typename scalar_t>
MOEMM_SIMD void weighted_sum(scalar_t* out, const std::vector<Source<acc_t, scalar_t>>& sources, int64_t width) {
  constexpr int64_t kBlock = 64;
  for (int64_t start = 0; start < width; start += kBlock) {
    const int64_t count = std::min(kBlock, width - start);
    acc_t sums[kBlock] = {};
    for (const auto& source : sources) {
      const scalar_t* row = source.row + start;
      for (int64_t i = 0; i < count; ++i) sums[i] += source.gate * static_cast<acc_t>(widen(row[i]));
    }
    for (int64_t i = 0; i < count; ++i) store(out[start + i], sums[i]);
  }
}

// (R, D) -> (T, D): out[t] = residual[t] + sum over k of gates[t, k] * y[inverse[t, k]], in this order; gates nullptr:
// all one; residual undefined: zeros.
template <typename scalar_t, typename index_t>
void gather_sum(const char* op, const at::Tensor& y, const at::Tensor& inverse, const Accumulator<scalar_t>* gates,
                const at::Tensor& residual, at::Tensor& out) {
  using acc_t = Accumulator<scalar_t>;
  const int64_t num_slots = inverse.size(1), width = y.size(1), num_rows = y.size(0), stride = y.stride(0);
  const auto* source = y.const_data_ptr<scalar_t>();
  const auto* index = inverse.const_data_ptr<index_t>();
  const auto* added = residual.defined() ? residual.const_data_ptr<scalar_t>() : nullptr;
  const int64_t added_stride = residual.defined() ? residual.stride(0) : 0;
  auto* target = out.mutable_data_ptr<scalar_t>();
  at::parallel_for(0, inverse.size(0), grain_of(width * num_slots), [&](int64_t begin, int64_t end) {
    std::vector<Source<acc_t, scalar_t>> sources;
    for (int64_t token = begin; token < end; ++token) {
      sources.clear();
      if (added != nullptr) sources.push_back({added + token * added_stride, acc_t(1)});
      for (int64_t slot = token * num_slots; slot < (token + 1) * num_slots; ++slot) {
        const int64_t row = index[slot];
        if (!in_range(row, num_rows)) throw_bad_index(op, "inverse", slot, row, num_rows);
        if (row != kNone) sources.push_back({source + row * stride, gates == nullptr ? acc_t(1) : gates[slot]});
      }
      weighted_sum(target + token * width, sources, width);
    }
  });
}

}  // namespace moemm::cpu
