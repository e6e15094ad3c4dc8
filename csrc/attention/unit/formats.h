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

// Rounded to bfloat16, in the lower halves of the elements.
CONVIT_INLINE Vector<uint32_t> narrow_to_bfloat16(Vector<float> value) {
  const Vector<uint32_t> bits = reinterpret_cast<Vector<uint32_t>>(value);
  const Vector<uint32_t> is_nan = reinterpret_cast<Vector<uint32_t>>(value != value);
  return (((bits + 0x7fff + (bits >> 16 & 1)) >> 16) & ~is_nan) | (is_nan & 0x7fc0);
}

// As many numbers of 16 bits as a vector has of 32.
typedef uint16_t HalfVector __attribute__((vector_size(kVectorBytes / 2)));

// Two vectors rounded to bfloat16: as they are, and as pairs of the lanes in the same place, the even one in the lower
// half.
struct NarrowPair {
  HalfVector even, odd;
  Vector<uint32_t> pairs;

  CONVIT_INLINE NarrowPair(Vector<float> even_row, Vector<float> odd_row) {
#ifdef __AVX512BF16__
    const __m512i in_turn = _mm512_set_epi16(
        31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1,
        16, 0);
    const __m512i rows = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd_row, even_row));
    even = reinterpret_cast<HalfVector>(_mm512_maskz_extracti64x4_epi64(0xff, rows, 0));
    odd = reinterpret_cast<HalfVector>(_mm512_maskz_extracti64x4_epi64(0xff, rows, 1));
    pairs = reinterpret_cast<Vector<uint32_t>>(_mm512_maskz_permutexvar_epi16(0xffffffff, in_turn, rows));
#else
    const Vector<uint32_t> lower = narrow_to_bfloat16(even_row), upper = narrow_to_bfloat16(odd_row);
    even = __builtin_convertvector(lower, HalfVector);
    odd = __builtin_convertvector(upper, HalfVector);
    pairs = lower | upper << 16;
#endif
  }
};

}  // namespace
}  // namespace convit_kernels
