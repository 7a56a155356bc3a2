// route_topk: one warp a token chooses; then one thread an expert adds up the statistics, in the order of the tokens.
#include <cfloat>

#include "common.cuh"
#include "route_topk.cuh"

namespace moemm::cuda {
namespace {

constexpr int kWarps = kThreads / kWarp;
constexpr int kColumns = 128;
constexpr unsigned kAll = 0xffffffffu;

__device__ inline float lowest(float) {
  return -__int_as_float(0x7f800000);
}
__device__ inline double lowest(double) {
  return -__longlong_as_double(0x7ff0000000000000ll);
}

// What NaN and minus infinity count as where experts are compared, as on the CPU.
__device__ inline float least(float) {
  return -FLT_MAX;
}
__device__ inline double least(double) {
  return -DBL_MAX;
}

template <typename acc_t>
__device__ inline acc_t warp_sum(acc_t value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAll, value, offset);
  return value;
}

// What a warp knows of its token.
template <typename scalar_t>
struct Token {
  using acc_t = Accumulator<scalar_t>;
  const scalar_t* logits;
  const bool* allowed;
  acc_t lse, total;  // total: sum of the scores
  bool sigmoid;

  __device__ acc_t logit(int64_t e) const { return widen(logits[e]); }
  __device__ acc_t softmax(int64_t e) const { return exp(logit(e) - lse); }
  __device__ acc_t score(int64_t e) const { return sigmoid ? acc_t(1) / (acc_t(1) + exp(-logit(e))) : softmax(e); }
};

// Checks the token's modality and takes its sums; all lanes of a warp call this.
template <typename scalar_t, typename Arguments>
__device__ Token<scalar_t> read_token(const Arguments& a, int64_t index) {
  using acc_t = Accumulator<scalar_t>;
  const int64_t modality = a.modality[index];
  if (modality < 0 || modality >= a.num_modalities) trap_bad_index("modality", index, modality, a.num_modalities);
  Token<scalar_t> token{static_cast<const scalar_t*>(a.logits) + index * a.logits_stride,
                        a.allowed + modality * a.num_experts, 0, 1, a.sigmoid};
  acc_t largest = lowest(acc_t());
  int found = 0;
  for (int64_t e = threadIdx.x; e < a.num_experts; e += kWarp) {
    if (!token.allowed[e]) continue;
    found = 1;
    largest = token.logit(e) > largest ? token.logit(e) : largest;
  }
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const acc_t other = __shfl_xor_sync(kAll, largest, offset);
    largest = other > largest ? other : largest;
  }
  if (!__any_sync(kAll, found)) {
    if (threadIdx.x == 0) {
      printf("moemm: token %lld is of modality %lld, and allowed has no expert for it\n",
             static_cast<long long>(index), static_cast<long long>(modality));
    }
    __trap();
  }
  acc_t sum = 0, scores = 0;
  for (int64_t e = threadIdx.x; e < a.num_experts; e += kWarp) {
    if (!token.allowed[e]) continue;
    sum += exp(token.logit(e) - largest);
    if (a.sigmoid) scores += token.score(e);
  }
  token.lse = largest + log(warp_sum(sum));
  if (a.sigmoid) token.total = warp_sum(scores);
  return token;
}

// Whether candidate (key, id) comes before the other; among equals the lower id. No key is NaN. id < 0: no candidate.
template <typename acc_t>
__device__ inline bool before(acc_t key, int64_t id, acc_t other_key, int64_t other_id) {
  if (id < 0 || other_id < 0) return id >= 0;
  if (key != other_key) return key > other_key;
  return id < other_id;
}

template <typename scalar_t>
__global__ void route_kernel(RouteArguments a) {
  using acc_t = Accumulator<scalar_t>;
  const auto* bias = static_cast<const acc_t*>(a.bias);
  for (int64_t index = first_row(); index < a.num_tokens; index += row_step()) {
    const auto token = read_token<scalar_t>(a, index);
    auto* gates = static_cast<acc_t*>(a.gates) + index * a.top_k;
    uint64_t taken = 0;  // bit i: expert lane + 32 i
    acc_t chosen = 0;
    for (int64_t k = 0; k < a.top_k; ++k) {
      acc_t best = 0;
      int64_t id = kNone;
      for (int64_t e = threadIdx.x, i = 0; e < a.num_experts; e += kWarp, ++i) {
        if (!token.allowed[e] || (taken >> i & 1)) continue;
        const acc_t value = bias == nullptr ? token.logit(e) : token.score(e) + bias[e];
        const acc_t key = value > least(acc_t()) ? value : least(acc_t());
        if (before(key, e, best, id)) best = key, id = e;
      }
#pragma unroll
      for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        const acc_t key = __shfl_xor_sync(kAll, best, offset);
        const int64_t other = __shfl_xor_sync(kAll, id, offset);
        if (before(key, other, best, id)) best = key, id = other;
      }
      if (id != kNone && id % kWarp == threadIdx.x) taken |= uint64_t(1) << (id / kWarp);
      const acc_t gate = id == kNone ? acc_t(0) : token.score(id);
      chosen += gate;
      if (threadIdx.x == 0) {
        gates[k] = gate;
        a.experts[index * a.top_k + k] = id;
      }
    }
    if (threadIdx.x != 0) continue;
    for (int64_t k = 0; a.renormalise && k < a.top_k; ++k) {
      if (a.experts[index * a.top_k + k] != kNone) gates[k] /= chosen;
    }
    static_cast<acc_t*>(a.rows)[2 * index] = token.lse;
    static_cast<acc_t*>(a.rows)[2 * index + 1] = token.total;
  }
}

// One thread an expert, one block a (chunk, columns, modality): only the first grid dimension may pass 65,535. The first
// column's thread also sums z and tokens.
template <typename scalar_t>
__global__ void statistics_kernel(RouteArguments a) {
  using acc_t = Accumulator<scalar_t>;
  const int64_t e = static_cast<int64_t>(blockIdx.y) * kColumns + threadIdx.x, modality = blockIdx.z;
  if (e >= a.num_experts) return;
  const bool allowed = a.allowed[modality * a.num_experts + e];
  const int64_t start = static_cast<int64_t>(blockIdx.x) * kRouteChunk;
  const int64_t end = start + kRouteChunk < a.num_tokens ? start + kRouteChunk : a.num_tokens;
  acc_t load = 0, prob = 0, z = 0, tokens = 0;
  for (int64_t index = start; index < end; ++index) {
    if (a.modality[index] != modality) continue;
    const acc_t lse = static_cast<const acc_t*>(a.rows)[2 * index];
    const Token<scalar_t> token{static_cast<const scalar_t*>(a.logits) + index * a.logits_stride, nullptr, lse,
                                static_cast<const acc_t*>(a.rows)[2 * index + 1], a.sigmoid};
    if (allowed) prob += token.score(e) / token.total;
    for (int64_t k = 0; k < a.top_k; ++k) load += a.experts[index * a.top_k + k] == e ? acc_t(1) : acc_t(0);
    z += lse * lse;
    tokens += 1;
  }
  const int64_t size = a.num_modalities * a.num_experts;
  auto* out = static_cast<acc_t*>(a.chunks) + blockIdx.x * (2 * size + 2 * a.num_modalities);
  out[modality * a.num_experts + e] = load;
  out[size + modality * a.num_experts + e] = prob;
  if (e != 0) return;
  out[2 * size + modality] = z;
  out[2 * size + a.num_modalities + modality] = tokens;
}

template <typename acc_t>
__global__ void add_chunks_kernel(RouteArguments a, int64_t num_chunks, int64_t size) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= size) return;
  acc_t sum = 0;
  for (int64_t chunk = 0; chunk < num_chunks; ++chunk) sum += static_cast<const acc_t*>(a.chunks)[chunk * size + i];
  static_cast<acc_t*>(a.sums)[i] = sum;
}

template <typename scalar_t>
__global__ void route_backward_kernel(RouteBackwardArguments a) {
  using acc_t = Accumulator<scalar_t>;
  for (int64_t index = first_row(); index < a.num_tokens; index += row_step()) {
    const auto token = read_token<scalar_t>(a, index);
    const int64_t modality = a.modality[index];
    const auto* dgates = static_cast<const acc_t*>(a.dgates) + index * a.top_k;
    const auto* dprob = static_cast<const acc_t*>(a.dprob) + modality * a.num_experts;
    const auto* experts = a.experts + index * a.top_k;
    acc_t gate_sum = a.renormalise ? 0 : 1, gate_mean = 0;
    for (int64_t k = 0; k < a.top_k; ++k) {
      if (!in_range(experts[k], a.num_experts)) {
        trap_bad_index("experts", index * a.top_k + k, experts[k], a.num_experts);
      }
      if (!a.renormalise || experts[k] == kNone) continue;
      gate_sum += token.score(experts[k]);
      gate_mean += dgates[k] * token.score(experts[k]);
    }
    gate_mean /= gate_sum;
    acc_t mean = 0;
    for (int64_t e = threadIdx.x; e < a.num_experts; e += kWarp) {
      if (token.allowed[e]) mean += dprob[e] * token.score(e) / token.total;
    }
    mean = a.sigmoid ? warp_sum(mean) : acc_t(0);
    const auto dscore = [&](int64_t e) {
      acc_t sum = (dprob[e] - mean) / token.total;
      for (int64_t k = 0; k < a.top_k; ++k) sum += experts[k] == e ? (dgates[k] - gate_mean) / gate_sum : acc_t(0);
      return sum;
    };
    acc_t inner = 0;
    for (int64_t e = threadIdx.x; e < a.num_experts; e += kWarp) {
      if (token.allowed[e]) inner += dscore(e) * token.score(e);
    }
    inner = warp_sum(inner);
    const acc_t slope = 2 * static_cast<const acc_t*>(a.dz)[modality] * token.lse;
    auto* out = static_cast<scalar_t*>(a.out) + index * a.num_experts;
    for (int64_t e = threadIdx.x; e < a.num_experts; e += kWarp) {
      const acc_t score = token.score(e);
      const acc_t own = a.sigmoid ? dscore(e) * score * (1 - score) : score * (dscore(e) - inner);
      out[e] = narrow<scalar_t>(token.allowed[e] ? own + slope * token.softmax(e) : acc_t(0));
    }
  }
}

unsigned blocks_for(int64_t num_tokens) {
  constexpr int64_t kMaxBlocks = 0x7fffffff;
  const int64_t needed = (num_tokens + kWarps - 1) / kWarps;
  return static_cast<unsigned>(needed < kMaxBlocks ? needed : kMaxBlocks);
}

template <typename scalar_t>
void launch(const RouteArguments& a, cudaStream_t stream) {
  using acc_t = Accumulator<scalar_t>;
  const int64_t num_chunks = (a.num_tokens + kRouteChunk - 1) / kRouteChunk;
  if (num_chunks > 0) route_kernel<scalar_t><<<blocks_for(a.num_tokens), dim3(kWarp, kWarps), 0, stream>>>(a);
  if (a.num_modalities == 0) return;  // a token, if there is one, has trapped: it names a modality out of range
  if (num_chunks > 0) {
    const dim3 grid(static_cast<unsigned>(num_chunks), static_cast<unsigned>((a.num_experts + kColumns - 1) / kColumns),
                    static_cast<unsigned>(a.num_modalities));
    statistics_kernel<scalar_t><<<grid, kColumns, 0, stream>>>(a);
  }
  const int64_t size = 2 * a.num_modalities * (a.num_experts + 1);
  const unsigned blocks = static_cast<unsigned>((size + kThreads - 1) / kThreads);
  add_chunks_kernel<acc_t><<<blocks, kThreads, 0, stream>>>(a, num_chunks, size);
}

template <typename scalar_t>
void launch(const RouteBackwardArguments& a, cudaStream_t stream) {
  route_backward_kernel<scalar_t><<<blocks_for(a.num_tokens), dim3(kWarp, kWarps), 0, stream>>>(a);
}

template <typename Arguments>
cudaError_t by_element(const Arguments& a, cudaStream_t stream) {
  switch (a.element) {
    case Element::kFloat:
      launch<float>(a, stream);
      break;
    case Element::kDouble:
      launch<double>(a, stream);
      break;
    case Element::kBFloat16:
      launch<__nv_bfloat16>(a, stream);
      break;
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_route_topk(const RouteArguments& a, cudaStream_t stream) {
  return by_element(a, stream);
}

cudaError_t launch_route_topk_backward(const RouteBackwardArguments& a, cudaStream_t stream) {
  return a.num_tokens == 0 ? cudaSuccess : by_element(a, stream);
}

}  // namespace moemm::cuda
