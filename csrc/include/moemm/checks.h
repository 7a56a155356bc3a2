// Checks at the entry of every op. moemm/ops checks first and says more; these keep direct calls memory-safe.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <string_view>
#include <tuple>

#include "moemm/types.h"

#define MOEMM_CHECK_RANK(tensor, rank, shape)                                                                    \
  TORCH_CHECK((tensor).dim() == (rank), op, ": " #tensor " must have shape " shape ", but has ", (tensor).dim(), \
              " dimensions: ", (tensor).sizes())

#define MOEMM_CHECK_SIZE(tensor, axis, expected, of)                                                                   \
  TORCH_CHECK((tensor).size(axis) == (expected), op, ": " #tensor " must have ", (expected), " entries in dimension ", \
              (axis), " (" of "), but has ", (tensor).size(axis))

namespace moemm {

inline void check_floating(const char* op, const char* name, const at::Tensor& tensor) {
  const auto type = tensor.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kDouble || type == at::kBFloat16, op, ": ", name,
              " must be float32, float64 or bfloat16, but is ", type);
}

inline void check_same_type(const char* op, const char* name, const at::Tensor& tensor, const at::Tensor& like) {
  TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), op, ": ", name, " must be ", like.scalar_type(),
              " like the other arguments, but is ", tensor.scalar_type());
}

inline void check_index(const char* op, const char* name, const at::Tensor& tensor) {
  const auto type = tensor.scalar_type();
  TORCH_CHECK(type == at::kInt || type == at::kLong, op, ": ", name, " must be int32 or int64, but is ", type);
}

inline void check_device(const char* op, const char* name, const at::Tensor& tensor, const at::Tensor& like) {
  TORCH_CHECK(tensor.device() == like.device(), op, ": ", name, " must be on ", like.device(),
              " like the other arguments, but is on ", tensor.device());
}

// Outside the kernels' loops: building the message must not weigh on them.
[[noreturn]] inline void throw_bad_index(const char* op, const char* name, int64_t at, int64_t value, int64_t size) {
  TORCH_CHECK_INDEX(false, op, ": ", name, " holds ", value, " at flat position ", at, "; allowed is 0 to ", size - 1,
                    ", or -1 for none");
}

// Rows of `tensor` must be contiguous; the distance between rows may be any.
inline at::Tensor with_dense_rows(const at::Tensor& tensor) {
  const bool dense = tensor.size(1) <= 1 || tensor.stride(1) == 1;
  return dense ? tensor : tensor.contiguous();
}

inline at::Tensor with_dense_rows(const std::optional<at::Tensor>& tensor) {
  return tensor ? with_dense_rows(*tensor) : at::Tensor();
}

// What permute and its backward pass demand of a plan.
inline void check_plan(const char* op, const at::Tensor& order, const at::Tensor& inverse, const at::Tensor& like) {
  MOEMM_CHECK_RANK(order, 1, "(R,)");
  MOEMM_CHECK_RANK(inverse, 2, "(T, K)");
  TORCH_CHECK(inverse.size(1) >= 1, op, ": inverse must have shape (T, K) with K >= 1, but K is 0");
  check_index(op, "order", order);
  check_same_type(op, "inverse", inverse, order);
  check_device(op, "order", order, like);
  check_device(op, "inverse", inverse, like);
}

inline void check_permute(const char* op, const at::Tensor& x, const at::Tensor& order, const at::Tensor& inverse) {
  MOEMM_CHECK_RANK(x, 2, "(T, D)");
  check_floating(op, "x", x);
  check_plan(op, order, inverse, x);
  MOEMM_CHECK_SIZE(inverse, 0, x.size(0), "T of x");
}

inline void check_permute_backward(const char* op, const at::Tensor& grad, const at::Tensor& order,
                                   const at::Tensor& inverse) {
  MOEMM_CHECK_RANK(grad, 2, "(R, D)");
  check_floating(op, "grad", grad);
  check_plan(op, order, inverse, grad);
  MOEMM_CHECK_SIZE(order, 0, grad.size(0), "R of grad");
}

inline void check_combine(const char* op, const at::Tensor& y, const at::Tensor& inverse, const at::Tensor& gates) {
  MOEMM_CHECK_RANK(y, 2, "(R, D)");
  MOEMM_CHECK_RANK(inverse, 2, "(T, K)");
  MOEMM_CHECK_RANK(gates, 2, "(T, K)");
  MOEMM_CHECK_SIZE(gates, 0, inverse.size(0), "T of inverse");
  MOEMM_CHECK_SIZE(gates, 1, inverse.size(1), "K of inverse");
  check_floating(op, "y", y);
  check_index(op, "inverse", inverse);
  TORCH_CHECK(gates.scalar_type() == y.scalar_type() || gates.scalar_type() == at::kFloat, op, ": gates must be ",
              y.scalar_type(), " like y, or float32, but is ", gates.scalar_type());
  TORCH_CHECK(y.scalar_type() != at::kDouble || gates.scalar_type() == at::kDouble, op,
              ": gates must be float64 like y, but is ", gates.scalar_type());
  check_device(op, "inverse", inverse, y);
  check_device(op, "gates", gates, y);
}

// What is added to an output of (T, D): inverse or x has the T rows, `like` the type, device and D columns.
inline void check_residual(const char* op, const std::optional<at::Tensor>& given, int64_t num_tokens,
                           const at::Tensor& like) {
  if (!given) return;
  const at::Tensor& residual = *given;
  MOEMM_CHECK_RANK(residual, 2, "(T, D)");
  MOEMM_CHECK_SIZE(residual, 0, num_tokens, "T");
  MOEMM_CHECK_SIZE(residual, 1, like.size(1), "D");
  check_same_type(op, "residual", residual, like);
  check_device(op, "residual", residual, like);
}

inline void check_combine_backward(const char* op, const at::Tensor& grad, const at::Tensor& y,
                                   const at::Tensor& inverse, const at::Tensor& gates) {
  check_combine(op, y, inverse, gates);
  MOEMM_CHECK_RANK(grad, 2, "(T, D)");
  MOEMM_CHECK_SIZE(grad, 0, inverse.size(0), "T of inverse");
  MOEMM_CHECK_SIZE(grad, 1, y.size(1), "D of y");
  check_same_type(op, "grad", grad, y);
  check_device(op, "grad", grad, y);
}

inline void check_experts(const char* op, const at::Tensor& experts, int64_t num_experts) {
  MOEMM_CHECK_RANK(experts, 2, "(T, K)");
  check_index(op, "experts", experts);
  TORCH_CHECK(num_experts >= 1, op, ": num_experts must be at least 1, but is ", num_experts);
}

// Rows of a plan, known before the counts are: each expert that has a slot may need alignment - 1 rows of padding.
inline int64_t check_plan_rows(const char* op, const at::Tensor& experts, int64_t num_experts, int64_t alignment) {
  TORCH_CHECK(alignment >= 1, op, ": alignment must be at least 1, but is ", alignment);
  const int64_t num_slots = experts.numel(), padded = std::min(num_experts, num_slots);
  const int64_t largest =
      experts.scalar_type() == at::kInt ? std::numeric_limits<int32_t>::max() : std::numeric_limits<int64_t>::max();
  TORCH_CHECK(num_slots <= largest && (padded == 0 || alignment - 1 <= (largest - num_slots) / padded), op,
              ": the rows of ", num_slots, " slots with alignment ", alignment, " cannot be counted in ",
              experts.scalar_type());
  return num_slots + (alignment - 1) * padded;
}

// gates, experts, load, prob, z, tokens
using RouteOutputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

inline void check_kind(const char* op, std::string_view kind) {
  TORCH_CHECK(kind == "softmax" || kind == "sigmoid", op, ": kind must be softmax or sigmoid, but is ", kind);
}

inline void check_route(const char* op, const at::Tensor& logits, const at::Tensor& modality, const at::Tensor& allowed,
                        const std::optional<at::Tensor>& bias, int64_t top_k, std::string_view kind) {
  MOEMM_CHECK_RANK(logits, 2, "(T, E)");
  MOEMM_CHECK_RANK(modality, 1, "(T,)");
  MOEMM_CHECK_RANK(allowed, 2, "(M, E)");
  check_floating(op, "logits", logits);
  TORCH_CHECK(modality.scalar_type() == at::kLong, op, ": modality must be int64, but is ", modality.scalar_type());
  TORCH_CHECK(allowed.scalar_type() == at::kBool, op, ": allowed must be bool, but is ", allowed.scalar_type());
  MOEMM_CHECK_SIZE(modality, 0, logits.size(0), "T of logits");
  MOEMM_CHECK_SIZE(allowed, 1, logits.size(1), "E of logits");
  check_device(op, "modality", modality, logits);
  check_device(op, "allowed", allowed, logits);
  TORCH_CHECK(top_k >= 1 && top_k <= logits.size(1), op, ": top_k must be 1 to ", logits.size(1), " (E), but is ",
              top_k);
  check_kind(op, kind);
  if (bias) {
    MOEMM_CHECK_RANK(*bias, 1, "(E,)");
    MOEMM_CHECK_SIZE(*bias, 0, logits.size(1), "E of logits");
    check_floating(op, "bias", *bias);
    check_device(op, "bias", *bias, logits);
  }
}

inline void check_route_backward(const char* op, const at::Tensor& dgates, const at::Tensor& dprob,
                                 const at::Tensor& dz, const at::Tensor& logits, const at::Tensor& modality,
                                 const at::Tensor& allowed, const at::Tensor& experts, std::string_view kind) {
  MOEMM_CHECK_RANK(experts, 2, "(T, K)");
  check_route(op, logits, modality, allowed, std::nullopt, experts.size(1), kind);
  TORCH_CHECK(experts.scalar_type() == at::kLong, op, ": experts must be int64, but is ", experts.scalar_type());
  MOEMM_CHECK_SIZE(experts, 0, logits.size(0), "T of logits");
  const auto wide = logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  TORCH_CHECK(dgates.scalar_type() == wide && dprob.scalar_type() == wide && dz.scalar_type() == wide, op,
              ": gradients must be ", wide);
  TORCH_CHECK(dgates.sizes() == experts.sizes() && dprob.sizes() == allowed.sizes() && dz.dim() == 1 &&
                  dz.size(0) == allowed.size(0),
              op, ": gradients must have the shapes of the outputs");
}

inline void check_grouped_mlp(const char* op, const at::Tensor& x, const at::Tensor& offsets, size_t num_experts) {
  MOEMM_CHECK_RANK(x, 2, "(R, D)");
  MOEMM_CHECK_RANK(offsets, 1, "(E + 1,)");
  check_floating(op, "x", x);
  TORCH_CHECK(offsets.scalar_type() == at::kLong, op, ": offsets must be int64, but is ", offsets.scalar_type());
  MOEMM_CHECK_SIZE(offsets, 0, static_cast<int64_t>(num_experts) + 1, "one more than experts");
  check_device(op, "offsets", offsets, x);
}

inline void check_moe_ffn(const char* op, const at::Tensor& x, const at::Tensor& gates, const at::Tensor& experts,
                          size_t num_experts) {
  MOEMM_CHECK_RANK(x, 2, "(T, D)");
  check_floating(op, "x", x);
  check_experts(op, experts, static_cast<int64_t>(num_experts));
  MOEMM_CHECK_SIZE(experts, 0, x.size(0), "T of x");
  TORCH_CHECK(gates.sizes() == experts.sizes(), op, ": gates must have shape ", experts.sizes(),
              " like experts, but has ", gates.sizes());
  check_floating(op, "gates", gates);
  check_device(op, "gates", gates, x);
  check_device(op, "experts", experts, x);
}

inline void check_gradient(const char* op, const at::Tensor& grad, const at::Tensor& like) {
  TORCH_CHECK(grad.sizes() == like.sizes(), op, ": grad must have shape ", like.sizes(), ", but has ", grad.sizes());
  check_same_type(op, "grad", grad, like);
  check_device(op, "grad", grad, like);
}

// z, kept from the forward pass, is empty or has the shape that the forward pass gave it.
inline void check_hidden(const char* op, const at::Tensor& z, at::IntArrayRef shape, const at::Tensor& like) {
  check_same_type(op, "z", z, like);
  check_device(op, "z", z, like);
  TORCH_CHECK(z.dim() == 2 && z.is_contiguous() && (z.size(0) == 0 || z.sizes() == shape), op,
              ": z must be what the forward pass returned");
}

}  // namespace moemm
