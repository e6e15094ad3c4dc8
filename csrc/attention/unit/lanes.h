// Several vectors of queries at a time.
#pragma once

#include "simd.h"

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
