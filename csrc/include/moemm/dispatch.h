// From run-time element types to template arguments: body receives std::type_identity tags.
#pragma once

#include <ATen/core/Tensor.h>

#include <type_traits>

namespace moemm {

// What sums are kept in: at least 32 bits.
template <typename scalar_t>
using Accumulator = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

inline at::ScalarType accumulator_of(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

template <typename Body>
void dispatch_index(const at::Tensor& tensor, Body&& body) {
  if (tensor.scalar_type() == at::kInt) return body(std::type_identity<int32_t>{});
  return body(std::type_identity<int64_t>{});
}

// The element type of `values`; check_floating comes first.
template <typename Body>
void dispatch_values(const at::Tensor& values, Body&& body) {
  if (values.scalar_type() == at::kFloat) return body(std::type_identity<float>{});
  if (values.scalar_type() == at::kDouble) return body(std::type_identity<double>{});
  return body(std::type_identity<c10::BFloat16>{});
}

// Both the element type of `values` and the index type of `indices`; check_floating and check_index come first.
template <typename Body>
void dispatch(const at::Tensor& values, const at::Tensor& indices, Body&& body) {
  dispatch_index(indices, [&](auto index) { dispatch_values(values, [&](auto value) { body(value, index); }); });
}

}  // namespace moemm
