// Products of small matrices in register tiles.
#pragma once

#include "simd.h"

namespace convit_kernels {
namespace {

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
  sum += reinterpret_cast<Vector<float> >(left & high) * reinterpret_cast<Vector<float> >(right & high);
  return sum + reinterpret_cast<Vector<float> >(left << 16) * reinterpret_cast<Vector<float> >(right << 16);
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

}  // namespace
}  // namespace convit_kernels
