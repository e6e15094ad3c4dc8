// Pairs of bfloat16, multiplied by tiles.
#pragma once

#include "operands.h"
#include "tiles.h"

namespace convit_kernels {
namespace {

// Tiles 0 to 5 are sums; a left and a right operand of one step follow.
constexpr int kSumTiles = 6, kLeftTile = 6, kRightTile = 7;

// A left operand (rows, pairs): the distances between its rows, and between the steps of 16 pairs.
struct TileRows {
  const uint32_t* data;
  int64_t stride, step;
};

// Calls function(Width<0>{}), ..., function(Width<kCount - 1>{}).
template <int kCount, typename Function>
CONVIT_INLINE void for_each_tile(const Function& function) {
  if constexpr (kCount > 0) {
    for_each_tile<kCount - 1>(function);
    function(Width<kCount - 1>{});
  }
}

// c (16 kUp, 16 kAcross) (+)= left right, of `steps` x 16 pairs.
template <int kUp, int kAcross, bool kAdd>
CONVIT_INLINE void multiply_block(
    TileRows left, const uint32_t* right, int64_t right_stride, float* c, int64_t c_stride, int64_t steps) {
  static_assert(kUp * kAcross <= kSumTiles, "the sums must fit");
  const auto for_each_sum = [&](const auto& function) {
    for_each_tile<kUp * kAcross>([&](auto sum) {
      constexpr int tile = decltype(sum)::value;
      function(sum, c + tile / kAcross * kTileSide * c_stride + tile % kAcross * kTileSide);
    });
  };
  for_each_sum([&](auto sum, float* from) {
    if (kAdd) {
      load_tile<decltype(sum)::value>(from, c_stride);
    } else {
      zero_tile<decltype(sum)::value>();
    }
  });
  for (int64_t step = 0; step < steps; ++step) {
    for_each_tile<kAcross>([&](auto across) {
      constexpr int column = decltype(across)::value;
      load_tile<kRightTile>(right + column * kTileSide, right_stride);
      for_each_tile<kUp>([&](auto up) {
        // there and back again: at a turn the left tile is still there
        constexpr int row = column % 2 == 0 ? decltype(up)::value : kUp - 1 - decltype(up)::value;
        if (column == 0 || decltype(up)::value > 0) {
          load_tile<kLeftTile>(left.data + row * kTileSide * left.stride, left.stride);
        }
        multiply_tiles<row * kAcross + column, kLeftTile, kRightTile>();
      });
    });
    left.data += left.step;
    right += kTileSide * right_stride;
  }
  for_each_sum([&](auto sum, float* to) { store_tile<decltype(sum)::value>(to, c_stride); });
}

// The same of up to kUp x kAcross tiles.
template <int kUp, int kAcross, bool kAdd>
void multiply_up_to(
    int64_t up, int64_t across, TileRows left, const uint32_t* right, int64_t right_stride, float* c, int64_t c_stride,
    int64_t steps) {
  if constexpr (kUp > 1) {
    if (up < kUp) {
      multiply_up_to<kUp - 1, kAcross, kAdd>(up, across, left, right, right_stride, c, c_stride, steps);
      return;
    }
  }
  if constexpr (kAcross > 1) {
    if (across < kAcross) {
      multiply_up_to<kUp, kAcross - 1, kAdd>(up, across, left, right, right_stride, c, c_stride, steps);
      return;
    }
  }
  multiply_block<kUp, kAcross, kAdd>(left, right, right_stride, c, c_stride, steps);
}

// The same of any number of tiles, in blocks of nearly equal size.
template <int kUp, int kAcross, bool kAdd>
void multiply_by_tiles(
    TileRows left, const uint32_t* right, int64_t right_stride, float* c, int64_t c_stride, int64_t rows,
    int64_t columns, int64_t steps) {
  rows = ceil_div(rows, kTileSide);
  columns = ceil_div(columns, kTileSide);
  const int64_t most_up = ceil_div(rows, ceil_div(rows, kUp)),
                most_across = ceil_div(columns, ceil_div(columns, kAcross));
  for (int64_t row = 0; row < rows; row += most_up) {
    for (int64_t column = 0; column < columns; column += most_across) {
      multiply_up_to<kUp, kAcross, kAdd>(
          minimum(most_up, rows - row), minimum(most_across, columns - column),
          {left.data + row * kTileSide * left.stride, left.stride, left.step}, right + column * kTileSide, right_stride,
          c + row * kTileSide * c_stride + column * kTileSide, c_stride, steps);
    }
  }
}

// Sums along 32 numbers at a time. Rows of S and A are whole tiles: what is beyond the last key is never read. The
// output and dq are summed up as (channels, queries), where the map as it comes, (pairs of keys, queries), is a right
// operand; values are then left operands, transposed in groups of 32 keys: (groups, channels, 16 pairs).
struct Tiles : PairLayouts<2 * kTileSide> {
  using Compute = float;
  using Operand = uint32_t;
  using Session = TileSession;
  static constexpr int64_t kGroup = 2, kSteps = 2 * kTileSide, kRows = 2 * kTileSide;
  // so many that sums of keys stay in their tiles for some steps: 196 queries are one block
  static constexpr int64_t kBlockVectors = 16;
  static constexpr bool kTransposedSums = true;
  static_assert(kLanes<float> == kTileSide, "columns are whole vectors, and so whole tiles");

  static void copy_gathered(
      const BFloat16* from, int64_t stride, int64_t rows, int64_t head_dim, uint32_t* to, int64_t channels) {
    alignas(64) uint32_t pairs[kTileSide * kTileSide];
    for (int64_t row = 0; row < rows; row += kSteps) {
      for (int64_t channel = 0; channel < channels; channel += kTileSide, to += kTileSide * kTileSide) {
        copy_scattered(
            from + row * stride + channel, stride, minimum(kSteps, rows - row), minimum(kTileSide, head_dim - channel),
            pairs, kTileSide);
        transpose_rows(pairs, kTileSide, kTileSide, to, kTileSide);
      }
    }
  }

  static void scores(
      const uint32_t* left, const uint32_t* right, float* to, int64_t keys, int64_t columns, int64_t depth,
      int64_t /* head_dim */) {
    multiply_by_tiles<2, 2, false>(
        {left, depth, kTileSide}, right, columns, to, columns, keys, columns, depth / kTileSide);
  }

  template <bool kAdd>
  static void gather(
      const uint32_t* map, int64_t columns, const uint32_t* values, int64_t channels, float* sums, int64_t query,
      int64_t /* rows */, int64_t all_columns, int64_t keys) {
    multiply_by_tiles<3, 2, kAdd>(
        {values, kTileSide, channels * kTileSide}, map, columns, sums + query, all_columns, channels, columns,
        ceil_div(keys, kSteps));
  }

  template <bool kAdd>
  static void scatter(
      const uint32_t* map, int64_t columns, const uint32_t* values, int64_t channels, float* sums, int64_t keys,
      int64_t rows) {
    multiply_by_tiles<2, 3, kAdd>(
        {map, round_up(columns, kSteps) / 2, kTileSide}, values, channels, sums, channels, keys, channels,
        ceil_div(rows, kSteps));
  }

  static void scale(
      float* sums, int64_t channels, int64_t query, int64_t rows, int64_t all_columns, const float* factors) {
    for (int64_t channel = 0; channel < channels; ++channel, sums += all_columns) {
      for (int64_t at = query; at < query + rows; at += kTileSide) {
        store(sums + at, load(sums + at) * load(factors + at));
      }
    }
  }
};

// Whether tiles hold what they are given: some virtual machines have advertised them, and lost it.
inline bool tiles_work() {
  alignas(64) uint32_t left[kTileSide * kTileSide], right[kTileSide * kTileSide];
  alignas(64) float sums[kTileSide * kTileSide];
  const uint32_t numbers[] = {0x3f80bf80, 0x40003f80, 0xbf804000, 0x40803f80, 0x3f800000};  // pairs of small integers
  for (int at = 0; at < kTileSide * kTileSide; ++at) {
    left[at] = numbers[at % 5];
    right[at] = numbers[at * 3 % 5];
  }
  {
    const TileSession session;
    multiply_by_tiles<1, 1, false>({left, kTileSide, 0}, right, kTileSide, sums, kTileSide, kTileSide, kTileSide, 1);
  }
  for (int at = 0; at < kTileSide * kTileSide; ++at) {
    float expected = 0;
    for (int pair = 0; pair < kTileSide; ++pair) {
      const uint32_t a = left[at / kTileSide * kTileSide + pair], b = right[pair * kTileSide + at % kTileSide];
      expected += float_of(a << 16) * float_of(b << 16) + float_of(a & 0xffff0000) * float_of(b & 0xffff0000);
    }
    if (sums[at] != expected) {
      return false;
    }
  }
  return true;
}

}  // namespace
}  // namespace convit_kernels
