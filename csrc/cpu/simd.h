// Vector code that one build carries for several processors, and the functions that such loops need.
#pragma once

#include <c10/util/BFloat16.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

// The compiler makes a loop once for AVX-512, once for AVX2 and once for any processor; the loader picks one.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(MOEMM_DEBUG) && \
    !defined(__SANITIZE_ADDRESS__)
#define MOEMM_SIMD __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MOEMM_SIMD
#endif
#define MOEMM_INLINE inline __attribute__((always_inline))
#define MOEMM_STEP __attribute__((always_inline))  // for lambdas

namespace moemm::cpu {

// c10's conversions keep loops from being vectorised; these round the same way.
MOEMM_INLINE float widen(c10::BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.x) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof(wide));
  return wide;
}
MOEMM_INLINE float widen(float value) {
  return value;
}
MOEMM_INLINE double widen(double value) {
  return value;
}
MOEMM_INLINE void store(c10::BFloat16& to, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to.x = static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}
MOEMM_INLINE void store(float& to, float value) {
  to = value;
}
MOEMM_INLINE void store(double& to, double value) {
  to = value;
}

// exp within 2 units in the last place (Cephes); NaN stays NaN. Below -87 it is 1e-38 instead of smaller.
MOEMM_INLINE float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.5f ? 88.5f : x;
  const float n = std::nearbyint(x * 1.44269504088896341f);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t bits = static_cast<int32_t>(static_cast<uint32_t>(static_cast<int32_t>(n == n ? n : 0.0f) + 127) << 23);
  float scale;
  std::memcpy(&scale, &bits, sizeof(scale));
  return p * scale;
}
MOEMM_INLINE double exponential(double x) {
  return std::exp(x);
}

}  // namespace moemm::cpu
