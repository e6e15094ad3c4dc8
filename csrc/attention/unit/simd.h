// Vectors of the size that a unit asks for, on the compilers' own vector types, and 2^t on them.
#pragma once

#include <cstdint>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#define CONVIT_INLINE inline __attribute__((always_inline))

namespace convit_kernels {
namespace {

// While it lives, a result too small to be a normal number is zero: products of two positional factors often are, and
// some processors take a hundred times as long for them. What the caller had set comes back after it.
class FlushSubnormals {
 public:
#if defined(__SSE2__)
  FlushSubnormals() : before_(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr(before_ | kFlushToZero); }
  ~FlushSubnormals() { __builtin_ia32_ldmxcsr(before_); }

 private:
  static constexpr unsigned kFlushToZero = 1u << 15;
  const unsigned before_;
#elif defined(__aarch64__)
  FlushSubnormals() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(before_));
    __asm__ volatile("msr fpcr, %0" : : "r"(before_ | kFlushToZero));
  }
  ~FlushSubnormals() { __asm__ volatile("msr fpcr, %0" : : "r"(before_)); }

 private:
  static constexpr uint64_t kFlushToZero = uint64_t{1} << 24;
  uint64_t before_;
#else
  FlushSubnormals() {}  // not a trivial type: an unused variable of it is no mistake
#endif
 public:
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;
};

constexpr int kVectorBytes = CONVIT_VECTOR_BYTES;
constexpr int kTileRows = CONVIT_TILE_ROWS, kTileVectors = CONVIT_TILE_VECTORS;

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <typename T>
using Vector = typename VectorOf<T>::type;
template <typename T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <typename T>
CONVIT_INLINE Vector<T> load(const T* from) {
  Vector<T> value;
  __builtin_memcpy(&value, from, sizeof(value));
  return value;
}

template <typename T>
CONVIT_INLINE void store(T* to, Vector<T> value) {
  __builtin_memcpy(to, &value, sizeof(value));
}

template <typename T>
CONVIT_INLINE Vector<T> broadcast(T value) {
  return value - Vector<T>{};
}

// The larger of both; `value` where one is NaN. That is what the instructions do, but compilers do not know them from
// the comparison for vectors.
#if CONVIT_VECTOR_BYTES == 64 && defined(__AVX512F__)
CONVIT_INLINE Vector<float> at_least(Vector<float> bound, Vector<float> value) {
  return _mm512_maskz_max_ps(0xffff, bound, value);
}
CONVIT_INLINE Vector<double> at_least(Vector<double> bound, Vector<double> value) {
  return _mm512_maskz_max_pd(0xff, bound, value);
}
#elif CONVIT_VECTOR_BYTES == 32 && defined(__AVX2__)
CONVIT_INLINE Vector<float> at_least(Vector<float> bound, Vector<float> value) { return _mm256_max_ps(bound, value); }
CONVIT_INLINE Vector<double> at_least(Vector<double> bound, Vector<double> value) {
  return _mm256_max_pd(bound, value);
}
#else
template <typename V>
CONVIT_INLINE V at_least(V bound, V value) {
  return bound > value ? bound : value;
}
#endif

constexpr int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t maximum(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

// 2^t for t at most 127 or so; 0 where that is no normal number; NaN stays. Adding the magic number rounds t to an
// integer, which is then in the low bits of the sum, the exponent's bias already added: shifted, it is 2^integer.
template <typename T>
struct Exponential;

template <>
struct Exponential<float> {
  using Bits = int32_t;
  static constexpr float kLargest = 0x1.fffffep127f, kLowest = -127.0f, kMagic = 12582912.0f + 127.0f;
  static constexpr int kMantissa = 23;
  // minimax in the relative error on [-1/2, 1/2]: 7.5e-8
  static constexpr float kPolynomial[] = {1.0000000716546416f,  0.6931469670652649f,   0.2402211972396918f,
                                          0.05550713272875391f, 0.009675541331021392f, 0.0013276472167819944f};
  // of degree 3: 7.5e-5, a twenty-sixth of what rounding to bfloat16 adds
  static constexpr float kShort[] = {0.99992807f, 0.69326099f, 0.24261112f, 0.05517167f};
};

template <>
struct Exponential<double> {
  using Bits = int64_t;
  static constexpr double kLargest = 0x1.fffffffffffffp1023, kLowest = -1023.0, kMagic = 6755399441055744.0 + 1023.0;
  static constexpr int kMantissa = 52;
  // Taylor's: ln(2)^n / n!; what is left out is below 1e-17
  static constexpr double kPolynomial[] = {
      1.0,
      0.69314718055994531,
      0.24022650695910072,
      0.055504108664821580,
      0.0096181291076284772,
      0.0013333558146428443,
      0.00015403530393381610,
      1.5252733804059840e-05,
      1.3215486790144309e-06,
      1.0178086009239699e-07,
      7.0549116208011233e-09,
      4.4455382718708115e-10,
      2.5678435993488205e-11,
      1.3691488853904129e-12};
};

template <typename T, int kTerms>
CONVIT_INLINE Vector<T> exp2(Vector<T> t, const T (&polynomial)[kTerms]) {
  using E = Exponential<T>;
  t = at_least(broadcast(E::kLowest), t);
  const Vector<T> shifted = t + E::kMagic;
  const Vector<T> fraction = t - (shifted - E::kMagic);
  Vector<T> sum = broadcast(polynomial[kTerms - 1]);
#pragma GCC unroll 16
  for (int power = kTerms - 2; power >= 0; --power) {
    sum = sum * fraction + polynomial[power];
  }
  using Bits = Vector<typename E::Bits>;
  return sum * reinterpret_cast<Vector<T>>(reinterpret_cast<Bits>(shifted) << E::kMantissa);
}

template <typename T>
CONVIT_INLINE Vector<T> exp2(Vector<T> t) {
  return exp2<T>(t, Exponential<T>::kPolynomial);
}

inline float log2(float x) { return __builtin_log2f(x); }
inline double log2(double x) { return __builtin_log2(x); }

}  // namespace
}  // namespace convit_kernels
