// The experts' networks over rows that are grouped by expert: what grouped_mlp and moe_ffn share.
// D width, F hidden width, H rows of w1 (2 F for swiglu, else F), E experts, R rows.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <string_view>
#include <vector>

#include "activation.h"

namespace moemm::cpu {

// Groups start at a multiple of this: oneDNN makes its kernels anew for every row count that it has not seen.
constexpr int64_t kAlignment = 16;

inline int64_t aligned(int64_t count) {
  return (count + kAlignment - 1) / kAlignment * kAlignment;
}

// Weights, one tensor an expert; b1 and b2 empty without biases.
struct Experts {
  std::vector<at::Tensor> w1, w2, b1, b2;
  Activation activation;
  int64_t width, max_hidden, max_rows_w1;

  Experts(const char* op, at::TensorList w1, at::TensorList w2, at::TensorList b1, at::TensorList b2,
          std::string_view activation, const at::Tensor& like);
  int64_t size() const { return static_cast<int64_t>(w1.size()); }
};

// Aligned rows: those of expert e are first[e] to first[e] + count[e], padding up to the next multiple follows.
struct Rows {
  std::vector<int64_t> first, count;
  std::vector<int64_t> source;  // row of x that each aligned row takes, kNone for padding

  int64_t total() const { return static_cast<int64_t>(source.size()); }
};

struct ExpertGradients {
  std::vector<at::Tensor> w1, w2, b1, b2;
};

// Takes the gradients of the gathered x of experts `begin` to `end`: (their aligned rows, D), the first of them being
// aligned row rows.first[begin], and makes part `part` of `parts` of what it does with them. Parts run at the same time,
// those of one run of experts after those of the one before.
using RowSink =
    std::function<void(int64_t begin, int64_t end, const at::Tensor& gradients, int64_t part, int64_t parts)>;

// Shape of z for `num_rows` rows: known before the counts are, so that a compiler can plan with it.
std::vector<int64_t> hidden_shape(const Experts& experts, int64_t num_rows);

// (aligned rows, D) outputs. z, the pre-activations, is filled where it has rows, and else kept in scratch.
template <typename scalar_t>
at::Tensor experts_forward(const Experts& experts, const Rows& rows, const at::Tensor& x, at::Tensor& z);

// gate: of each aligned row, 0 for padding; dgate receives its gradient. z without rows is computed again.
template <typename scalar_t>
ExpertGradients experts_backward(const Experts& experts, const Rows& rows, const at::Tensor& x, const at::Tensor& z,
                                 const at::Tensor& grad, const std::vector<Accumulator<scalar_t>>& gate,
                                 std::vector<Accumulator<scalar_t>>& dgate, const RowSink& sink);

}  // namespace moemm::cpu
