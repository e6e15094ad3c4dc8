// The attention's kernels for the CPU: one source for every instruction set. A unit defines the size of its vectors,
// CONVIT_VECTOR_BYTES, and of its register tiles, CONVIT_TILE_ROWS x CONVIT_TILE_VECTORS, and includes this file.
//
// Scores are kept with the keys as rows and a block of queries as columns. A vector then holds one key's scores for
// several queries, so that the softmax, its gradient and the positional part need no sum across a vector's lanes, and
// keys and values are read in rows, as they come.
#pragma once

#include "attention_kernels.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

#define CONVIT_INLINE inline __attribute__((always_inline))

namespace convit_kernels {
namespace {

// ---------------------------------------------------------------------------------------------------------- vectors

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

// Of one vector of queries' scores, (tokens, columns), and `seen`, the one with the largest product with `factor`.
template <typename T>
CONVIT_INLINE Vector<T> largest_of(const T* scores, int64_t columns, int64_t tokens, T factor, Vector<T> seen) {
  const T sign = factor < 0 ? T(-1) : T(1);
  Vector<T> largest = seen * sign;
  for (int64_t key = 0; key < tokens; ++key) {
    largest = at_least(load(scores + key * columns) * sign, largest);
  }
  return largest * sign;
}

template <typename T>
CONVIT_INLINE Vector<T> largest_of(const T* scores, int64_t columns, int64_t tokens, T factor) {
  return largest_of(scores + columns, columns, tokens - 1, factor, load(scores));
}

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

template <typename T>
CONVIT_INLINE Vector<T> exp2(Vector<T> t) {
  using E = Exponential<T>;
  t = at_least(broadcast(E::kLowest), t);
  const Vector<T> shifted = t + E::kMagic;
  const Vector<T> fraction = t - (shifted - E::kMagic);
  constexpr int degree = sizeof(E::kPolynomial) / sizeof(T) - 1;
  Vector<T> sum = broadcast(E::kPolynomial[degree]);
#pragma GCC unroll 16
  for (int power = degree - 1; power >= 0; --power) {
    sum = sum * fraction + E::kPolynomial[power];
  }
  using Bits = Vector<typename E::Bits>;
  return sum * reinterpret_cast<Vector<T>>(reinterpret_cast<Bits>(shifted) << E::kMantissa);
}

inline float log2(float x) { return __builtin_log2f(x); }
inline double log2(double x) { return __builtin_log2(x); }

// -------------------------------------------------------------------------------------------------- storage formats

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
  // the multiplication moves the exponent's bias, and makes subnormal numbers normal
  const float magnitude = float_of(static_cast<uint32_t>(value.bits & 0x7fff) << 13) * 0x1p112f;
  const uint32_t infinite = magnitude >= 65536.0f ? 0x7f800000u : 0u;
  return float_of(bits_of(magnitude) | infinite | sign);
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

template <typename S>
S* rows_of(const Problem& p, const Strided& tensor, int64_t image_head) {
  return static_cast<S*>(tensor.data) + image_head / p.heads * tensor.image + image_head % p.heads * tensor.head;
}

template <typename T, typename S>
CONVIT_INLINE void widen_row(const S* from, int64_t count, T* to) {
  for (int64_t channel = 0; channel < count; ++channel) {
    to[channel] = widen(from[channel]);
  }
}

#ifdef __F16C__
CONVIT_INLINE void widen_row(const Half* from, int64_t count, float* to) {
  int64_t channel = 0;
  for (; channel + 8 <= count; channel += 8) {
    _mm256_storeu_ps(to + channel, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + channel))));
  }
  for (; channel < count; ++channel) {
    to[channel] = widen(from[channel]);
  }
}
#endif

// Rows that are `stride` apart, widened, to (rows, channels); those beyond head_dim are zero.
template <typename T, typename S>
void copy_rows(const S* from, int64_t stride, int64_t rows, int64_t head_dim, T* to, int64_t channels) {
  for (int64_t row = 0; row < rows; ++row, from += stride, to += channels) {
    widen_row(from, head_dim, to);
    for (int64_t channel = head_dim; channel < channels; ++channel) {
      to[channel] = 0;
    }
  }
}

// The inverse: `count` sources of that form, `distance` apart, are added up in order and multiplied by `factor`.
template <typename T, typename S>
void write_rows(
    const T* from, int64_t channels, int64_t count, int64_t distance, T factor, S* to, int64_t stride, int64_t rows,
    int64_t head_dim) {
  for (int64_t row = 0; row < rows; ++row, from += channels, to += stride) {
    for (int64_t channel = 0; channel < head_dim; ++channel) {
      T sum = from[channel];
      for (int64_t part = 1; part < count; ++part) {
        sum += from[part * distance + channel];
      }
      narrow(sum * factor, to[channel]);
    }
  }
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define CONVIT_SHUFFLES
#endif
#endif

#ifdef CONVIT_SHUFFLES
template <int... kIndex>
struct Indices {};
template <int kCount, int... kIndex>
struct CountUp : CountUp<kCount - 1, kCount - 1, kIndex...> {};
template <int... kIndex>
struct CountUp<0, kIndex...> {
  using type = Indices<kIndex...>;
};

// Exchanges the off-diagonal quarters of blocks of 2 kStep x 2 kStep.
template <int kStep, typename V, int... kLane>
CONVIT_INLINE void exchange(V& upper, V& lower, Indices<kLane...>) {
  constexpr int lanes = sizeof...(kLane);
  const V first = __builtin_shufflevector(upper, lower, (kLane & kStep ? lanes + kLane - kStep : kLane)...);
  lower = __builtin_shufflevector(upper, lower, (kLane & kStep ? lanes + kLane : kLane + kStep)...);
  upper = first;
}

template <int kStep, typename V, int kCount>
CONVIT_INLINE void transpose_square(V (&rows)[kCount]) {
  if constexpr (kStep < kCount) {
#pragma GCC unroll 16
    for (int row = 0; row < kCount; ++row) {
      if ((row & kStep) == 0) {
        exchange<kStep>(rows[row], rows[row + kStep], typename CountUp<kCount>::type{});
      }
    }
    transpose_square<2 * kStep>(rows);
  }
}
#endif

// (rows, channels) -> (channels, columns); channels and columns are whole vectors, rows beyond the last are zero.
template <typename T>
void transpose_rows(const T* from, int64_t rows, int64_t channels, T* to, int64_t columns) {
  constexpr int lanes = kLanes<T>;
  for (int64_t row = 0; row < columns; row += lanes) {
    for (int64_t channel = 0; channel < channels; channel += lanes) {
#ifdef CONVIT_SHUFFLES
      Vector<T> square[lanes];
#pragma GCC unroll 16
      for (int lane = 0; lane < lanes; ++lane) {
        square[lane] = row + lane < rows ? load(from + (row + lane) * channels + channel) : Vector<T>{};
      }
      transpose_square<1>(square);
#pragma GCC unroll 16
      for (int lane = 0; lane < lanes; ++lane) {
        store(to + (channel + lane) * columns + row, square[lane]);
      }
#else
      for (int lane = 0; lane < lanes; ++lane) {
        for (int other = 0; other < lanes; ++other) {
          to[(channel + other) * columns + row + lane] =
              row + lane < rows ? from[(row + lane) * channels + channel + other] : T(0);
        }
      }
#endif
    }
  }
}

// --------------------------------------------------------------------------------------------------------- products

template <typename V>
CONVIT_INLINE V multiply_add(V left, V right, V sum) {
  return sum + left * right;
}

// Each element is a pair of bfloat16 numbers.
CONVIT_INLINE Vector<float> multiply_add(Vector<uint32_t> left, Vector<uint32_t> right, Vector<float> sum) {
#ifdef __AVX512BF16__
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(left), reinterpret_cast<__m512bh>(right));
#else
  const Vector<uint32_t> high = Vector<uint32_t>{} + 0xffff0000u;
  sum += reinterpret_cast<Vector<float>>(left & high) * reinterpret_cast<Vector<float>>(right & high);
  return sum + reinterpret_cast<Vector<float>>(left << 16) * reinterpret_cast<Vector<float>>(right << 16);
#endif
}

// Rounded to bfloat16, in the lower halves of the elements.
CONVIT_INLINE Vector<uint32_t> narrow_to_bfloat16(Vector<float> value) {
#ifdef __AVX512BF16__
  return reinterpret_cast<Vector<uint32_t>>(
      _mm512_maskz_cvtepu16_epi32(0xffff, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value))));
#else
  const Vector<uint32_t> bits = reinterpret_cast<Vector<uint32_t>>(value);
  const Vector<uint32_t> is_nan = reinterpret_cast<Vector<uint32_t>>(value != value);
  return (((bits + 0x7fff + (bits >> 16 & 1)) >> 16) & ~is_nan) | (is_nan & 0x7fc0);
#endif
}

// One register tile of c (+)= a b, with a (rows, depth), or (depth, rows) where kTransposed, and b (depth, channels).
// The operands are numbers or pairs of them.
template <int kRows, int kVectors, bool kTransposed, bool kAdd, typename T, typename Operand>
CONVIT_INLINE void multiply_tile(
    const Operand* a, int64_t a_stride, const Operand* b, int64_t b_stride, T* c, int64_t c_stride, int64_t depth) {
  constexpr int lanes = kLanes<T>;
  Vector<T> sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int vector = 0; vector < kVectors; ++vector) {
      sum[row][vector] = Vector<T>{};
    }
  }
  for (int64_t step = 0; step < depth; ++step) {
    Vector<Operand> right[kVectors];
#pragma GCC unroll 4
    for (int vector = 0; vector < kVectors; ++vector) {
      right[vector] = load(b + vector * lanes);
    }
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      const Vector<Operand> left = broadcast(kTransposed ? a[row] : a[row * a_stride]);
#pragma GCC unroll 4
      for (int vector = 0; vector < kVectors; ++vector) {
        sum[row][vector] = multiply_add(left, right[vector], sum[row][vector]);
      }
    }
    a += kTransposed ? a_stride : 1;
    b += b_stride;
  }
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int vector = 0; vector < kVectors; ++vector) {
      T* to = c + row * c_stride + vector * lanes;
      // added last: rounding of a long sum is that of its parts and of their sum
      store(to, kAdd ? load(to) + sum[row][vector] : sum[row][vector]);
    }
  }
}

template <int kRows, bool kTransposed, bool kAdd, typename T, typename Operand>
void multiply_rows(
    const Operand* a, int64_t a_stride, const Operand* b, int64_t b_stride, T* c, int64_t c_stride, int64_t rows,
    int64_t vectors, int64_t depth) {
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      multiply_rows<kRows - 1, kTransposed, kAdd>(a, a_stride, b, b_stride, c, c_stride, rows, vectors, depth);
      return;
    }
  }
  // tiles of nearly the same width: a narrow one has too few sums to keep the multipliers busy
  for (int64_t tiles = ceil_div(vectors, kTileVectors); tiles > 0; --tiles) {
    const int64_t width = ceil_div(vectors, tiles);
    if (width == 1) {
      multiply_tile<kRows, 1, kTransposed, kAdd>(a, a_stride, b, b_stride, c, c_stride, depth);
    } else if (width == 2) {
      multiply_tile<kRows, 2, kTransposed, kAdd>(a, a_stride, b, b_stride, c, c_stride, depth);
    } else {
      multiply_tile<kRows, 3, kTransposed, kAdd>(a, a_stride, b, b_stride, c, c_stride, depth);
    }
    vectors -= width;
    b += width * kLanes<T>;
    c += width * kLanes<T>;
  }
}

template <bool kTransposed, bool kAdd, typename T, typename Operand>
void multiply(
    const Operand* a, int64_t a_stride, const Operand* b, int64_t b_stride, T* c, int64_t c_stride, int64_t rows,
    int64_t vectors, int64_t depth) {
  static_assert(kTileVectors <= 3, "multiply_rows knows tiles of up to three vectors");
  for (int64_t row = 0; row < rows; row += kTileRows) {
    multiply_rows<kTileRows, kTransposed, kAdd>(
        a + row * (kTransposed ? 1 : a_stride), a_stride, b, b_stride, c + row * c_stride, c_stride,
        minimum(kTileRows, rows - row), vectors, depth);
  }
}

// ------------------------------------------------------------------------------------------------ blocks and memory

// Hands out a thread's memory piece by piece; from null it only counts.
class Memory {
 public:
  explicit Memory(void* start) : start_(static_cast<char*>(start)) {}

  template <typename T>
  T* take(int64_t count) {
    T* piece = start_ == nullptr ? nullptr : reinterpret_cast<T*>(start_ + used_);
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return piece;
  }

  int64_t used() const { return used_; }

 private:
  char* start_;
  int64_t used_ = 0;
};

// The queries of one image, in blocks of whole vectors and nearly equal size.
template <typename T>
struct QueryBlocks {
  int64_t tokens, vectors, count, largest;

  QueryBlocks(int64_t tokens, int64_t most_vectors)
      : tokens(tokens), vectors(ceil_div(tokens, kLanes<T>)), count(ceil_div(vectors, most_vectors)),
        largest(ceil_div(vectors, count) * kLanes<T>) {}

  int64_t begin(int64_t block) const {
    return kLanes<T> * (block * (vectors / count) + minimum(block, vectors % count));
  }
  int64_t columns(int64_t block) const { return begin(block + 1) - begin(block); }
  int64_t rows(int64_t block) const { return minimum(columns(block), tokens - begin(block)); }
};

// Keys are taken in chunks whose values and scores stay in the first-level cache.
constexpr int64_t kChunk = 96;

struct KeyChunks {
  int64_t tokens, size;

  explicit KeyChunks(int64_t tokens)
      : tokens(tokens), size(round_up(ceil_div(tokens, ceil_div(tokens, kChunk)), kTileRows)) {}

  int64_t rows(int64_t begin) const { return minimum(size, tokens - begin); }
};

// Scores -> e = 2^(factor * (score - largest)), for one vector of queries; returns the sums of e. Subtracting first
// keeps differences of large scores exact.
template <typename T>
CONVIT_INLINE Vector<T> exponentials(T* scores, int64_t columns, int64_t tokens, T factor, Vector<T> largest) {
  Vector<T> sum{};
  for (int64_t begin = 0; begin < tokens; begin += kChunk) {  // sums of sums: what rounding adds up is shorter
    Vector<T> part{};
    const int64_t end = minimum(begin + kChunk, tokens);
#pragma GCC unroll 4
    for (int64_t key = begin; key < end; ++key) {
      T* at = scores + key * columns;
      const Vector<T> e = exp2<T>((load(at) - largest) * factor);
      part += e;
      store(at, e);
    }
    sum += part;
  }
  return sum;
}

// A block's queries: the grid's coordinates of each of them, (columns,) each.
template <typename T>
void fill_coordinates(int64_t begin, int64_t columns, int64_t width, T* x, T* y) {
  int64_t column = begin % width, row = begin / width;
  for (int64_t query = 0; query < columns; ++query) {
    x[query] = static_cast<T>(column);
    y[query] = static_cast<T>(row);
    if (++column == width) {
      column = 0;
      ++row;
    }
  }
}

// One axis's factor of the positional attention: (length, columns), the softmax over the keys along that axis of
// linear * offset + quadratic * offset^2, offset = key - query. With kMoments there follow two more of that size, the
// factor times (offset - its mean) and times (offset^2 - its mean): relative to the query, coordinates cancel least.
template <bool kMoments = false, typename T>
void fill_factor(T linear, T quadratic, int64_t length, const T* queries, int64_t columns, T* to) {
  for (int64_t at = 0; at < columns; at += kLanes<T>) {
    const Vector<T> query = load(queries + at);
    T* factor = to + at;
    for (int64_t key = 0; key < length; ++key) {
      const Vector<T> offset = static_cast<T>(key) - query;
      store(factor + key * columns, offset * (linear + quadratic * offset));
    }
    const T base = static_cast<T>(kLog2E);
    const Vector<T> largest = largest_of(factor, columns, length, base);
    const Vector<T> scale = 1 / exponentials(factor, columns, length, base, largest);
    Vector<T> mean{}, mean_square{};
    for (int64_t key = 0; key < length; ++key) {
      const Vector<T> offset = static_cast<T>(key) - query;
      const Vector<T> value = load(factor + key * columns) * scale;
      store(factor + key * columns, value);
      mean += value * offset;
      mean_square += value * offset * offset;
    }
    for (int64_t key = 0; kMoments && key < length; ++key) {
      const Vector<T> offset = static_cast<T>(key) - query;
      const Vector<T> value = load(factor + key * columns);
      store(factor + (length + key) * columns, value * (offset - mean));
      store(factor + (2 * length + key) * columns, value * (offset * offset - mean_square));
    }
  }
}

// ---------------------------------------------------------------------------------------------------------- forward

// The operands of the forward's products: numbers in the type that is computed in.
template <typename T, typename S>
struct Numbers {
  using Compute = T;
  using Operand = T;
  static constexpr int kGroup = 1;  // numbers in an operand

  static void copy_rows(const S* from, int64_t stride, int64_t rows, int64_t head_dim, T* to, int64_t channels) {
    convit_kernels::copy_rows(from, stride, rows, head_dim, to, channels);
  }
  static void copy_values(const S* from, int64_t stride, int64_t rows, int64_t head_dim, T* to, int64_t channels) {
    copy_rows(from, stride, rows, head_dim, to, channels);
  }
  static Vector<T> value(const T* values, int64_t key, int64_t channels) { return load(values + key * channels); }
  static const T* map(const T* scores, int64_t, int64_t, T*) { return scores; }
};

// Pairs of bfloat16 numbers, for instructions that add the products of two pairs to a float: of adjacent channels in
// queries and keys, of adjacent keys in the map and the values. An odd last one has a zero beside it.
struct Pairs {
  using Compute = float;
  using Operand = uint32_t;
  static constexpr int kGroup = 2;

  static void copy_rows(
      const BFloat16* from, int64_t stride, int64_t rows, int64_t head_dim, uint32_t* to, int64_t depth) {
    for (int64_t row = 0; row < rows; ++row, from += stride, to += depth) {
      for (int64_t pair = 0; pair < head_dim / 2; ++pair) {
        to[pair] = joined(from[2 * pair], from[2 * pair + 1]);
      }
      for (int64_t pair = head_dim / 2; pair < depth; ++pair) {
        to[pair] = 2 * pair < head_dim ? joined(from[2 * pair], BFloat16{0}) : 0;
      }
    }
  }

  static void copy_values(
      const BFloat16* from, int64_t stride, int64_t rows, int64_t head_dim, uint32_t* to, int64_t channels) {
    for (int64_t row = 0; row < rows; row += 2, from += 2 * stride, to += channels) {
      for (int64_t channel = 0; channel < head_dim; ++channel) {
        to[channel] = joined(from[channel], row + 1 < rows ? from[stride + channel] : BFloat16{0});
      }
      for (int64_t channel = head_dim; channel < channels; ++channel) {
        to[channel] = 0;
      }
    }
  }

  static Vector<float> value(const uint32_t* values, int64_t key, int64_t channels) {
    const Vector<uint32_t> pair = load(values + key / 2 * channels);
    return reinterpret_cast<Vector<float>>(key % 2 == 0 ? pair << 16 : pair & 0xffff0000u);
  }

  static const uint32_t* map(const float* scores, int64_t columns, int64_t keys, uint32_t* to) {
    constexpr int lanes = kLanes<float>;
    for (int64_t key = 0; key < keys; key += 2, scores += 2 * columns) {
      for (int64_t at = 0; at < columns; at += lanes) {
        const Vector<float> odd = key + 1 < keys ? load(scores + columns + at) : Vector<float>{};
        store(to + key / 2 * columns + at, narrow_to_bfloat16(load(scores + at)) | narrow_to_bfloat16(odd) << 16);
      }
    }
    return to;
  }

 private:
  static uint32_t joined(BFloat16 even, BFloat16 odd) { return even.bits | static_cast<uint32_t>(odd.bits) << 16; }
};

// A thread's memory for the forward, in one of two ways. Whole: a block has the scores of all keys, so that position is
// mixed into the normalised map before its one product with the values. Chunked, for more tokens than that pays for: a
// block has those of one chunk of keys and a running maximum, and position, the sum of whose products along each axis
// is then cheap, has a sum of its own.
template <typename Operands>
struct ForwardMemory {
  using T = typename Operands::Compute;
  using Operand = typename Operands::Operand;

  bool chunked;
  int64_t channels;  // head_dim in whole vectors
  int64_t depth;     // head_dim in whole vectors of operands
  QueryBlocks<T> blocks;
  KeyChunks chunks;
  bool resident;  // all keys and values fit, and are copied once for many blocks; else chunk by chunk
  Operand *keys, *values, *queries, *transposed, *map;
  T *scores, *out, *x, *y, *row_factor, *col_factor;
  T *largest, *sum, *shrink;  // chunked: of each query, so far, and what the last chunk changed
  T* along_y;                 // chunked: of each grid row in the block and each column of keys, values summed along y
  int64_t bytes;

  ForwardMemory(const Problem& p, void* start) : ForwardMemory(p, start, chunks_pay(p)) {}

 private:
  static constexpr int64_t kMost = 2'000'000;

  ForwardMemory(const Problem& p, void* start, bool chunked)
      : chunked(chunked), channels(round_up(p.head_dim, kLanes<T>)),
        depth(round_up(ceil_div(p.head_dim, Operands::kGroup), kLanes<T>)),
        blocks(p.height * p.width, chunked ? chunked_vectors(p) : whole_vectors(p)), chunks(p.height * p.width) {
    const int64_t tokens = p.height * p.width, columns = blocks.largest;
    Memory memory(start);
    const int64_t panel = minimum(columns, kTileVectors * kLanes<T>);
    queries = memory.take<Operand>(panel * depth);
    transposed = memory.take<Operand>(columns * depth);
    map = memory.take<Operand>(Operands::kGroup == 1 ? 0 : chunks.size * panel);
    out = memory.take<T>(columns * channels);
    scores = memory.take<T>((chunked ? chunks.size : tokens) * panel);
    x = memory.take<T>(columns);
    y = memory.take<T>(columns);
    row_factor = memory.take<T>(p.height * columns);
    col_factor = memory.take<T>(p.width * columns);
    largest = memory.take<T>(columns);
    sum = memory.take<T>(columns);
    shrink = memory.take<T>(columns);
    along_y = memory.take<T>(chunked ? (ceil_div(columns - 1, p.width) + 1) * p.width * channels : 0);
    const int64_t all = tokens * (depth + channels) * static_cast<int64_t>(sizeof(T));
    resident = !chunked && memory.used() + all < kMost;
    const int64_t copied = resident ? tokens : chunks.size;
    keys = memory.take<Operand>(copied * depth);
    values = memory.take<Operand>(ceil_div(copied, Operands::kGroup) * channels);
    bytes = memory.used();
  }

  // Measured on Zen 3. Not on narrow grids: each grid row that a block touches adds a pass over the values.
  static bool chunks_pay(const Problem& p) {
    return p.height * p.width >= 1536 && p.width >= 8 && ForwardMemory(p, nullptr, true).bytes <= kMost;
  }

  // The more queries, the fewer times keys and values are read, for as long as queries and outputs stay in the caches.
  static int64_t chunked_vectors(const Problem& p) {
    const int64_t wanted = minimum(384, maximum(192, p.height * p.width / 16)) / kLanes<T>;
    return maximum(kTileVectors, minimum(wanted, (1 << 17) / (round_up(p.head_dim, kLanes<T>) * kVectorBytes)));
  }

  // As many as one tile is wide, fewer where all scores of a block would take more than a megabyte.
  static int64_t whole_vectors(const Problem& p) {
    const int64_t rows = p.height * p.width + p.height + p.width;
    return maximum(1, minimum(kTileVectors, (17 << 16) / (rows * kVectorBytes)));
  }
};

// The keys and values of one image and head, as operands of products: chunk by chunk, or all from the beginning.
template <typename Operands, typename S>
class KeysAndValues {
  using Operand = typename Operands::Operand;

 public:
  KeysAndValues(const Forward& p, int64_t image_head, const ForwardMemory<Operands>& m)
      : memory_(m), head_dim_(p.head_dim), k_stride_(p.k.token), v_stride_(p.v.token),
        k_(rows_of<S>(p, p.k, image_head)), v_(rows_of<S>(p, p.v, image_head)) {
    if (m.resident) {
      const int64_t tokens = p.height * p.width;
      Operands::copy_rows(k_, k_stride_, tokens, head_dim_, m.keys, m.depth);
      Operands::copy_values(v_, v_stride_, tokens, head_dim_, m.values, m.channels);
    }
  }

  const Operand* keys(int64_t begin, int64_t rows) const {
    if (memory_.resident) {
      return memory_.keys + begin * memory_.depth;
    }
    Operands::copy_rows(k_ + begin * k_stride_, k_stride_, rows, head_dim_, memory_.keys, memory_.depth);
    return memory_.keys;
  }

  const Operand* values(int64_t begin, int64_t rows) const {
    if (memory_.resident) {
      return memory_.values + begin / Operands::kGroup * memory_.channels;
    }
    Operands::copy_values(v_ + begin * v_stride_, v_stride_, rows, head_dim_, memory_.values, memory_.channels);
    return memory_.values;
  }

  // Brings part `index` of `count` of the rows [begin, end) into the caches, while others are worked on.
  // Inlined by force: GCC drops calls of functions that only prefetch.
  CONVIT_INLINE void prefetch(int64_t begin, int64_t end, int64_t index, int64_t count) const {
    constexpr int64_t line = 64 / sizeof(S);
    const int64_t rows = maximum(0, end - begin);
    for (int64_t row = begin + rows * index / count; row < begin + rows * (index + 1) / count; ++row) {
      for (int64_t channel = 0; channel < head_dim_; channel += line) {
        __builtin_prefetch(k_ + row * k_stride_ + channel);
        __builtin_prefetch(v_ + row * v_stride_ + channel);
      }
    }
  }

 private:
  const ForwardMemory<Operands>& memory_;
  const int64_t head_dim_, k_stride_, v_stride_;
  const S *k_, *v_;
};

// e -> the mixed map, for the keys [begin, end) and one vector of queries.
template <typename T>
CONVIT_INLINE void mix(
    T* scores, int64_t score_columns, const T* row_factor, const T* col_factor, int64_t columns, int64_t begin,
    int64_t end, int64_t width, Vector<T> content, T gate) {
  int64_t key = begin;
  for (int64_t y = begin / width; key < end; ++y) {
    const Vector<T> row = load(row_factor + y * columns) * gate;
    const int64_t stop = minimum(end, (y + 1) * width);
    for (const T* col = col_factor + (key - y * width) * columns; key < stop; ++key, col += columns) {
      store(scores, load(scores) * content + row * load(col));
      scores += score_columns;
    }
  }
}

// One block of queries of the forward.
template <typename Operands, typename S>
struct ForwardBlock {
  using T = typename Operands::Compute;
  using Operand = typename Operands::Operand;
  static constexpr int kLane = kLanes<T>, kGroup = Operands::kGroup;

  const Problem& p;
  const ForwardMemory<Operands>& m;
  const KeysAndValues<Operands, S>& source;
  const int64_t begin, rows, columns;
  const T gate, factor;

  void load_queries(const S* q) const {
    for (int64_t index = 0; index < panels(); ++index) {
      const Panel at = panel(index);
      Operands::copy_rows(q + (begin + at.begin) * p.q.token, p.q.token, at.rows, p.head_dim, m.queries, m.depth);
      transpose_rows(m.queries, at.rows, m.depth, m.transposed + at.begin * m.depth, at.columns);
    }
  }

  void whole() const {
    const int64_t tokens = p.height * p.width;
    const Panel all = panel(0);  // a block is no larger
    for (int64_t key = 0; key < tokens; key += m.chunks.size) {
      const int64_t keys = m.chunks.rows(key);
      score(all, source.keys(key, keys), keys, m.scores + key * columns);
    }
    for (int64_t at = 0; at < columns; at += kLane) {
      const Vector<T> largest = largest_of(m.scores + at, columns, tokens, factor);
      store(m.largest + at, largest);
      store(m.sum + at, exponentials(m.scores + at, columns, tokens, factor, largest));
    }
    for (int64_t key = 0; key < tokens; key += m.chunks.size) {
      const int64_t keys = m.chunks.rows(key);
      add_mixed(all, m.scores + key * columns, key, keys, source.values(key, keys));
    }
  }

  void chunked() const {
    const int64_t first_row = begin / p.width, grid_rows = (begin + rows - 1) / p.width - first_row + 1;
    const auto first_query = [&](int64_t row) { return maximum(0, (first_row + row) * p.width - begin); };
    for (int64_t at = 0; at < grid_rows * p.width * m.channels; at += kLane) {
      store(m.along_y + at, Vector<T>{});
    }
    for_each_chunk(
        [&](Panel panel, int64_t key, int64_t keys, const Operand* k, const Operand* v) {
          score(panel, k, keys, m.scores);
          update_softmax(panel, key, keys);
          add_values(panel, m.scores, key, keys, v);
        },
        [&](int64_t key, int64_t keys, const Operand* v) {
          for (int64_t row = 0; row < grid_rows; ++row) {
            add_along_y(v, key, keys, m.row_factor + first_query(row), m.along_y + row * p.width * m.channels);
          }
        });
    for (int64_t query = 0; query < rows; ++query) {
      scale_row(query, (1 - gate) / m.sum[query]);
    }
    for (int64_t row = 0; row < grid_rows; ++row) {
      const int64_t query = first_query(row), end = minimum(rows, first_query(row + 1));
      multiply<true, true>(
          m.col_factor + query, columns, m.along_y + row * p.width * m.channels, m.channels, m.out + query * m.channels,
          m.channels, end - query, m.channels / kLane, p.width);
    }
    if (!is_finite()) {  // the sums apart may have been, or may have made NaN of the map's zero and infinity
      for_each_chunk(
          [&](Panel panel, int64_t key, int64_t keys, const Operand* k, const Operand* v) {
            score(panel, k, keys, m.scores);
            for (int64_t at = 0; at < panel.columns; at += kLane) {
              exponentials(m.scores + at, panel.columns, keys, factor, load(m.largest + panel.begin + at));
            }
            add_mixed(panel, m.scores, key, keys, v);
          },
          [](int64_t, int64_t, const Operand*) {});
    }
  }

 private:
  // Columns whose scores of a chunk of keys stay in the first-level cache.
  struct Panel {
    int64_t begin, columns, rows;
  };

  int64_t panels() const { return ceil_div(columns, kTileVectors * kLane); }

  Panel panel(int64_t index) const {
    const auto begin_of = [&](int64_t i) { return columns / kLane * i / panels() * kLane; };
    const int64_t begin = begin_of(index), end = begin_of(index + 1);
    return {begin, end - begin, minimum(end, rows) - begin};
  }

  // Calls function(panel, key, keys, k, v) for every chunk of keys and every panel of columns, then
  // after_chunk(key, keys, v).
  template <typename Function, typename AfterChunk>
  void for_each_chunk(const Function& function, const AfterChunk& after_chunk) const {
    const int64_t tokens = p.height * p.width;
    for (int64_t key = 0; key < tokens; key += m.chunks.size) {
      const int64_t keys = m.chunks.rows(key), next = key + keys;
      const Operand *k = source.keys(key, keys), *v = source.values(key, keys);
      for (int64_t index = 0; index < panels(); ++index) {
        source.prefetch(next, minimum(next + m.chunks.size, tokens), index, panels());
        function(panel(index), key, keys, k, v);
      }
      after_chunk(key, keys, v);
    }
  }

  // The scores of a chunk of keys.
  void score(Panel panel, const Operand* keys, int64_t count, T* to) const {
    multiply<false, false>(
        keys, m.depth, m.transposed + panel.begin * m.depth, panel.columns, to, panel.columns, count,
        panel.columns / kLane, ceil_div(p.head_dim, kGroup));
  }

  // Adds a map's product with the values of a chunk of keys, the first of which sets the sum.
  void add_values(Panel panel, const T* map, int64_t key, int64_t keys, const Operand* values) const {
    const auto product = key == 0 ? multiply<true, false, T, Operand> : multiply<true, true, T, Operand>;
    product(
        Operands::map(map, panel.columns, keys, m.map), panel.columns, values, m.channels,
        m.out + panel.begin * m.channels, m.channels, panel.rows, m.channels / kLane, ceil_div(keys, kGroup));
  }

  // A chunk's e -> its part of the output.
  void add_mixed(Panel panel, T* e, int64_t key, int64_t keys, const Operand* values) const {
    for (int64_t at = 0; at < panel.columns; at += kLane) {
      const int64_t query = panel.begin + at;
      mix(e + at, panel.columns, m.row_factor + query, m.col_factor + query, columns, key, key + keys, p.width,
          (1 - gate) / load(m.sum + query), gate);
    }
    add_values(panel, e, key, keys, values);
  }

  // A chunk's scores -> e relative to the largest score so far, to which the sums until now are brought, too.
  void update_softmax(Panel panel, int64_t key, int64_t keys) const {
    // finite: of scores that are all -inf until now the sum is zero
    const T lowest = factor < 0 ? Exponential<T>::kLargest : -Exponential<T>::kLargest;
    for (int64_t at = 0; at < panel.columns; at += kLane) {
      T* scores = m.scores + at;
      const int64_t query = panel.begin + at;
      const Vector<T> before = key == 0 ? broadcast(lowest) : load(m.largest + query);
      const Vector<T> largest = largest_of(scores, panel.columns, keys, factor, before);
      const Vector<T> part = exponentials(scores, panel.columns, keys, factor, largest);
      const Vector<T> shrink = exp2<T>((before - largest) * factor);
      store(m.largest + query, largest);
      store(m.shrink + query, shrink);
      store(m.sum + query, key == 0 ? part : load(m.sum + query) * shrink + part);
    }
    for (int64_t query = panel.begin; key > 0 && query < panel.begin + panel.rows; ++query) {
      if (m.shrink[query] != 1) {
        scale_row(query, m.shrink[query]);
      }
    }
  }

  // Adds the values of some keys, times one query's row factor and the gate, to those of the other keys in their
  // column.
  void add_along_y(const Operand* values, int64_t begin, int64_t keys, const T* row_factor, T* along_y) const {
    int64_t x = begin % p.width, y = begin / p.width;
    for (int64_t key = 0; key < keys; ++key) {
      const T weight = row_factor[y * columns] * gate;
      T* to = along_y + x * m.channels;
      for (int64_t channel = 0; channel < m.channels; channel += kLane) {
        store(to + channel, load(to + channel) + Operands::value(values + channel, key, m.channels) * weight);
      }
      if (++x == p.width) {
        x = 0;
        ++y;
      }
    }
  }

  void scale_row(int64_t query, T scale) const {
    T* row = m.out + query * m.channels;
    for (int64_t channel = 0; channel < m.channels; channel += kLane) {
      store(row + channel, load(row + channel) * scale);
    }
  }

  bool is_finite() const {
    Vector<T> zeros{};
    for (int64_t at = 0; at < rows * m.channels; at += kLane) {
      zeros += load(m.out + at) * T(0);
    }
    T zero = 0;
    for (int lane = 0; lane < kLane; ++lane) {
      zero += zeros[lane];
    }
    return zero == 0;
  }
};

template <typename Operands, typename S>
void forward(const Forward& p, int64_t image_head, int64_t block_begin, int64_t block_end, void* start) {
  using T = typename Operands::Compute;
  const ForwardMemory<Operands> m(p, start);
  const KeysAndValues<Operands, S> source(p, image_head, m);
  const int64_t head = image_head % p.heads;
  const T gate = static_cast<const T*>(p.gate)[head], factor = static_cast<T>(p.scale * kLog2E);
  const T* pos_weight = static_cast<const T*>(p.pos_weight) + 3 * head;
  S* out = rows_of<S>(p, p.out, image_head);

  for (int64_t index = block_begin; index < block_end; ++index) {
    const int64_t begin = m.blocks.begin(index), rows = m.blocks.rows(index), columns = m.blocks.columns(index);
    fill_coordinates(begin, columns, p.width, m.x, m.y);
    fill_factor(pos_weight[0], pos_weight[2], p.width, m.x, columns, m.col_factor);
    fill_factor(pos_weight[1], pos_weight[2], p.height, m.y, columns, m.row_factor);
    const ForwardBlock<Operands, S> block{p, m, source, begin, rows, columns, gate, factor};
    block.load_queries(rows_of<S>(p, p.q, image_head));
    if (m.chunked) {
      block.chunked();
    } else {
      block.whole();
    }
    if (p.lse != nullptr) {
      T* lse = static_cast<T*>(p.lse) + image_head * p.height * p.width + begin;
      for (int64_t query = 0; query < rows; ++query) {
        lse[query] = m.largest[query] * static_cast<T>(p.scale) + log2(m.sum[query]) * static_cast<T>(kLn2);
      }
    }
    write_rows(m.out, m.channels, 1, 0, T(1), out + begin * p.out.token, p.out.token, rows, p.head_dim);
  }
}

template <typename Operands>
Plan forward_plan(const Problem& p) {
  const ForwardMemory<Operands> memory(p, nullptr);
  return {memory.blocks.count, memory.bytes};
}

// --------------------------------------------------------------------------------------------------------- backward

// dk and dv of one image and head, as they are added up: (tokens, channels) each.
template <typename T>
int64_t accumulator_size(const Problem& p) {
  return p.height * p.width * round_up(p.head_dim, kLanes<T>);
}

template <typename T>
struct BackwardMemory {
  int64_t channels;
  QueryBlocks<T> blocks;
  KeyChunks chunks;
  T *keys, *values, *queries, *d_out, *transposed, *scores, *d_scores, *dq, *x, *y, *row_factor, *col_factor;
  int64_t bytes;

  BackwardMemory(const Problem& p, void* start)
      : channels(round_up(p.head_dim, kLanes<T>)), blocks(p.height * p.width, block_vectors(p)),
        chunks(p.height * p.width) {
    const int64_t tokens = p.height * p.width, columns = blocks.largest;
    Memory memory(start);
    keys = memory.take<T>(tokens * channels);
    values = memory.take<T>(tokens * channels);
    queries = memory.take<T>(columns * channels);
    d_out = memory.take<T>(columns * channels);
    transposed = memory.take<T>(columns * channels);
    dq = memory.take<T>(columns * channels);
    scores = memory.take<T>(tokens * columns);
    d_scores = memory.take<T>(tokens * columns);
    x = memory.take<T>(columns);
    y = memory.take<T>(columns);
    row_factor = memory.take<T>(3 * p.height * columns);
    col_factor = memory.take<T>(3 * p.width * columns);
    bytes = memory.used();
  }

  // The more queries, the fewer times dk and dv are read and written; fewer where the scores would take megabytes.
  static int64_t block_vectors(const Problem& p) {
    const int64_t rows = 2 * p.height * p.width + 3 * (p.height + p.width);
    return maximum(kTileVectors, minimum(3 * kTileVectors, (1 << 21) / (rows * kVectorBytes)));
  }
};

// Turns one vector of queries' scores and the gradients of the map into the mixed map A and the gradients of the
// scores, in place, and adds to the gradients of the positional weights and the gate, before their factors.
template <typename T>
void softmax_backward(
    T* scores, T* d_scores, const T* row_factor, const T* col_factor, int64_t columns, int64_t height, int64_t width,
    T score_factor, T gate, ScalarGradients& sums) {
  const int64_t row_table = height * columns, col_table = width * columns;
  // not from the forward's log-sum-exp: that of large logits has lost digits which their differences still have
  const Vector<T> largest = largest_of(scores, columns, height * width, score_factor);
  const Vector<T> inverse = 1 / exponentials(scores, columns, height * width, score_factor, largest);

  Vector<T> content_sum{}, position_sum{}, along_x{}, along_y{}, squares{};
  for (int64_t y = 0; y < height; ++y) {
    Vector<T> content{}, plain{}, linear{}, quadratic{};
    const int64_t row = y * width * columns;
    for (int64_t x = 0; x < width * columns; x += columns) {
      const Vector<T> d_map = load(d_scores + row + x);
      content += load(scores + row + x) * d_map;
      plain += load(col_factor + x) * d_map;
      linear += load(col_factor + col_table + x) * d_map;
      quadratic += load(col_factor + 2 * col_table + x) * d_map;
    }
    content_sum += content;
    const T* factor = row_factor + y * columns;
    position_sum += load(factor) * plain;
    along_x += load(factor) * linear;
    along_y += load(factor + row_table) * plain;
    squares += load(factor) * quadratic + load(factor + 2 * row_table) * plain;
  }
  content_sum *= inverse;
  for (int lane = 0; lane < kLanes<T>; ++lane) {
    sums.pos_weight[0] += along_x[lane];
    sums.pos_weight[1] += along_y[lane];
    sums.pos_weight[2] += squares[lane];
    sums.gate += position_sum[lane] - content_sum[lane];
  }

  const Vector<T> content = (1 - gate) * inverse;
  for (int64_t y = 0; y < height; ++y) {
    const Vector<T> factor = load(row_factor + y * columns) * gate;
    const int64_t row = y * width * columns;
    for (int64_t x = 0; x < width * columns; x += columns) {
      const Vector<T> map = load(scores + row + x) * content;
      store(d_scores + row + x, map * (load(d_scores + row + x) - content_sum));
      store(scores + row + x, map + factor * load(col_factor + x));
    }
  }
}

template <typename T, typename S>
void backward(
    const Backward& p, int64_t image_head, int64_t block_begin, int64_t block_end, void* accumulator,
    ScalarGradients* sums, void* start) {
  constexpr int lanes = kLanes<T>;
  const BackwardMemory<T> m(p, start);
  const int64_t head = image_head % p.heads, tokens = p.height * p.width;
  const int64_t channels = m.channels, head_dim = p.head_dim;
  const T gate = static_cast<const T*>(p.gate)[head], factor = static_cast<T>(p.scale * kLog2E);
  const T* pos_weight = static_cast<const T*>(p.pos_weight) + 3 * head;
  const S* q = rows_of<S>(p, p.q, image_head);
  const S* d_out = rows_of<S>(p, p.d_out, image_head);
  S* dq = rows_of<S>(p, p.dq, image_head);
  T* dk = static_cast<T*>(accumulator);
  T* dv = dk + accumulator_size<T>(p);
  *sums = {};
  copy_rows(rows_of<S>(p, p.k, image_head), p.k.token, tokens, head_dim, m.keys, channels);
  copy_rows(rows_of<S>(p, p.v, image_head), p.v.token, tokens, head_dim, m.values, channels);

  for (int64_t block = block_begin; block < block_end; ++block) {
    const int64_t begin = m.blocks.begin(block), rows = m.blocks.rows(block), columns = m.blocks.columns(block);
    copy_rows(q + begin * p.q.token, p.q.token, rows, head_dim, m.queries, channels);
    transpose_rows(m.queries, rows, channels, m.transposed, columns);
    multiply<false, false>(
        m.keys, channels, m.transposed, columns, m.scores, columns, tokens, columns / lanes, head_dim);
    copy_rows(d_out + begin * p.d_out.token, p.d_out.token, rows, head_dim, m.d_out, channels);
    transpose_rows(m.d_out, rows, channels, m.transposed, columns);
    multiply<false, false>(
        m.values, channels, m.transposed, columns, m.d_scores, columns, tokens, columns / lanes, head_dim);

    fill_coordinates(begin, columns, p.width, m.x, m.y);
    fill_factor<true>(pos_weight[0], pos_weight[2], p.width, m.x, columns, m.col_factor);
    fill_factor<true>(pos_weight[1], pos_weight[2], p.height, m.y, columns, m.row_factor);
    for (int64_t at = 0; at < columns; at += lanes) {
      softmax_backward(
          m.scores + at, m.d_scores + at, m.row_factor + at, m.col_factor + at, columns, p.height, p.width, factor,
          gate, *sums);
    }

    const auto accumulate = block == block_begin ? multiply<false, false, T, T> : multiply<false, true, T, T>;
    accumulate(m.scores, columns, m.d_out, channels, dv, channels, tokens, channels / lanes, rows);
    accumulate(m.d_scores, columns, m.queries, channels, dk, channels, tokens, channels / lanes, rows);
    for (int64_t key = 0; key < tokens; key += m.chunks.size) {
      const auto product = key == 0 ? multiply<true, false, T, T> : multiply<true, true, T, T>;
      product(
          m.d_scores + key * columns, columns, m.keys + key * channels, channels, m.dq, channels, rows,
          channels / lanes, m.chunks.rows(key));
    }
    write_rows(m.dq, channels, 1, 0, static_cast<T>(p.scale), dq + begin * p.dq.token, p.dq.token, rows, head_dim);
  }
  for (double& sum : sums->pos_weight) {
    sum *= gate;
  }
  sums->gate *= static_cast<double>(gate) * (1 - gate);
}

template <typename T, typename S>
void backward_finish(const Backward& p, int64_t image_head, const void* accumulators, int64_t count) {
  const int64_t tokens = p.height * p.width, size = accumulator_size<T>(p);
  const T* dk = static_cast<const T*>(accumulators);
  const auto write = [&](const T* from, T factor, const Strided& to) {
    write_rows(
        from, size / tokens, count, 2 * size, factor, rows_of<S>(p, to, image_head), to.token, tokens, p.head_dim);
  };
  write(dk, static_cast<T>(p.scale), p.dk);
  write(dk + size, T(1), p.dv);
}

template <typename T>
Plan backward_plan(const Problem& p) {
  const BackwardMemory<T> memory(p, nullptr);
  return {memory.blocks.count, memory.bytes};
}

template <typename T>
int64_t accumulator_bytes(const Problem& p) {
  return 2 * accumulator_size<T>(p) * static_cast<int64_t>(sizeof(T));
}

// --------------------------------------------------------------------------------------------------------- the unit

template <typename T, typename S, typename Operands = Numbers<T, S>>
constexpr DtypeKernels dtype_kernels() {
  return {
      {forward_plan<Operands>, forward<Operands, S>},
      {backward_plan<T>, accumulator_bytes<T>, backward<T, S>, backward_finish<T, S>}};
}

template <typename = void>
constexpr AttentionKernels attention_kernels() {
  return {
      dtype_kernels<float, float>(), dtype_kernels<double, double>(), dtype_kernels<float, BFloat16>(),
      dtype_kernels<float, Half>()};
}

}  // namespace
}  // namespace convit_kernels
