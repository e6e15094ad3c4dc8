// Position: a query's coordinates, the factors of its attention along each axis, and their place in the map.
#pragma once

#include "blocks.h"
#include "softmax.h"

namespace convit_kernels {
namespace {

// One axis's factor of the positional attention: (length, columns), the softmax over the keys along that axis of
// linear * offset + quadratic * offset^2, offset = key - query. With kMoments there follow two more of that size, the
// factor times (offset - its mean) and times (offset^2 - its mean): relative to the query, coordinates cancel least.
template <bool kMoments, typename T>
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

// Both axes' factors of a block's queries, kTables tables each. Queries share coordinates: along an axis that is not
// long they are computed once for each coordinate, and spread over every block's queries.
template <typename T, int kTables>
class Factors {
 public:
  T *row, *col;  // (height, columns) and (width, columns)

  Factors() = default;
  Factors(int64_t height, int64_t width, int64_t columns, Memory& memory)
      : row(take(kTables * height * columns, memory)), col(take(kTables * width * columns, memory)), height_(height),
        width_(width), coordinates_(memory.take<T>(maximum(columns, round_up(maximum(height, width), kLanes<T>)))),
        row_table_(take(is_shared(height) ? table_size(height) : 0, memory)),
        col_table_(take(is_shared(width) ? table_size(width) : 0, memory)) {}

  // Once for all blocks. pos_weight: of x, of y, of the square
  void prepare(const T* pos_weight) const {
    fill_table(pos_weight[0], pos_weight[2], width_, col_table_);
    fill_table(pos_weight[1], pos_weight[2], height_, row_table_);
  }

  void fill(const T* pos_weight, int64_t begin, int64_t columns) const {
    const int64_t x = begin % width_, y = begin / width_;
    if (is_shared(width_)) {
      spread(width_, x, columns, col_table_, col, [](const T* from, int64_t, int64_t at) { return load(from + at); });
    } else {
      fill_each(
          pos_weight[0], pos_weight[2], width_, columns, col, [&](int64_t query) { return (x + query) % width_; });
    }
    if (is_shared(height_)) {
      spread(height_, x, columns, row_table_, row, [&](const T* from, int64_t run, int64_t) {
        return broadcast(from[minimum(y + run, height_ - 1)]);  // beyond the last query any will do
      });
    } else {
      fill_each(
          pos_weight[1], pos_weight[2], height_, columns, row, [&](int64_t query) { return y + (x + query) / width_; });
    }
  }

 private:
  // With a vector more, which is written and read beyond the end of what counts.
  static T* take(int64_t count, Memory& memory) { return memory.take<T>(count + kLanes<T>); }

  static int64_t table_size(int64_t length) { return kTables * length * round_up(length, kLanes<T>); }

  // Where its table is small, and not much larger than the queries are many.
  bool is_shared(int64_t length) const {
    return length * round_up(length, kLanes<T>) <= minimum(2 * height_ * width_, 1 << 13);
  }

  template <typename Coordinate>
  void fill_each(T linear, T quadratic, int64_t length, int64_t columns, T* to, const Coordinate& coordinate) const {
    for (int64_t at = 0; at < columns; ++at) {
      coordinates_[at] = static_cast<T>(coordinate(at));
    }
    fill_factor<(kTables > 1)>(linear, quadratic, length, coordinates_, columns, to);
  }

  void fill_table(T linear, T quadratic, int64_t length, T* to) const {
    if (is_shared(length)) {
      fill_each(linear, quadratic, length, round_up(length, kLanes<T>), to, [](int64_t at) { return at; });
    }
  }

  // A table's rows -> rows of a block's queries, in runs that end with the grid's rows; the first begins at x. Vectors
  // are value(the table's row, the run, the place in it), and the last of a run goes into the next.
  template <typename Value>
  void spread(int64_t length, int64_t x, int64_t columns, const T* from, T* to, const Value& value) const {
    for (int64_t row = 0; row < kTables * length; ++row, from += round_up(length, kLanes<T>), to += columns) {
      for (int64_t run = 0, begin = -x; begin < columns; ++run, begin += width_) {
        const int64_t end = minimum(begin + width_, columns);
        for (int64_t query = maximum(begin, 0); query < end; query += kLanes<T>) {
          store(to + query, value(from, run, query - begin));
        }
      }
    }
  }

  int64_t height_, width_;
  T *coordinates_, *row_table_, *col_table_;
};

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
