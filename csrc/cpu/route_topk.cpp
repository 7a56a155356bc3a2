// route_topk: from logits to gates, expert ids and the sums that the losses need, in one pass over the logits.
// T tokens, E experts, K chosen, M modalities.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "moemm/checks.h"
#include "moemm/dispatch.h"
#include "simd.h"

namespace moemm::cpu {
namespace {

// Tokens whose sums are kept together; fixed, so that sums have the same bits on any number of threads.
constexpr int64_t kChunk = 512;

struct Options {
  bool sigmoid, renormalise;
  int64_t top_k;
};

// The argument tensors, dense.
struct Inputs {
  at::Tensor logits, modality, allowed, bias;
  int64_t num_tokens, num_experts, num_modalities;

  Inputs(const at::Tensor& logits_, const at::Tensor& modality_, const at::Tensor& allowed_,
         const std::optional<at::Tensor>& bias_)
      : logits(with_dense_rows(logits_)),
        modality(modality_.contiguous()),
        allowed(allowed_.contiguous()),
        bias(bias_ ? bias_->to(accumulator_of(logits_.scalar_type())).contiguous() : at::Tensor()),
        num_tokens(logits_.size(0)),
        num_experts(logits_.size(1)),
        num_modalities(allowed_.size(0)) {}
};

// What one token's logits become; the buffers are used again for the next token.
template <typename acc_t>
struct Row {
  std::vector<acc_t> logit, softmax, score, biased;  // score: the sigmoid; with softmax routing that
  acc_t lse = 0, total = 0;                  // total: sum of the scores over allowed experts

  explicit Row(int64_t num_experts) : logit(num_experts), softmax(num_experts), score(num_experts), biased(num_experts) {}
};

template <typename scalar_t, typename acc_t>
MOEMM_SIMD acc_t load_masked(acc_t* out, const scalar_t* logits, const bool* allowed, int64_t count) {
  for (int64_t e = 0; e < count; ++e) {
    out[e] = allowed[e] ? static_cast<acc_t>(widen(logits[e])) : -std::numeric_limits<acc_t>::infinity();
  }
  acc_t largest = -std::numeric_limits<acc_t>::infinity();
  for (int64_t e = 0; e < count; ++e) largest = out[e] > largest ? out[e] : largest;
  return largest;
}

template <typename acc_t>
MOEMM_SIMD void exponentials(acc_t* out, const acc_t* logits, const bool* allowed, acc_t largest, int64_t count) {
  for (int64_t e = 0; e < count; ++e) {
    const acc_t value = exponential(logits[e] - largest);
    out[e] = allowed[e] ? value : acc_t(0);
  }
}

template <typename acc_t>
MOEMM_SIMD void sigmoids(acc_t* out, const acc_t* logits, const bool* allowed, int64_t count) {
  for (int64_t e = 0; e < count; ++e) {
    const acc_t value = acc_t(1) / (acc_t(1) + exponential(-logits[e]));
    out[e] = allowed[e] ? value : acc_t(0);
  }
}

template <typename acc_t>
MOEMM_SIMD void add_shares(acc_t* __restrict__ sums, const acc_t* __restrict__ scores, acc_t factor, int64_t count) {
  for (int64_t e = 0; e < count; ++e) sums[e] += scores[e] * factor;
}

template <typename acc_t>
acc_t sum_of(const std::vector<acc_t>& values) {
  acc_t total = 0;
  for (const acc_t value : values) total += value;
  return total;
}

template <typename scalar_t, typename acc_t>
void compute_row(Row<acc_t>& row, const scalar_t* logits, const bool* allowed, bool sigmoid) {
  const int64_t count = static_cast<int64_t>(row.logit.size());
  const acc_t largest = load_masked(row.logit.data(), logits, allowed, count);
  exponentials(row.softmax.data(), row.logit.data(), allowed, largest, count);
  const acc_t sum = sum_of(row.softmax);
  row.lse = largest + std::log(sum);
  const acc_t factor = acc_t(1) / sum;
  for (acc_t& value : row.softmax) value *= factor;
  row.total = 1;
  if (sigmoid) {
    sigmoids(row.score.data(), row.logit.data(), allowed, count);
    row.total = sum_of(row.score);
  } else {
    row.score = row.softmax;
  }
}

// The `count` best allowed experts, the first among equals, NaN last; kNone where none is left. One pass: an expert is
// compared with the worst of those kept, and most stop there.
template <typename acc_t>
void best(const acc_t* key, const bool* allowed, int64_t num_experts, int64_t count, int64_t* ids, acc_t* kept) {
  constexpr acc_t kLowest = std::numeric_limits<acc_t>::lowest();
  std::fill_n(ids, count, kNone);
  std::fill_n(kept, count, -std::numeric_limits<acc_t>::infinity());
  for (int64_t e = 0; e < num_experts; ++e) {
    const acc_t value = key[e] > kLowest ? key[e] : kLowest;
    if (!allowed[e] || !(value > kept[count - 1])) continue;
    int64_t at = count - 1;
    for (; at > 0 && value > kept[at - 1]; --at) kept[at] = kept[at - 1], ids[at] = ids[at - 1];
    kept[at] = value;
    ids[at] = e;
  }
}

template <typename acc_t>
void choose(Row<acc_t>& row, const bool* allowed, const acc_t* bias, const Options& options, acc_t* gates,
            int64_t* experts, acc_t* load) {
  const int64_t count = static_cast<int64_t>(row.logit.size());
  // Without a bias the logits' order is that of the scores, and free of their rounding.
  const acc_t* key = row.logit.data();
  if (bias != nullptr) {
    for (int64_t e = 0; e < count; ++e) row.biased[e] = row.score[e] + bias[e];
    key = row.biased.data();
  }
  best(key, allowed, count, options.top_k, experts, gates);
  acc_t chosen = 0;
  for (int64_t k = 0; k < options.top_k; ++k) {
    const int64_t expert = experts[k];
    gates[k] = expert == kNone ? acc_t(0) : row.score[expert];
    chosen += gates[k];
    if (expert != kNone) load[expert] += 1;
  }
  if (options.renormalise) {
    for (int64_t k = 0; k < options.top_k; ++k) gates[k] = experts[k] == kNone ? acc_t(0) : gates[k] / chosen;
  }
}

[[noreturn]] void throw_no_expert(const char* op, int64_t token, int64_t modality) {
  TORCH_CHECK_VALUE(false, op, ": token ", token, " is of modality ", modality, ", and allowed has no expert for it");
}

// Modality of a token, after the checks that keep the accesses that follow in bounds.
int64_t modality_of(const char* op, const Inputs& in, int64_t token, const std::vector<uint8_t>& served) {
  const int64_t modality = in.modality.const_data_ptr<int64_t>()[token];
  TORCH_CHECK_INDEX(modality >= 0 && modality < in.num_modalities, op, ": modality holds ", modality, " at position ",
                    token, "; allowed is 0 to ", in.num_modalities - 1);
  if (!served[modality]) throw_no_expert(op, token, modality);
  return modality;
}

std::vector<uint8_t> modalities_served(const Inputs& in) {
  std::vector<uint8_t> served(in.num_modalities, 0);
  const auto* allowed = in.allowed.const_data_ptr<bool>();
  for (int64_t at = 0; at < in.allowed.numel(); ++at) served[at / in.num_experts] |= allowed[at];
  return served;
}

// Sums of the chunks, added up in their order.
template <typename acc_t>
void add_chunks(const at::Tensor& chunks, acc_t* out) {
  const int64_t size = chunks.numel() / std::max<int64_t>(1, chunks.size(0));
  const auto* from = chunks.const_data_ptr<acc_t>();
  for (int64_t chunk = 0; chunk < chunks.size(0); ++chunk) {
    for (int64_t i = 0; i < size; ++i) out[i] += from[chunk * size + i];
  }
}

template <typename scalar_t>
void forward(const char* op, const Inputs& in, const Options& options, at::Tensor& gates, at::Tensor& experts,
             at::Tensor& sums) {
  using acc_t = Accumulator<scalar_t>;
  const int64_t num_chunks = (in.num_tokens + kChunk - 1) / kChunk, width = in.num_experts;
  const int64_t size = in.num_modalities * width, stride = in.logits.stride(0);
  const auto served = modalities_served(in);
  auto chunks = at::zeros({num_chunks, sums.numel()}, sums.options());
  const auto* bias = in.bias.defined() ? in.bias.const_data_ptr<acc_t>() : nullptr;
  at::parallel_for(0, num_chunks, 1, [&](int64_t begin, int64_t end) {
    Row<acc_t> row(width);
    for (int64_t token = begin * kChunk; token < std::min(end * kChunk, in.num_tokens); ++token) {
      const int64_t modality = modality_of(op, in, token, served);
      const auto* allowed = in.allowed.const_data_ptr<bool>() + modality * width;
      auto* load = chunks.mutable_data_ptr<acc_t>() + token / kChunk * sums.numel();
      auto* prob = load + size + modality * width;
      auto* z = load + 2 * size;
      compute_row(row, in.logits.const_data_ptr<scalar_t>() + token * stride, allowed, options.sigmoid);
      choose(row, allowed, bias, options, gates.mutable_data_ptr<acc_t>() + token * options.top_k,
             experts.mutable_data_ptr<int64_t>() + token * options.top_k, load + modality * width);
      add_shares(prob, row.score.data(), acc_t(1) / row.total, width);
      z[modality] += row.lse * row.lse;
      z[in.num_modalities + modality] += 1;
    }
  });
  add_chunks(chunks, sums.mutable_data_ptr<acc_t>());
}

// Gradients of the scores from those of a token's gates, through the renormalisation where there is one.
template <typename acc_t>
void add_gate_gradients(std::vector<acc_t>& dscore, const Row<acc_t>& row, const acc_t* dgates, const int64_t* experts,
                        const Options& options) {
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
    if (experts[k] != kNone) dscore[experts[k]] += (dgates[k] - mean) / sum;
  }
}

template <typename acc_t, typename scalar_t>
MOEMM_SIMD void logit_gradients(scalar_t* out, const acc_t* dscore, const Row<acc_t>& row, const bool* allowed,
                                acc_t inner, acc_t dz, bool sigmoid) {
  const acc_t *score = row.score.data(), *softmax = row.softmax.data();
  const int64_t count = static_cast<int64_t>(row.logit.size());
  const acc_t slope = 2 * dz * row.lse;
  for (int64_t e = 0; e < count; ++e) {
    const acc_t own = sigmoid ? dscore[e] * score[e] * (1 - score[e]) : score[e] * (dscore[e] - inner);
    store(out[e], allowed[e] ? own + slope * softmax[e] : acc_t(0));
  }
}

template <typename scalar_t>
void backward(const char* op, const Inputs& in, const Options& options, const at::Tensor& dgates,
              const at::Tensor& dprob, const at::Tensor& dz, const at::Tensor& experts, at::Tensor& out) {
  using acc_t = Accumulator<scalar_t>;
  const int64_t width = in.num_experts, num_chunks = (in.num_tokens + kChunk - 1) / kChunk;
  const auto served = modalities_served(in);
  const auto* ids = experts.const_data_ptr<int64_t>();
  at::parallel_for(0, num_chunks, 1, [&](int64_t begin, int64_t end) {
    Row<acc_t> row(width);
    std::vector<acc_t> dscore(width);
    for (int64_t token = begin * kChunk; token < std::min(end * kChunk, in.num_tokens); ++token) {
      const int64_t modality = modality_of(op, in, token, served);
      const auto* allowed = in.allowed.const_data_ptr<bool>() + modality * width;
      compute_row(row, in.logits.const_data_ptr<scalar_t>() + token * in.logits.stride(0), allowed, options.sigmoid);
      const auto* dshare = dprob.const_data_ptr<acc_t>() + modality * width;
      acc_t mean = 0;  // the shares are score / total
      for (int64_t e = 0; e < width; ++e) mean += dshare[e] * row.score[e] / row.total;
      for (int64_t e = 0; e < width; ++e) dscore[e] = options.sigmoid ? (dshare[e] - mean) / row.total : dshare[e];
      for (int64_t k = 0; k < options.top_k; ++k) {
        const int64_t expert = ids[token * options.top_k + k];
        if (!in_range(expert, width)) throw_bad_index(op, "experts", token * options.top_k + k, expert, width);
      }
      add_gate_gradients(dscore, row, dgates.const_data_ptr<acc_t>() + token * options.top_k,
                         ids + token * options.top_k, options);
      acc_t inner = 0;
      for (int64_t e = 0; e < width; ++e) inner += dscore[e] * row.score[e];
      logit_gradients(out.mutable_data_ptr<scalar_t>() + token * width, dscore.data(), row, allowed, inner,
                      dz.const_data_ptr<acc_t>()[modality], options.sigmoid);
    }
  });
}

RouteOutputs route_topk(const at::Tensor& logits, const at::Tensor& modality, const at::Tensor& allowed,
                        const std::optional<at::Tensor>& bias, int64_t top_k, c10::string_view kind, bool renormalise) {
  constexpr const char* op = "moemm::route_topk";
  check_route(op, logits, modality, allowed, bias, top_k, kind);
  const Inputs in(logits, modality, allowed, bias);
  const auto wide = logits.options().dtype(accumulator_of(logits.scalar_type()));
  auto gates = at::empty({in.num_tokens, top_k}, wide);
  auto experts = at::empty({in.num_tokens, top_k}, logits.options().dtype(at::kLong));
  const int64_t size = allowed.numel(), rows = in.num_modalities;
  auto sums = at::zeros({2 * size + 2 * rows}, wide);
  dispatch_values(logits, [&]<typename scalar_t>(std::type_identity<scalar_t>) {
    forward<scalar_t>(op, in, {kind == "sigmoid", renormalise, top_k}, gates, experts, sums);
  });
  // Outputs of an op may not share memory.
  return {gates,
          experts,
          sums.narrow(0, 0, size).view({rows, in.num_experts}).clone(),
          sums.narrow(0, size, size).view({rows, in.num_experts}).clone(),
          sums.narrow(0, 2 * size, rows).clone(),
          sums.narrow(0, 2 * size + rows, rows).clone()};
}

at::Tensor route_topk_backward(const at::Tensor& dgates, const at::Tensor& dprob, const at::Tensor& dz,
                               const at::Tensor& logits, const at::Tensor& modality, const at::Tensor& allowed,
                               const at::Tensor& experts, c10::string_view kind, bool renormalise) {
  constexpr const char* op = "moemm::route_topk_backward";
  check_route_backward(op, dgates, dprob, dz, logits, modality, allowed, experts, kind);
  const Inputs in(logits, modality, allowed, std::nullopt);
  auto out = at::empty(logits.sizes(), logits.options().memory_format(at::MemoryFormat::Contiguous));
  dispatch_values(logits, [&]<typename scalar_t>(std::type_identity<scalar_t>) {
    backward<scalar_t>(op, in, {kind == "sigmoid", renormalise, experts.size(1)}, dgates.contiguous(),
                       dprob.contiguous(), dz.contiguous(), experts.contiguous(), out);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(moemm, CPU, m) {
  m.impl("route_topk", &route_topk);
  m.impl("route_topk_backward", &route_topk_backward);
}

}  // namespace moemm::cpu
