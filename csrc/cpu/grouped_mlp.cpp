// grouped_mlp: every expert's network over its own rows. R rows, D width, E experts.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstring>
#include <numeric>
#include <tuple>

#include "experts.h"
#include "moemm/checks.h"
#include "rows.h"

namespace moemm::cpu {
namespace {

Rows rows_of(const char* op, const at::Tensor& offsets, int64_t num_rows) {
  const auto dense = offsets.contiguous();
  const auto* first = dense.const_data_ptr<int64_t>();
  const int64_t num_experts = offsets.size(0) - 1;
  TORCH_CHECK_INDEX(first[0] == 0 && first[num_experts] <= num_rows, op, ": offsets must start at 0 and end at most at ",
                    num_rows, " (R), but go from ", first[0], " to ", first[num_experts]);
  Rows rows;
  for (int64_t e = 0; e < num_experts; ++e) {
    const int64_t count = first[e + 1] - first[e];
    TORCH_CHECK_INDEX(count >= 0 && first[e + 1] <= num_rows, op, ": offsets must not decrease, but go from ", first[e],
                      " to ", first[e + 1], " at expert ", e);
    rows.first.push_back(rows.total());
    rows.count.push_back(count);
    for (int64_t row = first[e]; row < first[e + 1]; ++row) rows.source.push_back(row);
    rows.source.resize(rows.first.back() + aligned(count), kNone);
  }
  return rows;
}

// (R, D) whose rows after the last expert's are zeros, and the rest not set.
at::Tensor make_output(const at::Tensor& like, const Rows& rows) {
  auto out = at::empty(like.sizes(), like.options().memory_format(at::MemoryFormat::Contiguous));
  const int64_t used = std::accumulate(rows.count.begin(), rows.count.end(), int64_t(0));
  out.narrow(0, used, like.size(0) - used).zero_();
  return out;
}

// Rows of experts `begin` to `end`, of which values holds the aligned ones, back to where they came from: those of
// every `step`-th expert from `first` on.
void to_source(const at::Tensor& values, const Rows& rows, int64_t begin, int64_t end, int64_t first, int64_t step,
               at::Tensor& out) {
  const int64_t bytes = out.size(1) * out.element_size();
  const auto* from = static_cast<const char*>(values.const_data_ptr());
  auto* to = static_cast<char*>(out.mutable_data_ptr());
  for (int64_t e = begin + first; e < end; e += step) {
    if (rows.count[e] == 0) continue;
    const int64_t row = rows.first[e];
    std::memcpy(to + rows.source[row] * bytes, from + (row - rows.first[begin]) * bytes, rows.count[e] * bytes);
  }
}

std::tuple<at::Tensor, at::Tensor> grouped_mlp(const at::Tensor& x, const at::Tensor& offsets, at::TensorList w1,
                                               at::TensorList w2, at::TensorList b1, at::TensorList b2,
                                               c10::string_view activation, bool recompute) {
  constexpr const char* op = "moemm::grouped_mlp";
  check_grouped_mlp(op, x, offsets, w1.size());
  const Experts experts(op, w1, w2, b1, b2, activation, x);
  const auto rows = rows_of(op, offsets, x.size(0));
  const auto x_dense = with_dense_rows(x);
  auto shape = hidden_shape(experts, x.size(0));
  if (recompute) shape[0] = 0;
  auto z = at::empty(shape, x.options().memory_format(at::MemoryFormat::Contiguous));
  at::Tensor y;
  dispatch_values(x, [&]<typename scalar_t>(std::type_identity<scalar_t>) {
    y = experts_forward<scalar_t>(experts, rows, x_dense, z);
  });
  auto out = make_output(x, rows);
  at::parallel_for(0, experts.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t e = begin; e < end; ++e) to_source(y, rows, 0, experts.size(), e, experts.size(), out);
  });
  return {out, z};
}

using Gradients = std::tuple<at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>, std::vector<at::Tensor>,
                             std::vector<at::Tensor>>;

Gradients grouped_mlp_backward(const at::Tensor& grad, const at::Tensor& z, const at::Tensor& x,
                               const at::Tensor& offsets, at::TensorList w1, at::TensorList w2, at::TensorList b1,
                               at::TensorList b2, c10::string_view activation) {
  constexpr const char* op = "moemm::grouped_mlp_backward";
  check_grouped_mlp(op, x, offsets, w1.size());
  check_gradient(op, grad, x);
  const Experts experts(op, w1, w2, b1, b2, activation, x);
  check_hidden(op, z, hidden_shape(experts, x.size(0)), x);
  const auto rows = rows_of(op, offsets, x.size(0));
  const auto x_dense = with_dense_rows(x), grad_dense = with_dense_rows(grad);
  auto dx = make_output(x, rows);
  const RowSink sink = [&](int64_t begin, int64_t end, const at::Tensor& gradients, int64_t part, int64_t parts) {
    to_source(gradients, rows, begin, end, part, parts, dx);
  };
  ExpertGradients out;
  dispatch_values(x, [&]<typename scalar_t>(std::type_identity<scalar_t>) {
    std::vector<Accumulator<scalar_t>> gate(rows.total()), dgate(rows.total());
    for (int64_t row = 0; row < rows.total(); ++row) gate[row] = rows.source[row] == kNone ? 0 : 1;
    out = experts_backward<scalar_t>(experts, rows, x_dense, z, grad_dense, gate, dgate, sink);
  });
  return {dx, out.w1, out.w2, out.b1, out.b2};
}

}  // namespace

TORCH_LIBRARY_IMPL(moemm, CPU, m) {
  m.impl("grouped_mlp", &grouped_mlp);
  m.impl("grouped_mlp_backward", &grouped_mlp_backward);
}

}  // namespace moemm::cpu
