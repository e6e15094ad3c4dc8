// What numbers are stored in, and its conversion to and from what is computed in.
#pragma once

#include "../problem.h"
#include "simd.h"

namespace convit_kernels {
namespace {

CONVIT_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return bits;
}

CONVIT_INLINE float float_of(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

CONVIT_INLINE float widen(float value) { return value; }
CONVIT_INLINE double widen(double value) { return value; }
CONVIT_INLINE float widen(BFloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }

CONVIT_INLINE float widen(Half value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fff) << 13, bias = 112u << 23;
  // an exponent one too high, and then one less: never is a number subnormal in float, where it could be flushed
  const uint32_t subnormal = bits_of(float_of(magnitude + bias + (1u << 23)) - float_of(bias + (1u << 23)));
  const uint32_t infinite = magnitude >= 0x7c00u << 13 ? bias : 0u;
  return float_of((magnitude < 1u << 23 ? subnormal : magnitude + bias + infinite) | sign);
}

CONVIT_INLINE void narrow(float value, float& to) { to = value; }
CONVIT_INLINE void narrow(double value, double& to) { to = value; }

CONVIT_INLINE void narrow(float value, BFloat16& to) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  to.bits = static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}

CONVIT_INLINE void narrow(float value, Half& to) {
  const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffff;
  // to nearest, ties to even; beyond the largest number it ends at infinity
  const uint32_t normal = (magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
  // a sum with 1/2 has steps of 2^-24, those of subnormal numbers
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  uint32_t result = magnitude < (113u << 23) ? subnormal : normal < 0x7c00 ? normal : 0x7c00;
  result = magnitude > 0x7f800000 ? 0x7e00 : result;
  to.bits = static_cast<uint16_t>(result | (bits >> 16 & 0x8000));
}

}  // namespace
}  // namespace convit_kernels
