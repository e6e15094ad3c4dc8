// The softmax down the columns: the largest score, and the exponentials.
#pragma once

#include "blocks.h"
#include "lanes.h"

namespace convit_kernels {
namespace {

// Of each query's scores, (tokens, columns), and `seen`, the one with the largest product with `factor`.
template <bool kNegative, int kVectors, typename T>
CONVIT_INLINE void raise_to_largest(const T* scores, int64_t columns, int64_t tokens, Lanes<T, kVectors>& seen) {
  for (int64_t key = 0; key < tokens; ++key, scores += columns) {
#pragma GCC unroll 4
    for (int vector = 0; vector < kVectors; ++vector) {
      const Vector<T> score = load(scores + vector * kLanes<T>);
      seen.at[vector] = kNegative ? -at_least(-score, -seen.at[vector]) : at_least(score, seen.at[vector]);
    }
  }
}

template <int kVectors, typename T>
CONVIT_INLINE Lanes<T, kVectors> largest_of(
    const T* scores, int64_t columns, int64_t tokens, T factor, Lanes<T, kVectors> seen) {
  if (factor < 0) {
    raise_to_largest<true>(scores, columns, tokens, seen);
  } else {
    raise_to_largest<false>(scores, columns, tokens, seen);
  }
  return seen;
}

// Scores -> e = 2^(factor * (score - largest)); returns the sums of e. Subtracting first keeps differences of large
// scores exact.
template <int kVectors, typename T, int kTerms>
CONVIT_INLINE Lanes<T, kVectors> exponentials(
    T* scores, int64_t columns, int64_t tokens, T factor, const Lanes<T, kVectors>& largest,
    const T (&polynomial)[kTerms]) {
  Lanes<T, kVectors> sum{};
  for (int64_t begin = 0; begin < tokens; begin += kChunk) {  // sums of sums: what rounding adds up is shorter
    Lanes<T, kVectors> part{};
    const int64_t end = minimum(begin + kChunk, tokens);
    for (int64_t key = begin; key < end; ++key) {
#pragma GCC unroll 4
      for (int vector = 0; vector < kVectors; ++vector) {
        T* at = scores + key * columns + vector * kLanes<T>;
        const Vector<T> e = exp2<T>((load(at) - largest.at[vector]) * factor, polynomial);
        part.at[vector] += e;
        store(at, e);
      }
    }
#pragma GCC unroll 4
    for (int vector = 0; vector < kVectors; ++vector) {
      sum.at[vector] += part.at[vector];
    }
  }
  return sum;
}

}  // namespace
}  // namespace convit_kernels
