// What the three products multiply, numbers or pairs of bfloat16, and how they do it on vectors.
#pragma once

#include "lanes.h"
#include "packing.h"
#include "products.h"

namespace convit_kernels {
namespace {

// The attention and its gradients are three products. An operand's type says how rows of a tensor and of a map are laid
// out for them, and computes them; all else is the same for every one of them.
//   scores   S[key, query]    = sum over channels of X[key] Y[query]          copy_rows, for Y transposed
//   gather   G[query, d]     += sum over keys of M[key, query] X[key, d]      pack_keys, copy_gathered
//   scatter  A[key, d]       += sum over queries of M[key, query] Y[query, d] pack_gradients, copy_scattered

// What the backward multiplies for some keys: the map and the gradient of the scores as (keys, queries), to sum along
// the queries, and the latter also to sum along the keys.
template <typename Operand>
struct MapAndGradient {
  Operand *map, *gradient, *gradient_of_keys;
};

template <typename T, typename OperandOf, int64_t kNumbers>
struct VectorProducts {
  using Compute = T;
  using Operand = OperandOf;
  static constexpr int64_t kGroup = kNumbers;  // numbers in an operand
  static constexpr int64_t kSteps = kNumbers;  // what is summed over is padded with zeros to a multiple of that
  static constexpr int64_t kRows = kTileRows;  // chunks of keys are a multiple of that
  static constexpr int64_t kBlockVectors = 3 * kTileVectors;  // of queries, in a block of the backward, at most
  static constexpr bool kTransposedSums = false;              // gather's sums are (queries, channels)

  struct Session {
    Session() {}  // not a trivial type: an unused variable of it is no mistake
  };

  // left (keys, depth), right (depth, columns) -> (keys, columns)
  static void scores(
      const Operand* left, const Operand* right, T* to, int64_t keys, int64_t columns, int64_t depth,
      int64_t head_dim) {
    multiply<false, false>(
        left, depth, right, columns, to, columns, keys, columns / kLanes<T>, ceil_div(head_dim, kGroup));
  }

  // The sums of the queries from `query` on, `rows` of `columns`, of a block's `all_columns`.
  template <bool kAdd>
  static void gather(
      const Operand* map, int64_t columns, const Operand* values, int64_t channels, T* sums, int64_t query,
      int64_t rows, int64_t /* all_columns */, int64_t keys) {
    multiply<true, kAdd>(
        map, columns, values, channels, sums + query * channels, channels, rows, channels / kLanes<T>,
        ceil_div(keys, kGroup));
  }

  template <bool kAdd>
  static void scatter(
      const Operand* map, int64_t columns, const Operand* values, int64_t channels, T* sums, int64_t keys,
      int64_t rows) {
    multiply<false, kAdd>(
        map, columns / kGroup, values, channels, sums, channels, keys, channels / kLanes<T>, ceil_div(rows, kGroup));
  }

  // Multiplies the sums of `rows` queries from `query` on with a factor each.
  static void scale(
      T* sums, int64_t channels, int64_t query, int64_t rows, int64_t /* all_columns */, const T* factors) {
    for (int64_t row = query; row < query + rows; ++row) {
      if (factors[row] != 1) {
        for (int64_t at = row * channels; at < (row + 1) * channels; at += kLanes<T>) {
          store(sums + at, load(sums + at) * factors[row]);
        }
      }
    }
  }
};

// Numbers in the type that is computed in.
template <typename T, typename S>
struct Numbers : VectorProducts<T, T, 1> {
  static constexpr auto& kExponential = Exponential<T>::kPolynomial;

  static void copy_rows(const S* from, int64_t stride, int64_t rows, int64_t head_dim, T* to, int64_t channels) {
    convit_kernels::copy_rows(from, stride, rows, head_dim, to, channels);
  }
  static void copy_gathered(const S* from, int64_t stride, int64_t rows, int64_t head_dim, T* to, int64_t channels) {
    copy_rows(from, stride, rows, head_dim, to, channels);
  }
  static void copy_scattered(const S* from, int64_t stride, int64_t rows, int64_t head_dim, T* to, int64_t channels) {
    copy_rows(from, stride, rows, head_dim, to, channels);
  }
  template <int kVectors, typename Next>
  CONVIT_INLINE static void pack_keys(const Next& next, int64_t keys, int64_t columns, T* to) {
    for (int64_t key = 0; key < keys; ++key, to += columns) {
      store_lanes(to, next());
    }
  }
  template <int kVectors, typename Next>
  CONVIT_INLINE static void pack_gradients(
      const Next& next, int64_t keys, int64_t columns, int64_t at, const MapAndGradient<T>& to) {
    for (int64_t key = 0; key < keys; ++key) {
      const auto row = next();
      store_lanes(to.map + key * columns + at, row.map);
      store_lanes(to.gradient + key * columns + at, row.gradient);
    }
  }
  static void clear_unused(const MapAndGradient<T>&, int64_t, int64_t, int64_t) {}
};

// The layouts of pairs of bfloat16 numbers: of adjacent channels in queries and keys, of adjacent keys or queries in a
// map and the values. What is missing to a multiple of kSteps is zero.
template <int64_t kSteps>
struct PairLayouts {
  static constexpr auto& kExponential = Exponential<float>::kShort;

  static void copy_rows(
      const BFloat16* from, int64_t stride, int64_t rows, int64_t head_dim, uint32_t* to, int64_t depth) {
    constexpr int lanes = kLanes<uint32_t>;
    const int64_t whole = head_dim / (2 * lanes) * lanes;
    for (int64_t row = 0; row < rows; ++row, from += stride, to += depth) {
      for (int64_t pair = 0; pair < whole; pair += lanes) {
        __builtin_memcpy(to + pair, from + 2 * pair, kVectorBytes);
      }
      for (int64_t pair = whole; pair < depth; pair += lanes) {
        store(to + pair, Vector<uint32_t>{});
      }
      copy_bytes<kVectorBytes / 2>(from + 2 * whole, (head_dim - 2 * whole) * sizeof(BFloat16), to + whole);
    }
  }

  // (rows, channels) -> (pairs of rows, channels)
  static void copy_scattered(
      const BFloat16* from, int64_t stride, int64_t rows, int64_t head_dim, uint32_t* to, int64_t channels) {
    constexpr int lanes = kLanes<uint32_t>;
    for (int64_t row = 0; row < round_up(rows, kSteps); row += 2, from += 2 * stride, to += channels) {
      const int64_t count = row < rows ? head_dim : 0;
      const BFloat16* next = row + 1 < rows ? from + stride : nullptr;
      int64_t channel = 0;
      for (; channel + lanes <= count; channel += lanes) {
        const Vector<uint32_t> odd = next == nullptr ? Vector<uint32_t>{} : load_halves(next + channel);
        store(to + channel, load_halves(from + channel) | odd << 16);
      }
      for (; channel < count; ++channel) {
        to[channel] = from[channel].bits | static_cast<uint32_t>(next == nullptr ? 0 : next[channel].bits) << 16;
      }
      for (; channel < channels; ++channel) {
        to[channel] = 0;
      }
    }
  }

  // Some vectors of the rows of a map, (keys, columns), that next() gives in turn -> (pairs of keys, columns)
  template <int kVectors, typename Next>
  CONVIT_INLINE static void pack_keys(const Next& next, int64_t keys, int64_t columns, uint32_t* to) {
    Lanes<uint32_t, kVectors> pairs;
    for (int64_t key = 0; key < keys; key += 2, to += columns) {
      const Lanes<float, kVectors> even = next(), odd = key + 1 < keys ? next() : Lanes<float, kVectors>{};
#pragma GCC unroll 4
      for (int vector = 0; vector < kVectors; ++vector) {
        pairs.at[vector] = NarrowPair(even.at[vector], odd.at[vector]).pairs;
      }
      store_lanes(to, pairs);
    }
    for (int64_t key = round_up(keys, 2); key < round_up(keys, kSteps); key += 2, to += columns) {
      store_lanes(to, Lanes<uint32_t, kVectors>{});
    }
  }

  // Some vectors, from column `at` on, of the rows that next() gives in turn.
  template <int kVectors, typename Next>
  CONVIT_INLINE static void pack_gradients(
      const Next& next, int64_t keys, int64_t columns, int64_t at, const MapAndGradient<uint32_t>& to) {
    const int64_t stride = round_up(columns, kSteps) / 2;
    const auto put = [&](uint32_t* map, int64_t key, int vector, HalfVector halves) {
      __builtin_memcpy(map + key * stride + at / 2 + vector * kLanes<float> / 2, &halves, sizeof(halves));
    };
    for (int64_t key = 0; key < keys; key += 2) {
      const bool paired = key + 1 < keys;
      const auto even = next(), odd = paired ? next() : decltype(even){};
#pragma GCC unroll 4
      for (int vector = 0; vector < kVectors; ++vector) {
        const NarrowPair map(even.map.at[vector], odd.map.at[vector]);
        const NarrowPair gradient(even.gradient.at[vector], odd.gradient.at[vector]);
        put(to.map, key, vector, map.even);
        put(to.gradient, key, vector, gradient.even);
        if (paired) {
          put(to.map, key + 1, vector, map.odd);
          put(to.gradient, key + 1, vector, gradient.odd);
        }
        store(to.gradient_of_keys + key / 2 * columns + at + vector * kLanes<float>, gradient.pairs);
      }
    }
  }

  // Sets to zero what belongs to no query and to no key, and yet is multiplied.
  static void clear_unused(const MapAndGradient<uint32_t>& to, int64_t keys, int64_t columns, int64_t queries) {
    const int64_t stride = round_up(columns, kSteps) / 2;
    for (int64_t key = 0; key < keys; ++key) {
      uint32_t *map = to.map + key * stride, *gradient = to.gradient + key * stride;
      if (queries % 2 != 0) {
        map[queries / 2] &= 0xffff;
        gradient[queries / 2] &= 0xffff;
      }
      for (int64_t pair = ceil_div(queries, 2); pair < round_up(queries, kSteps) / 2; ++pair) {
        map[pair] = gradient[pair] = 0;
      }
    }
    for (int64_t at = ceil_div(keys, 2) * columns; at < round_up(keys, kSteps) / 2 * columns; at += kLanes<float>) {
      store(to.gradient_of_keys + at, Vector<uint32_t>{});
    }
  }

 private:
  static Vector<uint32_t> load_halves(const BFloat16* from) {
    HalfVector halves;
    __builtin_memcpy(&halves, from, sizeof(halves));
    return __builtin_convertvector(halves, Vector<uint32_t>);
  }
};

// Pairs, for instructions that add the products of two of them to a float.
struct Pairs : VectorProducts<float, uint32_t, 2>, PairLayouts<2> {
  static void copy_gathered(
      const BFloat16* from, int64_t stride, int64_t rows, int64_t head_dim, uint32_t* to, int64_t channels) {
    copy_scattered(from, stride, rows, head_dim, to, channels);
  }
};

// A map of numbers, (keys, columns), as gather reads it: laid out anew in `packed`, where it is not so.
template <typename Operands>
const typename Operands::Operand* map_of_keys(
    const typename Operands::Compute* map, int64_t columns, int64_t keys, typename Operands::Operand* packed) {
  if constexpr (Operands::kGroup == 1) {
    return map;
  } else {
    for_each_group<typename Operands::Compute>(columns, [&](auto width, int64_t at) {
      constexpr int vectors = decltype(width)::value;
      const auto* row = map + at;
      const auto next = [&] {
        const auto lanes = load_lanes<vectors>(row);
        row += columns;
        return lanes;
      };
      Operands::template pack_keys<vectors>(next, keys, columns, packed + at);
    });
    return packed;
  }
}

}  // namespace
}  // namespace convit_kernels
