// moe_ffn: plan, gather, the experts' networks and the gated sum as one call.
// T tokens, D width, K slots a token, E experts, R rows of the plan, each expert's aligned.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>

#include "experts.h"
#include "moemm/checks.h"
#include "plan.h"
#include "rows.h"

namespace moemm::cpu {
namespace {

struct Dispatch {
  Plan plan;
  Rows rows;
};

template <typename index_t>
Dispatch make_dispatch(const char* op, const at::Tensor& experts, int64_t num_experts) {
  Dispatch made{make_plan<index_t>(op, experts, num_experts, kAlignment, -1), {}};
  const auto* counts = made.plan.counts.template const_data_ptr<int64_t>();
  const auto* offsets = made.plan.offsets.template const_data_ptr<int64_t>();
  const auto* order = made.plan.order.template const_data_ptr<index_t>();
  made.rows.count.assign(counts, counts + num_experts);
  made.rows.first.assign(offsets, offsets + num_experts);
  made.rows.source.resize(made.plan.order.numel());
  const int64_t num_slots = experts.size(1);
  for (int64_t row = 0; row < made.rows.total(); ++row) {
    made.rows.source[row] = order[row] == kNone ? kNone : order[row] / num_slots;
  }
  return made;
}

std::tuple<at::Tensor, at::Tensor> moe_ffn(const at::Tensor& x, const at::Tensor& gates, const at::Tensor& experts,
                                           at::TensorList w1, at::TensorList w2, at::TensorList b1, at::TensorList b2,
                                           const std::optional<at::Tensor>& residual, c10::string_view activation,
                                           bool recompute) {
  constexpr const char* op = "moemm::moe_ffn";
  check_moe_ffn(op, x, gates, experts, w1.size());
  check_plan_rows(op, experts, static_cast<int64_t>(w1.size()), kAlignment);
  check_residual(op, residual, x.size(0), x);
  const Experts networks(op, w1, w2, b1, b2, activation, x);
  const auto x_dense = with_dense_rows(x), residual_dense = with_dense_rows(residual);
  const auto gates_dense = gates.to(accumulator_of(x.scalar_type())).contiguous();
  auto shape = hidden_shape(networks, experts.numel());
  if (recompute) shape[0] = 0;
  auto z = at::empty(shape, x.options().memory_format(at::MemoryFormat::Contiguous));
  auto out = at::empty(x.sizes(), x.options().memory_format(at::MemoryFormat::Contiguous));
  dispatch(x, experts,
           [&]<typename scalar_t, typename index_t>(std::type_identity<scalar_t>, std::type_identity<index_t>) {
             const auto made = make_dispatch<index_t>(op, experts, networks.size());
             const auto y = experts_forward<scalar_t>(networks, made.rows, x_dense, z);
             gather_sum<scalar_t, index_t>(op, y, made.plan.inverse,
                                           gates_dense.template const_data_ptr<Accumulator<scalar_t>>(),
                                           residual_dense, out);
           });
  return {out, z};
}

using Gradients = std::tuple<at::Tensor, at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>,
                             std::vector<at::Tensor>, std::vector<at::Tensor>>;

// sums[i] += row[i]
template <typename acc_t, typename scalar_t>
MOEMM_SIMD void add_row(acc_t* sums, const scalar_t* row, int64_t width) {
  for (int64_t i = 0; i < width; ++i) sums[i] += static_cast<acc_t>(widen(row[i]));
}

// Adds the gradients of the rows of experts `begin` to `end` to those of the tokens `first` to `last`, of (T, D). Within
// an expert rows stand in the order of tokens, so that those are found by halving, and a token's sum is always in the
// order of experts.
template <typename scalar_t>
void add_to_tokens(const Rows& rows, int64_t begin, int64_t end, const at::Tensor& gradients, int64_t first,
                   int64_t last, at::Tensor& sums) {
  using acc_t = Accumulator<scalar_t>;
  const int64_t width = sums.size(1), stride = gradients.stride(0);
  const auto* from = gradients.const_data_ptr<scalar_t>();
  auto* to = sums.mutable_data_ptr<acc_t>();
  for (int64_t e = begin; e < end; ++e) {
    const auto start = rows.source.begin() + rows.first[e], stop = start + rows.count[e];
    for (auto it = std::lower_bound(start, stop, first); it != stop && *it < last; ++it) {
      add_row(to + *it * width, from + (it - rows.source.begin() - rows.first[begin]) * stride, width);
    }
  }
}

// Between slots, where gates live, and rows.
template <typename scalar_t, typename index_t>
ExpertGradients backward(const Experts& networks, const Dispatch& made, const at::Tensor& x, const at::Tensor& z,
                         const at::Tensor& grad, const at::Tensor& gates, at::Tensor& dgates, at::Tensor& dx) {
  using acc_t = Accumulator<scalar_t>;
  std::vector<acc_t> gate(made.rows.total(), 0), dgate(made.rows.total());
  const auto* order = made.plan.order.const_data_ptr<index_t>();
  const auto* given = gates.const_data_ptr<acc_t>();
  for (int64_t row = 0; row < made.rows.total(); ++row) {
    if (order[row] != kNone) gate[row] = given[order[row]];
  }
  const int64_t tokens = dx.size(0);
  const RowSink sink = [&](int64_t begin, int64_t end, const at::Tensor& gradients, int64_t part, int64_t parts) {
    add_to_tokens<scalar_t>(made.rows, begin, end, gradients, tokens * part / parts, tokens * (part + 1) / parts, dx);
  };
  auto out = experts_backward<scalar_t>(networks, made.rows, x, z, grad, gate, dgate, sink);
  auto* to = dgates.mutable_data_ptr<acc_t>();
  for (int64_t row = 0; row < made.rows.total(); ++row) {
    if (order[row] != kNone) to[order[row]] = dgate[row];
  }
  return out;
}

Gradients moe_ffn_backward(const at::Tensor& grad, const at::Tensor& z, const at::Tensor& x, const at::Tensor& gates,
                           const at::Tensor& experts, at::TensorList w1, at::TensorList w2, at::TensorList b1,
                           at::TensorList b2, c10::string_view activation) {
  constexpr const char* op = "moemm::moe_ffn_backward";
  check_moe_ffn(op, x, gates, experts, w1.size());
  check_plan_rows(op, experts, static_cast<int64_t>(w1.size()), kAlignment);
  check_gradient(op, grad, x);
  const Experts networks(op, w1, w2, b1, b2, activation, x);
  check_hidden(op, z, hidden_shape(networks, experts.numel()), x);
  const auto x_dense = with_dense_rows(x), grad_dense = with_dense_rows(grad);
  const auto gates_dense = gates.to(accumulator_of(x.scalar_type())).contiguous();
  auto dx = at::zeros(x.sizes(), gates_dense.options());
  auto dgates = at::zeros(gates.sizes(), gates_dense.options());
  ExpertGradients out;
  dispatch(x, experts,
           [&]<typename scalar_t, typename index_t>(std::type_identity<scalar_t>, std::type_identity<index_t>) {
             const auto made = make_dispatch<index_t>(op, experts, networks.size());
             out = backward<scalar_t, index_t>(networks, made, x_dense, z, grad_dense, gates_dense, dgates, dx);
           });
  return {dx.to(x.scalar_type()), dgates.to(gates.scalar_type()), out.w1, out.w2, out.b1, out.b2};
}

}  // namespace

TORCH_LIBRARY_IMPL(moemm, CPU, m) {
  m.impl("moe_ffn", &moe_ffn);
  m.impl("moe_ffn_backward", &moe_ffn_backward);
}

}  // namespace moemm::cpu
