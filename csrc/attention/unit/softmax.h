// The softmax down the columns: the largest score, and the exponentials.
#pragma once

#include "blocks.h"

namespace convit_kernels {
namespace {

// Some vectors of queries side by side: what is done down the columns is done for all of them in one walk over the
// rows, whose chains of dependent operations then run beside each other.
template <typename T, int kVectors>
struct Lanes {
  Vector<T> at[kVectors];
};

template <int kVectors, typename T>
CONVIT_INLINE Lanes<T, kVectors> load_lanes(const T* from) {
  Lanes<T, kVectors> lanes;
#pragma GCC unroll 4
  for (int vector = 0; vector < kVectors; ++vector) {
    lanes.at[vector] = load(from + vector * kLanes<T>);
  }
  return lanes;
}

template <int kVectors, typename T>
CONVIT_INLINE void store_lanes(T* to, const Lanes<T, kVectors>& lanes) {
#pragma GCC unroll 4
  for (int vector = 0; vector < kVectors; ++vector) {
    store(to + vector * kLanes<T>, lanes.at[vector]);
  }
}

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

// Calls function(width, at) for groups of up to kTileVectors vectors of a panel's columns; `width` is a constant.
template <int kWidth>
struct Width {
  static constexpr int value = kWidth;
};

template <typename T, typename Function>
CONVIT_INLINE void for_each_group(int64_t columns, const Function& function) {
  int64_t at = 0;
  for (; at + 3 * kLanes<T> <= columns; at += 3 * kLanes<T>) {
    function(Width<3>{}, at);
  }
  if (at + 2 * kLanes<T> <= columns) {
    function(Width<2>{}, at);
  } else if (at < columns) {
    function(Width<1>{}, at);
  }
}

}  // namespace
}  // namespace convit_kernels
