// permute: rows of x in the order of a plan; its backward pass sums a token's rows through the inverse.
// T tokens, D width, K slots a token, R rows.
#include <torch/library.h>

#include <cstring>

#include "rows.h"

namespace moemm::cpu {
namespace {

// In debug builds order and inverse must name each other; otherwise the plan is trusted to be a permutation.
template <typename index_t>
void check_inverse(const char* op, const at::Tensor& order, const at::Tensor& inverse) {
#ifdef MOEMM_DEBUG
  const auto* forward = order.const_data_ptr<index_t>();
  const auto* backward = inverse.const_data_ptr<index_t>();
  const int64_t num_rows = order.size(0), num_slots = inverse.numel();
  for (int64_t row = 0; row < num_rows; ++row) {
    const int64_t slot = forward[row];
    if (!in_range(slot, num_slots)) throw_bad_index(op, "order", row, slot, num_slots);
  }
  for (int64_t slot = 0; slot < num_slots; ++slot) {
    const int64_t row = backward[slot];
    if (!in_range(row, num_rows)) throw_bad_index(op, "inverse", slot, row, num_rows);
    TORCH_CHECK(row == kNone || forward[row] == slot, op, ": inverse sends slot ", slot, " to row ", row,
                ", but order takes that row from slot ", forward[row]);
  }
#endif
}

template <typename scalar_t, typename index_t>
void gather(const at::Tensor& x, const at::Tensor& order, int64_t slots_per_token, at::Tensor& out) {
  const int64_t width = x.size(1), stride = x.stride(0), num_slots = x.size(0) * slots_per_token;
  const auto* source = x.const_data_ptr<scalar_t>();
  const auto* index = order.const_data_ptr<index_t>();
  auto* target = out.mutable_data_ptr<scalar_t>();
  at::parallel_for(0, order.size(0), grain_of(width), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t slot = index[row];
      if (!in_range(slot, num_slots)) throw_bad_index("moemm::permute", "order", row, slot, num_slots);
      scalar_t* to = target + row * width;
      if (slot == kNone) {
        std::fill_n(to, width, scalar_t(0));
      } else {
        std::memcpy(to, source + (slot / slots_per_token) * stride, width * sizeof(scalar_t));
      }
    }
  });
}

at::Tensor permute(const at::Tensor& x, const at::Tensor& order, const at::Tensor& inverse) {
  constexpr const char* op = "moemm::permute";
  check_permute(op, x, order, inverse);
  const auto x_dense = with_dense_rows(x);
  const auto order_dense = order.contiguous(), inverse_dense = inverse.contiguous();
  auto out = at::empty({order.size(0), x.size(1)}, x.options());
  dispatch(x, order,
           [&]<typename scalar_t, typename index_t>(std::type_identity<scalar_t>, std::type_identity<index_t>) {
             check_inverse<index_t>(op, order_dense, inverse_dense);
             gather<scalar_t, index_t>(x_dense, order_dense, inverse.size(1), out);
           });
  return out;
}

at::Tensor permute_backward(const at::Tensor& grad, const at::Tensor& order, const at::Tensor& inverse) {
  constexpr const char* op = "moemm::permute_backward";
  check_permute_backward(op, grad, order, inverse);
  const auto grad_dense = with_dense_rows(grad);
  const auto inverse_dense = inverse.contiguous();
  auto out = at::empty({inverse.size(0), grad.size(1)}, grad.options());
  dispatch(grad, inverse,
           [&]<typename scalar_t, typename index_t>(std::type_identity<scalar_t>, std::type_identity<index_t>) {
             gather_sum<scalar_t, index_t>(op, grad_dense, inverse_dense, nullptr, at::Tensor(), out);
           });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(moemm, CPU, m) {
  m.impl("permute", &permute);
  m.impl("permute_backward", &permute_backward);
}

}  // namespace moemm::cpu
