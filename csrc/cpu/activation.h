// Activations over rows: h = act(z), and their derivatives with the gate applied. F hidden width.
#pragma once

#include <numbers>

#include "moemm/dispatch.h"
#include "simd.h"

namespace moemm::cpu {

enum class Activation { kGelu, kRelu2, kSwiglu };

// What the activation of one unit and its derivatives are; `gate` and `up` are the two halves of z, up is 1 without one.
template <typename acc_t>
struct Unit {
  acc_t value, dgate, dup;
};

// Normal distribution function; in float by Abramowitz and Stegun 7.1.26, within 1e-7.
MOEMM_INLINE float normal_cdf(float x, float exponential_of_minus_half_square) {
  const float u = std::fabs(x) * 0.70710678f, t = 1.0f / (1.0f + 0.3275911f * u);
  const float poly = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
  const float tail = 0.5f * poly * exponential_of_minus_half_square;
  return x < 0.0f ? tail : 1.0f - tail;
}
MOEMM_INLINE double normal_cdf(double x, double) {
  return 0.5 * std::erfc(-x * std::numbers::sqrt2 / 2);
}

template <Activation activation, typename acc_t>
MOEMM_INLINE Unit<acc_t> unit(acc_t gate, acc_t up) {
  if constexpr (activation == Activation::kSwiglu) {
    const acc_t sigmoid = acc_t(1) / (acc_t(1) + exponential(-gate)), silu = gate * sigmoid;
    return {silu * up, up * (sigmoid + silu * (acc_t(1) - sigmoid)), silu};
  } else if constexpr (activation == Activation::kRelu2) {
    const acc_t positive = gate > 0 ? gate : acc_t(0);
    return {positive * positive, 2 * positive, 0};
  } else {
    const acc_t bell = exponential(acc_t(-0.5) * gate * gate), cdf = normal_cdf(gate, bell);
    return {gate * cdf, cdf + gate * bell * acc_t(0.3989422804014327), 0};
  }
}

// h[i] = act(z[i]); the second half of z is at `up` for swiglu.
template <Activation activation, typename scalar_t>
MOEMM_SIMD void activate(scalar_t* __restrict__ h, const scalar_t* __restrict__ z, int64_t width) {
  using acc_t = Accumulator<scalar_t>;
  constexpr bool kTwo = activation == Activation::kSwiglu;
  for (int64_t i = 0; i < width; ++i) {
    store(h[i], unit<activation, acc_t>(widen(z[i]), kTwo ? acc_t(widen(z[kTwo ? width + i : i])) : acc_t(1)).value);
  }
}

// From dh = dL/dh without the row's gate: dz with the gate, scaled = gate * h; returns <dh, h>, the gate's gradient.
template <Activation activation, typename scalar_t>
MOEMM_SIMD Accumulator<scalar_t> activate_backward(scalar_t* __restrict__ dz, scalar_t* __restrict__ scaled,
                                                   const scalar_t* __restrict__ dh, const scalar_t* __restrict__ z,
                                                   Accumulator<scalar_t> gate, int64_t width) {
  using acc_t = Accumulator<scalar_t>;
  constexpr bool kTwo = activation == Activation::kSwiglu;
  constexpr int64_t kLanes = 32;
  acc_t sums[kLanes] = {};
  const auto step = [&](int64_t i, int64_t lane) MOEMM_STEP {
    const acc_t grad = widen(dh[i]);
    const auto at = unit<activation, acc_t>(widen(z[i]), kTwo ? acc_t(widen(z[kTwo ? width + i : i])) : acc_t(1));
    sums[lane] += grad * at.value;
    store(scaled[i], gate * at.value);
    store(dz[i], gate * grad * at.dgate);
    if constexpr (kTwo) store(dz[width + i], gate * grad * at.dup);
  };
  int64_t start = 0;
  for (; start + kLanes <= width; start += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) step(start + lane, lane);
  }
  for (; start < width; ++start) step(start, start % kLanes);
  acc_t total = 0;
  for (const acc_t sum : sums) total += sum;
  return total;
}

}  // namespace moemm::cpu
