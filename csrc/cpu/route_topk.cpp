// route_topk: from logits to gates, expert ids and the sums that the losses need, in one pass over the logits.
// T tokens, E experts, K chosen, M modalities.
#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "moemm/checks.h"
#include "moemm/dispatch.h"
#include "moemm/route.h"
#include "simd.h"

namespace moemm::cpu {
namespace {

// Tokens whose sums are kept together; fixed, so that sums have the same bits on any number of threads.
constexpr int64_t kChunk = 512;

struct Options {
  bool sigmoid, renormalise;
  int64_t top_k;
};

// Sums and maxima are kept in this many lanes, each taking every 16th expert: the order of a sum does not depend on the
// processor's vectors. Buffers over experts are as long as the next multiple of it.
constexpr int64_t kLanes = 16;

inline int64_t padded(int64_t count) {
  return (count + kLanes - 1) / kLanes * kLanes;
}

// An integer as wide as acc_t: masks, and keys in the order of the values.
template <typename acc_t>
using Integer = std::conditional_t<sizeof(acc_t) == 8, int64_t, int32_t>;

// Sum of term(e) over experts below `count`, a multiple of kLanes.
template <typename acc_t, typename Term>
MOEMM_INLINE acc_t lane_sum(int64_t count, const Term& term) {
  acc_t sums[kLanes] = {};
  for (int64_t start = 0; start < count; start += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += term(start + lane);
  }
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  }
  return sums[0];
}

// The largest value, NaN left out.
template <typename acc_t>
MOEMM_INLINE acc_t lane_max(const acc_t* values, int64_t count) {
  acc_t largest[kLanes];
  std::fill_n(largest, kLanes, -std::numeric_limits<acc_t>::infinity());
  for (int64_t start = 0; start < count; start += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      largest[lane] = values[start + lane] > largest[lane] ? values[start + lane] : largest[lane];
    }
  }
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) {
      largest[lane] = largest[lane + half] > largest[lane] ? largest[lane + half] : largest[lane];
    }
  }
  return largest[0];
}

// Which modality may use which expert, and what else is given for each pair, in padded rows.
template <typename acc_t>
struct Tables {
  std::vector<Integer<acc_t>> allowed;  // all bits set, or none
  std::vector<uint8_t> served;          // modalities with an expert
  std::vector<acc_t> dshare;            // gradients of prob
  int64_t width;

  Tables(const RouteInputs& in, const acc_t* dprob) : served(in.num_modalities, 0), width(padded(in.num_experts)) {
    const auto* given = in.allowed.const_data_ptr<bool>();
    allowed.resize(in.num_modalities * width, 0);
    dshare.resize(dprob == nullptr ? 0 : in.num_modalities * width, 0);
    for (int64_t at = 0; at < in.allowed.numel(); ++at) {
      const int64_t modality = at / in.num_experts, to = modality * width + at % in.num_experts;
      allowed[to] = given[at] ? -1 : 0;
      served[modality] |= given[at];
      if (dprob != nullptr) dshare[to] = dprob[at];
    }
  }
};

// What one token's logits become, in padded buffers that are used again for the next token.
template <typename acc_t>
struct Row {
  std::vector<acc_t> logit, softmax, sigmoid, dscore;
  std::vector<Integer<acc_t>> key;
  const acc_t* score = nullptr;  // the sigmoids, or the softmax
  acc_t lse = 0, total = 0;      // total: sum of the scores
  int64_t count, width;          // experts, and with padding

  explicit Row(int64_t num_experts)
      : logit(padded(num_experts), -std::numeric_limits<acc_t>::infinity()),
        softmax(logit.size()),
        sigmoid(logit.size()),
        dscore(logit.size()),
        key(logit.size()),
        count(num_experts),
        width(padded(num_experts)) {}
};

template <typename acc_t, typename scalar_t>
MOEMM_SIMD void compute_row(Row<acc_t>& row, const scalar_t* __restrict__ logits,
                            const Integer<acc_t>* __restrict__ allowed, bool sigmoid) {
  auto *__restrict__ logit = row.logit.data(), *__restrict__ softmax = row.softmax.data();
  auto* __restrict__ score = row.sigmoid.data();
  const int64_t count = row.count, width = row.width;
  for (int64_t e = 0; e < count; ++e) {
    const acc_t value = widen(logits[e]);
    logit[e] = allowed[e] ? value : -std::numeric_limits<acc_t>::infinity();
  }
  const acc_t largest = lane_max(logit, width);
  const acc_t sum = lane_sum<acc_t>(width, [&](int64_t e) MOEMM_STEP {
    const acc_t value = exponential(logit[e] - largest);
    return softmax[e] = allowed[e] ? value : acc_t(0);
  });
  row.lse = largest + std::log(sum);
  row.total = 1;
  row.score = softmax;
  const acc_t factor = acc_t(1) / sum;
  for (int64_t e = 0; e < width; ++e) softmax[e] *= factor;
  if (!sigmoid) return;
  row.score = score;
  row.total = lane_sum<acc_t>(width, [&](int64_t e) MOEMM_STEP {
    const acc_t value = acc_t(1) / (acc_t(1) + exponential(-logit[e]));
    return score[e] = allowed[e] ? value : acc_t(0);
  });
}

// An integer that orders like the value: equal for equal values, both zeros included; NaN is the lowest finite value.
template <typename acc_t>
MOEMM_INLINE Integer<acc_t> ordered(acc_t value) {
  constexpr acc_t kLowest = std::numeric_limits<acc_t>::lowest();
  value = (value > kLowest ? value : kLowest) + acc_t(0);
  Integer<acc_t> bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits ^ (bits >> (8 * sizeof(bits) - 1) & std::numeric_limits<Integer<acc_t>>::max());
}

// The `top_k` best allowed experts, the first among equals, NaN last; kNone where none is left. Each takes two passes
// over the keys without a branch: which is the largest, and where it first stands.
template <typename acc_t>
MOEMM_SIMD void choose_best(Row<acc_t>& row, const Integer<acc_t>* __restrict__ allowed,
                            const acc_t* __restrict__ bias, int64_t top_k, int64_t* ids) {
  using integer_t = Integer<acc_t>;
  constexpr integer_t kGone = std::numeric_limits<integer_t>::min();
  auto* __restrict__ key = row.key.data();
  const auto* __restrict__ value = bias == nullptr ? row.logit.data() : row.score;
  const int64_t count = row.count;
  const auto width = static_cast<integer_t>(row.width);
  // Without a bias the logits' order is that of the scores, and free of their rounding.
  if (bias == nullptr) {
    for (int64_t e = 0; e < count; ++e) key[e] = allowed[e] ? ordered(value[e]) : kGone;
  } else {
    for (int64_t e = 0; e < count; ++e) key[e] = allowed[e] ? ordered(value[e] + bias[e]) : kGone;
  }
  std::fill_n(key + count, width - count, kGone);
  for (int64_t k = 0; k < top_k; ++k) {
    integer_t best = kGone, at = width;
    for (integer_t e = 0; e < width; ++e) best = key[e] > best ? key[e] : best;
    for (integer_t e = 0; e < width; ++e) {
      const integer_t candidate = key[e] == best ? e : width;
      at = candidate < at ? candidate : at;
    }
    ids[k] = best == kGone ? kNone : at;
    key[at] = kGone;
  }
}

// Gates of the chosen experts, and how often each was chosen.
template <typename acc_t>
void take_gates(const Row<acc_t>& row, const Options& options, const int64_t* experts, acc_t* gates, acc_t* load) {
  acc_t chosen = 0;
  for (int64_t k = 0; k < options.top_k; ++k) {
    const int64_t expert = experts[k];
    gates[k] = expert == kNone ? acc_t(0) : row.score[expert];
    chosen += gates[k];
    if (expert != kNone) load[expert] += 1;
  }
  if (!options.renormalise) return;
  for (int64_t k = 0; k < options.top_k; ++k) gates[k] = experts[k] == kNone ? acc_t(0) : gates[k] / chosen;
}

template <typename acc_t>
MOEMM_SIMD void add_shares(acc_t* __restrict__ sums, const acc_t* __restrict__ scores, acc_t factor, int64_t count) {
  for (int64_t e = 0; e < count; ++e) sums[e] += scores[e] * factor;
}

[[noreturn]] void throw_bad_modality(const char* op, int64_t token, int64_t modality, int64_t num_modalities) {
  TORCH_CHECK_INDEX(modality >= 0 && modality < num_modalities, op, ": modality holds ", modality, " at position ",
                    token, "; allowed is 0 to ", num_modalities - 1);
  TORCH_CHECK_VALUE(false, op, ": token ", token, " is of modality ", modality, ", and allowed has no expert for it");
}

// Modality of a token, after the checks that keep the accesses that follow in bounds.
inline int64_t modality_of(const char* op, const int64_t* modalities, int64_t token,
                           const std::vector<uint8_t>& served) {
  const int64_t modality = modalities[token], count = static_cast<int64_t>(served.size());
  if (modality < 0 || modality >= count || !served[modality]) throw_bad_modality(op, token, modality, count);
  return modality;
}

// Sums of the chunks, added up in their order.
template <typename acc_t>
void add_chunks(const at::Tensor& chunks, at::Tensor& sums) {
  const int64_t size = sums.numel();
  const auto* from = chunks.const_data_ptr<acc_t>();
  auto* out = sums.mutable_data_ptr<acc_t>();
  std::fill_n(out, size, acc_t(0));
  for (int64_t chunk = 0; chunk < chunks.size(0); ++chunk) {
    for (int64_t i = 0; i < size; ++i) out[i] += from[chunk * size + i];
  }
}

template <typename scalar_t>
void forward(const char* op, const RouteInputs& in, const Options& options, RouteResults& out) {
  using acc_t = Accumulator<scalar_t>;
  const int64_t num_chunks = (in.num_tokens + kChunk - 1) / kChunk, count = in.num_experts, top_k = options.top_k;
  const int64_t size = in.num_modalities * count, num_sums = out.sums.numel(), stride = in.logits.stride(0);
  const Tables<acc_t> tables(in, nullptr);
  auto chunks = at::zeros({num_chunks, num_sums}, out.sums.options());
  const auto* bias = in.bias.defined() ? in.bias.const_data_ptr<acc_t>() : nullptr;
  const auto* modalities = in.modality.const_data_ptr<int64_t>();
  const auto* logits = in.logits.const_data_ptr<scalar_t>();
  auto* gates = out.gates.mutable_data_ptr<acc_t>();
  auto* experts = out.experts.mutable_data_ptr<int64_t>();
  auto* sums = chunks.mutable_data_ptr<acc_t>();
  at::parallel_for(0, num_chunks, 1, [&](int64_t begin, int64_t end) {
    Row<acc_t> row(count);
    for (int64_t token = begin * kChunk; token < std::min(end * kChunk, in.num_tokens); ++token) {
      const int64_t modality = modality_of(op, modalities, token, tables.served);
      const auto* allowed = tables.allowed.data() + modality * tables.width;
      auto* load = sums + token / kChunk * num_sums;
      auto* z = load + 2 * size + modality;
      compute_row(row, logits + token * stride, allowed, options.sigmoid);
      choose_best(row, allowed, bias, top_k, experts + token * top_k);
      take_gates(row, options, experts + token * top_k, gates + token * top_k, load + modality * count);
      add_shares(load + size + modality * count, row.score, acc_t(1) / row.total, count);
      z[0] += row.lse * row.lse;
      z[in.num_modalities] += 1;
    }
  });
  add_chunks<acc_t>(chunks, out.sums);
}

// Gradients of the scores from those of a token's gates, through the renormalisation where there is one.
template <typename acc_t>
void add_gate_gradients(Row<acc_t>& row, const acc_t* dgates, const int64_t* experts, const Options& options) {
  acc_t sum = 1, mean = 0;
  if (options.renormalise) {
    sum = 0;
    for (int64_t k = 0; k < options.top_k; ++k) {
      if (experts[k] == kNone) continue;
      sum += row.score[experts[k]];
      mean += dgates[k] * row.score[experts[k]];
    }
    mean /= sum;
  }
  for (int64_t k = 0; k < options.top_k; ++k) {
    if (experts[k] != kNone) row.dscore[experts[k]] += (dgates[k] - mean) / sum;
  }
}

// Gradients of the scores from those of prob: the shares are score / total, and with softmax the total is 1.
template <typename acc_t>
MOEMM_SIMD void share_gradients(Row<acc_t>& row, const acc_t* __restrict__ dshare, bool sigmoid) {
  auto* __restrict__ dscore = row.dscore.data();
  const auto* __restrict__ score = row.score;
  acc_t mean = 0, factor = 1;
  if (sigmoid) {
    factor /= row.total;
    mean = lane_sum<acc_t>(row.width, [&](int64_t e) MOEMM_STEP { return dshare[e] * score[e]; }) * factor;
  }
  const int64_t width = row.width;
  for (int64_t e = 0; e < width; ++e) dscore[e] = (dshare[e] - mean) * factor;
}

template <typename acc_t, typename scalar_t>
MOEMM_SIMD void logit_gradients(scalar_t* __restrict__ out, const Row<acc_t>& row,
                                const Integer<acc_t>* __restrict__ allowed, acc_t dz, bool sigmoid) {
  const auto *__restrict__ dscore = row.dscore.data(), *__restrict__ softmax = row.softmax.data(), *score = row.score;
  const acc_t slope = 2 * dz * row.lse;
  const int64_t count = row.count;
  if (sigmoid) {
    for (int64_t e = 0; e < count; ++e) {
      const acc_t value = dscore[e] * score[e] * (1 - score[e]) + slope * softmax[e];
      store(out[e], allowed[e] ? value : acc_t(0));
    }
    return;
  }
  const acc_t inner = lane_sum<acc_t>(row.width, [&](int64_t e) MOEMM_STEP { return dscore[e] * softmax[e]; });
  for (int64_t e = 0; e < count; ++e) {
    const acc_t value = softmax[e] * (dscore[e] - inner + slope);
    store(out[e], allowed[e] ? value : acc_t(0));
  }
}

template <typename scalar_t>
void backward(const char* op, const RouteInputs& in, const Options& options, RouteGradients& given) {
  using acc_t = Accumulator<scalar_t>;
  const int64_t count = in.num_experts, top_k = options.top_k, stride = in.logits.stride(0);
  const Tables<acc_t> tables(in, given.dprob.const_data_ptr<acc_t>());
  const auto* modalities = in.modality.const_data_ptr<int64_t>();
  const auto* logits = in.logits.const_data_ptr<scalar_t>();
  const auto* experts = given.experts.const_data_ptr<int64_t>();
  const auto *dgates = given.dgates.const_data_ptr<acc_t>(), *dz = given.dz.const_data_ptr<acc_t>();
  auto* dlogits = given.dlogits.mutable_data_ptr<scalar_t>();
  at::parallel_for(0, in.num_tokens, kChunk, [&](int64_t begin, int64_t end) {
    Row<acc_t> row(count);
    for (int64_t token = begin; token < end; ++token) {
      const int64_t modality = modality_of(op, modalities, token, tables.served);
      const auto* allowed = tables.allowed.data() + modality * tables.width;
      for (int64_t slot = token * top_k; slot < (token + 1) * top_k; ++slot) {
        if (!in_range(experts[slot], count)) throw_bad_index(op, "experts", slot, experts[slot], count);
      }
      compute_row(row, logits + token * stride, allowed, options.sigmoid);
      share_gradients(row, tables.dshare.data() + modality * tables.width, options.sigmoid);
      add_gate_gradients(row, dgates + token * top_k, experts + token * top_k, options);
      logit_gradients(dlogits + token * count, row, allowed, dz[modality], options.sigmoid);
    }
  });
}

RouteOutputs route_topk(const at::Tensor& logits, const at::Tensor& modality, const at::Tensor& allowed,
                        const std::optional<at::Tensor>& bias, int64_t top_k, c10::string_view kind, bool renormalise) {
  constexpr const char* op = "moemm::route_topk";
  check_route(op, logits, modality, allowed, bias, top_k, kind);
  const RouteInputs in(logits, modality, allowed, bias);
  RouteResults results(logits, allowed, top_k);
  dispatch_values(logits, [&]<typename scalar_t>(std::type_identity<scalar_t>) {
    forward<scalar_t>(op, in, {kind == "sigmoid", renormalise, top_k}, results);
  });
  return results.outputs(allowed);
}

at::Tensor route_topk_backward(const at::Tensor& dgates, const at::Tensor& dprob, const at::Tensor& dz,
                               const at::Tensor& logits, const at::Tensor& modality, const at::Tensor& allowed,
                               const at::Tensor& experts, c10::string_view kind, bool renormalise) {
  constexpr const char* op = "moemm::route_topk_backward";
  check_route_backward(op, dgates, dprob, dz, logits, modality, allowed, experts, kind);
  const RouteInputs in(logits, modality, allowed, std::nullopt);
  RouteGradients given(dgates, dprob, dz, experts, logits);
  dispatch_values(logits, [&]<typename scalar_t>(std::type_identity<scalar_t>) {
    backward<scalar_t>(op, in, {kind == "sigmoid", renormalise, experts.size(1)}, given);
  });
  return given.dlogits;
}

}  // namespace

TORCH_LIBRARY_IMPL(moemm, CPU, m) {
  m.impl("route_topk", &route_topk);
  m.impl("route_topk_backward", &route_topk_backward);
}

}  // namespace moemm::cpu
