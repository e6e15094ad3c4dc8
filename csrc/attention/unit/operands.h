// What the products multiply: numbers, or pairs of bfloat16.
#pragma once

#include "packing.h"
#include "products.h"

namespace convit_kernels {
namespace {

// An operand's type says how rows of a tensor and of a map are laid out for the three products of the attention:
//   scores   S[key, query]    = sum over channels of X[key] Y[query]      copy_rows, transposed for Y
//   gather   G[query, d]     += sum over keys of M[key, query] X[key, d]   map_of_keys, copy_values
//   scatter  A[key, d]       += sum over queries of M[key, query] Y[query, d]   map_of_queries, copy_values

// Numbers in the type that is computed in.
template <typename T, typename S>
struct Numbers {
  using Compute = T;
  using Operand = T;
  static constexpr int kGroup = 1;  // numbers in an operand
  static constexpr auto& kExponential = Exponential<T>::kPolynomial;

  static void copy_rows(const S* from, int64_t stride, int64_t rows, int64_t head_dim, T* to, int64_t channels) {
    convit_kernels::copy_rows(from, stride, rows, head_dim, to, channels);
  }
  static void copy_values(const S* from, int64_t stride, int64_t rows, int64_t head_dim, T* to, int64_t channels) {
    copy_rows(from, stride, rows, head_dim, to, channels);
  }
  static Vector<T> value(const T* values, int64_t key, int64_t channels) { return load(values + key * channels); }
  static const T* map_of_keys(const T* map, int64_t, int64_t, T*) { return map; }
  static const T* map_of_queries(const T* map, int64_t, int64_t, int64_t, T*) { return map; }
};

// Pairs of bfloat16 numbers, for instructions that add the products of two pairs to a float: of adjacent channels in
// queries and keys, of adjacent keys in the map and the values. An odd last one has a zero beside it.
struct Pairs {
  using Compute = float;
  using Operand = uint32_t;
  static constexpr int kGroup = 2;
  static constexpr auto& kExponential = Exponential<float>::kShort;

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

  // (keys, columns) -> (pairs of keys, columns)
  static const uint32_t* map_of_keys(const float* map, int64_t columns, int64_t keys, uint32_t* to) {
    constexpr int lanes = kLanes<float>;
    for (int64_t key = 0; key < keys; key += 2, map += 2 * columns) {
      for (int64_t at = 0; at < columns; at += lanes) {
        const Vector<float> odd = key + 1 < keys ? load(map + columns + at) : Vector<float>{};
        store(to + key / 2 * columns + at, narrow_to_bfloat16(load(map + at)) | narrow_to_bfloat16(odd) << 16);
      }
    }
    return to;
  }

  // (keys, columns) -> (keys, pairs of columns), of which the first `queries` count
  static const uint32_t* map_of_queries(
      const float* map, int64_t columns, int64_t queries, int64_t keys, uint32_t* to) {
    constexpr int lanes = kLanes<float>;
    for (int64_t key = 0; key < keys; ++key, map += columns) {
      uint32_t* row = to + key * columns / 2;
      for (int64_t at = 0; at < columns; at += lanes) {
        const auto narrow = narrow_lanes(narrow_to_bfloat16(load(map + at)));
        __builtin_memcpy(row + at / 2, &narrow, sizeof(narrow));
      }
      if (queries % 2 != 0) {
        row[queries / 2] &= 0xffff;
      }
    }
    return to;
  }

 private:
  static uint32_t joined(BFloat16 even, BFloat16 odd) { return even.bits | static_cast<uint32_t>(odd.bits) << 16; }
};

}  // namespace
}  // namespace convit_kernels
