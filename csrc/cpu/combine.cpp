// combine: a token's output as the gated sum of its rows; the backward pass makes both gradients in one pass.
// T tokens, D width, K slots a token, R rows.
#include <torch/library.h>

#include <tuple>

#include "rows.h"

namespace moemm::cpu {
namespace {

// dy[i] = gate * grad[i]; returns the dot product of grad and y. Fixed lanes: the compiler may vectorise the sum, and
// its order never changes.
template <typename acc_t, typename scalar_t>
MOEMM_SIMD acc_t scale_and_dot(scalar_t* dy, const scalar_t* grad, const scalar_t* y, acc_t gate, int64_t width) {
  constexpr int64_t kLanes = 16;
  acc_t sums[kLanes] = {};
  int64_t start = 0;
  for (; start + kLanes <= width; start += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) {
      const acc_t value = widen(grad[start + i]);
      sums[i] += value * static_cast<acc_t>(widen(y[start + i]));
      store(dy[start + i], gate * value);
    }
  }
  for (; start < width; ++start) {
    const acc_t value = widen(grad[start]);
    sums[start % kLanes] += value * static_cast<acc_t>(widen(y[start]));
    store(dy[start], gate * value);
  }
  acc_t total = 0;
  for (const acc_t sum : sums) total += sum;
  return total;
}

// Which rows some slot names. A row named twice would be written by two threads, and one gradient would be lost.
template <typename index_t>
std::vector<uint8_t> mark_rows(const char* op, const at::Tensor& inverse, int64_t num_rows) {
  std::vector<uint8_t> marked(num_rows, 0);
  const auto* index = inverse.const_data_ptr<index_t>();
  for (int64_t slot = 0; slot < inverse.numel(); ++slot) {
    const int64_t row = index[slot];
    if (!in_range(row, num_rows)) throw_bad_index(op, "inverse", slot, row, num_rows);
    if (row == kNone) continue;
    TORCH_CHECK_INDEX(!marked[row], op, ": inverse names row ", row, " twice (again at flat position ", slot,
                      "); each row may belong to one slot only");
    marked[row] = 1;
  }
  return marked;
}

struct Gradients {
  at::Tensor y;
  at::Tensor gates;
};

template <typename scalar_t, typename index_t>
void backward(const char* op, const at::Tensor& grad, const at::Tensor& y, const at::Tensor& inverse,
              const at::Tensor& gates, Gradients& out) {
  using acc_t = Accumulator<scalar_t>;
  const int64_t num_slots = inverse.size(1), width = y.size(1), y_stride = y.stride(0), grad_stride = grad.stride(0);
  const auto marked = mark_rows<index_t>(op, inverse, y.size(0));
  const auto* index = inverse.const_data_ptr<index_t>();
  const auto* gate = gates.const_data_ptr<acc_t>();
  const auto* rows = y.const_data_ptr<scalar_t>();
  const auto* grads = grad.const_data_ptr<scalar_t>();
  auto* dy = out.y.mutable_data_ptr<scalar_t>();
  auto* dgates = out.gates.mutable_data_ptr<acc_t>();
  at::parallel_for(0, inverse.size(0), grain_of(width * num_slots), [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin * num_slots; slot < end * num_slots; ++slot) {
      const int64_t row = index[slot];
      dgates[slot] = row == kNone ? acc_t(0)
                                  : scale_and_dot<acc_t>(dy + row * width, grads + (slot / num_slots) * grad_stride,
                                                         rows + row * y_stride, gate[slot], width);
    }
  });
  at::parallel_for(0, y.size(0), grain_of(width), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (!marked[row]) std::fill_n(dy + row * width, width, scalar_t(0));
    }
  });
}

at::Tensor combine(const at::Tensor& y, const at::Tensor& inverse, const at::Tensor& gates,
                   const std::optional<at::Tensor>& residual) {
  constexpr const char* op = "moemm::combine";
  check_combine(op, y, inverse, gates);
  check_residual(op, residual, inverse.size(0), y);
  const auto y_dense = with_dense_rows(y), residual_dense = with_dense_rows(residual);
  const auto inverse_dense = inverse.contiguous();
  const auto gates_dense = gates.to(accumulator_of(y.scalar_type())).contiguous();
  auto out = at::empty({inverse.size(0), y.size(1)}, y.options());
  dispatch(y, inverse,
           [&]<typename scalar_t, typename index_t>(std::type_identity<scalar_t>, std::type_identity<index_t>) {
             const auto* gate = gates_dense.const_data_ptr<Accumulator<scalar_t>>();
             gather_sum<scalar_t, index_t>(op, y_dense, inverse_dense, gate, residual_dense, out);
           });
  return out;
}

std::tuple<at::Tensor, at::Tensor> combine_backward(const at::Tensor& grad, const at::Tensor& y,
                                                    const at::Tensor& inverse, const at::Tensor& gates) {
  constexpr const char* op = "moemm::combine_backward";
  check_combine_backward(op, grad, y, inverse, gates);
  const auto grad_dense = with_dense_rows(grad), y_dense = with_dense_rows(y);
  const auto inverse_dense = inverse.contiguous();
  const auto gates_dense = gates.to(accumulator_of(y.scalar_type())).contiguous();
  Gradients out{at::empty(y.sizes(), y.options()), at::empty(gates.sizes(), gates_dense.options())};
  dispatch(y, inverse,
           [&]<typename scalar_t, typename index_t>(std::type_identity<scalar_t>, std::type_identity<index_t>) {
             backward<scalar_t, index_t>(op, grad_dense, y_dense, inverse_dense, gates_dense, out);
           });
  return {out.y, out.gates.to(gates.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(moemm, CPU, m) {
  m.impl("combine", &combine);
  m.impl("combine_backward", &combine_backward);
}

}  // namespace moemm::cpu
