// The torch part of the CUDA ops: checks, outputs, device and stream; the kernels take raw pointers.
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "combine.cuh"
#include "moemm/checks.h"
#include "moemm/dispatch.h"
#include "moemm/route.h"
#include "permute.cuh"
#include "plan.cuh"
#include "route_topk.cuh"

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

// gates undefined: all one; residual undefined: zeros.
at::Tensor gather_sum(const at::Tensor& y, const at::Tensor& inverse, const at::Tensor& gates,
                      const at::Tensor& residual) {
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
      .residual = residual.defined() ? residual.const_data_ptr() : nullptr,
      .out = out.mutable_data_ptr(),
      .y_stride = y_dense.stride(0),
      .residual_stride = residual.defined() ? residual.stride(0) : 0,
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
  return gather_sum(grad, inverse, at::Tensor(), at::Tensor());
}

at::Tensor combine(const at::Tensor& y, const at::Tensor& inverse, const at::Tensor& gates,
                   const std::optional<at::Tensor>& residual) {
  check_combine("moemm::combine", y, inverse, gates);
  check_residual("moemm::combine", residual, inverse.size(0), y);
  const c10::cuda::CUDAGuard guard(y.device());
  return gather_sum(y, inverse, gates.to(accumulator_of(y.scalar_type())).contiguous(), with_dense_rows(residual));
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

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> plan(const at::Tensor& experts, int64_t num_experts,
                                                                    int64_t alignment) {
  constexpr const char* op = "moemm::plan";
  check_experts(op, experts, num_experts);
  TORCH_CHECK(num_experts <= kMaxPlanExperts, op, ": on CUDA num_experts is at most ", kMaxPlanExperts, ", but is ",
              num_experts);
  const c10::cuda::CUDAGuard guard(experts.device());
  const auto dense = experts.contiguous();
  const auto wide = experts.options().dtype(at::kLong);
  const int64_t num_slots = experts.numel(), num_rows = check_plan_rows(op, experts, num_experts, alignment);
  auto counts = at::empty({num_experts}, wide), offsets = at::empty({num_experts + 1}, wide);
  auto order = at::empty({num_rows}, experts.options()), inverse = at::empty(experts.sizes(), experts.options());
  auto histograms = at::empty({(num_slots + kPlanSlots - 1) / kPlanSlots, num_experts}, wide);
  const PlanArguments arguments{
      .index = index_of(experts),
      .experts = dense.const_data_ptr(),
      .histograms = histograms.mutable_data_ptr<int64_t>(),
      .counts = counts.mutable_data_ptr<int64_t>(),
      .offsets = offsets.mutable_data_ptr<int64_t>(),
      .order = order.mutable_data_ptr(),
      .inverse = inverse.mutable_data_ptr(),
      .num_slots = num_slots,
      .num_experts = num_experts,
      .num_rows = num_rows,
      .alignment = alignment,
  };
  C10_CUDA_CHECK(launch_plan(arguments, c10::cuda::getCurrentCUDAStream()));
  return {counts, offsets, order, inverse};
}

void check_route_size(const char* op, const at::Tensor& logits, const at::Tensor& allowed) {
  TORCH_CHECK(logits.size(1) <= kMaxRouteExperts, op, ": on CUDA there are at most ", kMaxRouteExperts,
              " experts, but logits has ", logits.size(1));
  TORCH_CHECK(allowed.size(0) <= kMaxRouteModalities, op, ": on CUDA there are at most ", kMaxRouteModalities,
              " modalities, but allowed has ", allowed.size(0));
}

RouteOutputs route_topk(const at::Tensor& logits, const at::Tensor& modality, const at::Tensor& allowed,
                        const std::optional<at::Tensor>& bias, int64_t top_k, c10::string_view kind, bool renormalise) {
  constexpr const char* op = "moemm::route_topk";
  check_route(op, logits, modality, allowed, bias, top_k, kind);
  check_route_size(op, logits, allowed);
  const c10::cuda::CUDAGuard guard(logits.device());
  const RouteInputs in(logits, modality, allowed, bias);
  RouteResults results(logits, allowed, top_k);
  auto rows = at::empty({in.num_tokens, 2}, results.sums.options());
  const int64_t num_chunks = (in.num_tokens + kRouteChunk - 1) / kRouteChunk;
  auto chunks = at::empty({num_chunks, results.sums.numel()}, results.sums.options());
  const RouteArguments arguments{
      .element = element_of(logits),
      .sigmoid = kind == "sigmoid",
      .renormalise = renormalise,
      .logits = in.logits.const_data_ptr(),
      .modality = in.modality.const_data_ptr<int64_t>(),
      .allowed = in.allowed.const_data_ptr<bool>(),
      .bias = in.bias.defined() ? in.bias.const_data_ptr() : nullptr,
      .gates = results.gates.mutable_data_ptr(),
      .experts = results.experts.mutable_data_ptr<int64_t>(),
      .rows = rows.mutable_data_ptr(),
      .chunks = chunks.mutable_data_ptr(),
      .sums = results.sums.mutable_data_ptr(),
      .logits_stride = in.logits.stride(0),
      .num_tokens = in.num_tokens,
      .num_experts = in.num_experts,
      .num_modalities = in.num_modalities,
      .top_k = top_k,
  };
  C10_CUDA_CHECK(launch_route_topk(arguments, c10::cuda::getCurrentCUDAStream()));
  return results.outputs(allowed);
}

at::Tensor route_topk_backward(const at::Tensor& dgates, const at::Tensor& dprob, const at::Tensor& dz,
                               const at::Tensor& logits, const at::Tensor& modality, const at::Tensor& allowed,
                               const at::Tensor& experts, c10::string_view kind, bool renormalise) {
  constexpr const char* op = "moemm::route_topk_backward";
  check_route_backward(op, dgates, dprob, dz, logits, modality, allowed, experts, kind);
  check_route_size(op, logits, allowed);
  const c10::cuda::CUDAGuard guard(logits.device());
  const RouteInputs in(logits, modality, allowed, std::nullopt);
  RouteGradients given(dgates, dprob, dz, experts, logits);
  const RouteBackwardArguments arguments{
      .element = element_of(logits),
      .sigmoid = kind == "sigmoid",
      .renormalise = renormalise,
      .dgates = given.dgates.const_data_ptr(),
      .dprob = given.dprob.const_data_ptr(),
      .dz = given.dz.const_data_ptr(),
      .logits = in.logits.const_data_ptr(),
      .modality = in.modality.const_data_ptr<int64_t>(),
      .allowed = in.allowed.const_data_ptr<bool>(),
      .experts = given.experts.const_data_ptr<int64_t>(),
      .out = given.dlogits.mutable_data_ptr(),
      .logits_stride = in.logits.stride(0),
      .num_tokens = in.num_tokens,
      .num_experts = in.num_experts,
      .num_modalities = in.num_modalities,
      .top_k = experts.size(1),
  };
  C10_CUDA_CHECK(launch_route_topk_backward(arguments, c10::cuda::getCurrentCUDAStream()));
  return given.dlogits;
}

}  // namespace

TORCH_LIBRARY_IMPL(moemm, CUDA, m) {
  m.impl("route_topk", &route_topk);
  m.impl("route_topk_backward", &route_topk_backward);
  m.impl("plan", &plan);
  m.impl("permute", &permute);
  m.impl("permute_backward", &permute_backward);
  m.impl("combine", &combine);
  m.impl("combine_backward", &combine_backward);
}

}  // namespace moemm::cuda
