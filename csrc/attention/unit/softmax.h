// The softmax down the columns: the largest score, and the exponentials.
#pragma once

#include "blocks.h"

namespace convit_kernels {
namespace {

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

}  // namespace
}  // namespace convit_kernels
