// Position: a query's coordinates, the factors of its attention along each axis, and their place in the map.
#pragma once

#include "softmax.h"

namespace convit_kernels {
namespace {

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
    const Lanes<T, 1> largest = largest_of(factor + columns, columns, length - 1, base, load_lanes<1>(factor));
    const Vector<T> scale = 1 / exponentials(factor, columns, length, base, largest, Exponential<T>::kPolynomial).at[0];
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

// The mixed map of some queries, one key after another, from the key `begin` on: for each key's e its row of the map.
template <int kVectors, typename T>
class Mix {
 public:
  CONVIT_INLINE Mix(
      const T* row_factor, const T* col_factor, int64_t columns, int64_t begin, int64_t width,
      const Lanes<T, kVectors>& content, T gate)
      : row_factor_(row_factor + begin / width * columns), first_(col_factor),
        col_factor_(first_ + begin % width * columns), end_(first_ + width * columns), columns_(columns),
        content_(content), gate_(gate) {
    load_row();
  }

  CONVIT_INLINE Lanes<T, kVectors> operator()(const T* e) {
    if (col_factor_ == end_) {
      col_factor_ = first_;
      row_factor_ += columns_;
      load_row();
    }
    Lanes<T, kVectors> map;
#pragma GCC unroll 4
    for (int vector = 0; vector < kVectors; ++vector) {
      const int64_t at = vector * kLanes<T>;
      map.at[vector] = load(e + at) * content_.at[vector] + row_.at[vector] * load(col_factor_ + at);
    }
    col_factor_ += columns_;
    return map;
  }

 private:
  CONVIT_INLINE void load_row() {
    row_ = load_lanes<kVectors>(row_factor_);
#pragma GCC unroll 4
    for (int vector = 0; vector < kVectors; ++vector) {
      row_.at[vector] *= gate_;
    }
  }

  const T *row_factor_, *const first_, *col_factor_, *const end_;
  const int64_t columns_;
  const Lanes<T, kVectors> content_;
  const T gate_;
  Lanes<T, kVectors> row_;
};

}  // namespace
}  // namespace convit_kernels
