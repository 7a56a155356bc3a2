// The torch part of the CUDA ops: checks, outputs, device and stream; the kernels take raw pointers.
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <tuple>

#include "combine.cuh"
#include "moemm/checks.h"
#include "moemm/dispatch.h"
#include "permute.cuh"

namespace moemm::cuda {
namespace {

Element element_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble:
      return Element::kDouble;
    case at::kBFloat16:
      return Element::kBFloat16;
    default:
      return Element::kFloat;
  }
}

Index index_of(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kInt ? Index::kInt32 : Index::kInt64;
}

at::Tensor permute(const at::Tensor& x, const at::Tensor& order, const at::Tensor& inverse) {
  check_permute("moemm::permute", x, order, inverse);
  const c10::cuda::CUDAGuard guard(x.device());
  const auto x_dense = with_dense_rows(x);
  const auto order_dense = order.contiguous();
  auto out = at::empty({order.size(0), x.size(1)}, x.options());
  const int64_t bytes = x.element_size();
  const PermuteArguments arguments{
      .index = index_of(order),
      .x = x_dense.const_data_ptr(),
      .order = order_dense.const_data_ptr(),
      .out = out.mutable_data_ptr(),
      .element_bytes = bytes,
      .x_stride = x_dense.stride(0) * bytes,
      .row_bytes = x.size(1) * bytes,
      .num_rows = order.size(0),
      .num_slots = inverse.numel(),
      .slots_per_token = inverse.size(1),
  };
  C10_CUDA_CHECK(launch_permute(arguments, c10::cuda::getCurrentCUDAStream()));
  return out;
}

// gates undefined: all one.
at::Tensor gather_sum(const at::Tensor& y, const at::Tensor& inverse, const at::Tensor& gates) {
  const c10::cuda::CUDAGuard guard(y.device());
  const auto y_dense = with_dense_rows(y);
  const auto inverse_dense = inverse.contiguous();
  auto out = at::empty({inverse.size(0), y.size(1)}, y.options());
  const CombineArguments arguments{
      .element = element_of(y),
      .index = index_of(inverse),
      .y = y_dense.const_data_ptr(),
      .inverse = inverse_dense.const_data_ptr(),
      .gates = gates.defined() ? gates.const_data_ptr() : nullptr,
      .out = out.mutable_data_ptr(),
      .y_stride = y_dense.stride(0),
      .width = y.size(1),
      .num_tokens = inverse.size(0),
      .slots_per_token = inverse.size(1),
      .num_rows = y.size(0),
  };
  C10_CUDA_CHECK(launch_combine(arguments, c10::cuda::getCurrentCUDAStream()));
  return out;
}

at::Tensor permute_backward(const at::Tensor& grad, const at::Tensor& order, const at::Tensor& inverse) {
  check_permute_backward("moemm::permute_backward", grad, order, inverse);
  return gather_sum(grad, inverse, at::Tensor());
}

at::Tensor combine(const at::Tensor& y, const at::Tensor& inverse, const at::Tensor& gates) {
  check_combine("moemm::combine", y, inverse, gates);
  return gather_sum(y, inverse, gates.to(accumulator_of(y.scalar_type())).contiguous());
}

std::tuple<at::Tensor, at::Tensor> combine_backward(const at::Tensor& grad, const at::Tensor& y,
                                                    const at::Tensor& inverse, const at::Tensor& gates) {
  check_combine_backward("moemm::combine_backward", grad, y, inverse, gates);
  const c10::cuda::CUDAGuard guard(y.device());
  const auto grad_dense = with_dense_rows(grad), y_dense = with_dense_rows(y);
  const auto inverse_dense = inverse.contiguous();
  const auto gates_dense = gates.to(accumulator_of(y.scalar_type())).contiguous();
  auto dy = at::empty(y.sizes(), y.options());
  auto dgates = at::empty(gates.sizes(), gates_dense.options());
  auto marked = at::empty({y.size(0)}, y.options().dtype(at::kByte));
  const CombineBackwardArguments arguments{
      .element = element_of(y),
      .index = index_of(inverse),
      .grad = grad_dense.const_data_ptr(),
      .y = y_dense.const_data_ptr(),
      .inverse = inverse_dense.const_data_ptr(),
      .gates = gates_dense.const_data_ptr(),
      .dy = dy.mutable_data_ptr(),
      .dgates = dgates.mutable_data_ptr(),
      .marked = marked.mutable_data_ptr<uint8_t>(),
      .grad_stride = grad_dense.stride(0),
      .y_stride = y_dense.stride(0),
      .width = y.size(1),
      .num_tokens = inverse.size(0),
      .slots_per_token = inverse.size(1),
      .num_rows = y.size(0),
  };
  C10_CUDA_CHECK(launch_combine_backward(arguments, c10::cuda::getCurrentCUDAStream()));
  return {dy, dgates.to(gates.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(moemm, CUDA, m) {
  m.impl("permute", &permute);
  m.impl("permute_backward", &permute_backward);
  m.impl("combine", &combine);
  m.impl("combine_backward", &combine_backward);
}

}  // namespace moemm::cuda
