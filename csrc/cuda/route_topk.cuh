// Launches of route_topk and its backward pass on raw pointers.
#pragma once

#include <cuda_runtime.h>

#include "moemm/types.h"

namespace moemm::cuda {

constexpr int64_t kMaxRouteExperts = 2048;  // 64 experts a lane
constexpr int64_t kMaxRouteModalities = 65535;
constexpr int64_t kRouteChunk = 512;        // tokens whose sums one block takes

// Sums, gates, bias and gradients are float, double where the logits are double.
struct RouteArguments {
  Element element;
  bool sigmoid, renormalise;
  const void* logits;       // (T, E), rows logits_stride elements apart
  const int64_t* modality;  // (T,)
  const bool* allowed;      // (M, E)
  const void* bias;         // (E,), nullptr: none
  void* gates;              // (T, K)
  int64_t* experts;         // (T, K)
  void* rows;               // (T, 2) scratch: log-sum-exp, sum of the scores
  void* chunks;             // (ceil(T / kRouteChunk), 2 M E + 2 M) scratch
  void* sums;               // (2 M E + 2 M,): load, prob, z, tokens
  int64_t logits_stride, num_tokens, num_experts, num_modalities, top_k;
};

struct RouteBackwardArguments {
  Element element;
  bool sigmoid, renormalise;
  const void* dgates;       // (T, K)
  const void* dprob;        // (M, E)
  const void* dz;           // (M,)
  const void* logits;       // (T, E), rows logits_stride elements apart
  const int64_t* modality;  // (T,)
  const bool* allowed;      // (M, E)
  const int64_t* experts;   // (T, K)
  void* out;                // (T, E)
  int64_t logits_stride, num_tokens, num_experts, num_modalities, top_k;
};

cudaError_t launch_route_topk(const RouteArguments& arguments, cudaStream_t stream);
cudaError_t launch_route_topk_backward(const RouteBackwardArguments& arguments, cudaStream_t stream);

}  // namespace moemm::cuda
