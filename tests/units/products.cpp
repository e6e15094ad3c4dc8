// The products of one unit alone, for test_products.py: compiled with the unit's flags and its definitions.
// With CONVIT_TILES or CONVIT_PAIRS these are of bfloat16, else of numbers in float32 and float64.
//
// Every buffer is as large as the kernels' own and filled with NaN before it is packed: what a product reads and should
// not makes its result NaN. Buffers that it writes behind are counted, and channels beyond the last that are not zero.
#include <cstring>
#include <vector>

#include "unit/operands.h"

#ifdef CONVIT_TILES
#include "unit/tile_operands.h"
#endif

using namespace convit_kernels;

namespace {

int64_t faults = 0;

template <typename T>
class Poisoned {
 public:
  explicit Poisoned(int64_t count) : count_(count), data_(count + kGuard) {
    std::memset(static_cast<void*>(data_.data()), 0xff, data_.size() * sizeof(T));
  }
  ~Poisoned() {
    const std::vector<unsigned char> intact(kGuard * sizeof(T), 0xff);
    faults += std::memcmp(data_.data() + count_, intact.data(), intact.size()) != 0;
  }
  Poisoned(const Poisoned&) = delete;
  Poisoned& operator=(const Poisoned&) = delete;

  operator T*() { return data_.data(); }

 private:
  static constexpr int64_t kGuard = 1024;
  int64_t count_;
  std::vector<T> data_;
};

// (rows, columns) without gaps, to or from the upper left corner of rows that are `stride` long.
template <typename T>
void copy(const T* from, int64_t from_stride, T* to, int64_t to_stride, int64_t rows, int64_t columns) {
  for (int64_t row = 0; row < rows; ++row) {
    std::memcpy(to + row * to_stride, from + row * from_stride, columns * sizeof(T));
  }
}

// Sizes of the buffers of a chunk of keys and a block of queries.
template <typename Operands>
struct Sizes {
  using T = typename Operands::Compute;
  int64_t channels, depth, columns, rows, map_keys, map_queries;

  Sizes(int64_t keys, int64_t queries, int64_t head_dim)
      : channels(round_up(head_dim, kLanes<T>)), depth(round_up(ceil_div(head_dim, Operands::kGroup), kLanes<T>)),
        columns(round_up(queries, kLanes<T>)), rows(round_up(keys, Operands::kRows)),
        map_keys(round_up(keys, Operands::kSteps) / Operands::kGroup),
        map_queries(round_up(columns, Operands::kSteps) / Operands::kGroup) {}
};

// Rows of x and y are `stride` numbers apart; all else that is given and returned has no gaps.
//
// x (keys, head_dim), y (queries, head_dim) -> to (keys, queries)
template <typename Operands, typename S>
void scores(
    const S* x, const S* y, int64_t stride, typename Operands::Compute* to, int64_t keys, int64_t queries,
    int64_t head_dim) {
  using Operand = typename Operands::Operand;
  const FlushSubnormals flush;
  const typename Operands::Session session;
  const Sizes<Operands> size(keys, queries, head_dim);
  Poisoned<Operand> left(size.rows * size.depth), right_rows(size.columns * size.depth);
  Poisoned<Operand> right(size.columns * size.depth);
  Poisoned<typename Operands::Compute> result(size.rows * size.columns);
  Operands::copy_rows(x, stride, keys, head_dim, left, size.depth);
  Operands::copy_rows(y, stride, queries, head_dim, right_rows, size.depth);
  transpose_rows<Operand>(right_rows, queries, size.depth, right, size.columns);
  Operands::scores(left, right, result, keys, size.columns, size.depth, head_dim);
  copy<typename Operands::Compute>(result, size.columns, to, queries, keys, queries);
}

// The sums of a block, (all_queries, head_dim), as the operands have them, and back.
template <typename Operands>
class Sums {
  using T = typename Operands::Compute;

 public:
  Sums(T* sums, int64_t all_queries, int64_t head_dim)
      : given_(sums), queries_(all_queries), head_dim_(head_dim), channels(round_up(head_dim, kLanes<T>)),
        columns(round_up(all_queries, kLanes<T>)), sums(columns * channels) {
    Poisoned<T> rows(columns * channels);
    copy<T>(given_, head_dim_, rows, channels, queries_, head_dim_);
    if (Operands::kTransposedSums) {
      transpose_rows<T>(rows, columns, channels, this->sums, columns);
    } else {
      copy<T>(rows, channels, this->sums, channels, columns, channels);
    }
  }

  // Of the rows from `query` on so many end with zeros.
  void give_back(int64_t query = 0, int64_t zero_padded = 0) {
    Poisoned<T> rows(columns * channels);
    if (Operands::kTransposedSums) {
      transpose_rows<T>(sums, channels, columns, rows, channels);
    }
    const T* found = Operands::kTransposedSums ? rows : sums;
    copy<T>(found, channels, given_, head_dim_, queries_, head_dim_);
    for (int64_t row = query; row < query + zero_padded; ++row) {
      for (int64_t channel = head_dim_; channel < channels; ++channel) {
        faults += found[row * channels + channel] != 0;
      }
    }
  }

 private:
  T* given_;
  int64_t queries_, head_dim_;

 public:
  int64_t channels, columns;
  Poisoned<T> sums;
};

// map (keys, queries)^T x (keys, head_dim) (+)-> sums (all_queries, head_dim), its rows from `query` on
template <typename Operands, typename S>
void gather(
    const typename Operands::Compute* map, const S* x, int64_t stride, typename Operands::Compute* to, int64_t keys,
    int64_t queries, int64_t head_dim, int64_t query, int64_t all_queries, bool add) {
  using T = typename Operands::Compute;
  using Operand = typename Operands::Operand;
  const FlushSubnormals flush;
  const typename Operands::Session session;
  const Sizes<Operands> size(keys, queries, head_dim);
  Poisoned<T> wide(size.rows * size.columns);
  Poisoned<Operand> packed(size.map_keys * size.columns), values(size.map_keys * size.channels);
  copy<T>(map, queries, wide, size.columns, keys, queries);
  Operands::copy_gathered(x, stride, keys, head_dim, values, size.channels);
  Sums<Operands> block(to, all_queries, head_dim);
  const auto product = add ? Operands::template gather<true> : Operands::template gather<false>;
  product(
      map_of_keys<Operands>(wide, size.columns, keys, packed), size.columns, values, size.channels, block.sums, query,
      queries, block.columns, keys);
  block.give_back(query, add ? 0 : queries);
}

// map (keys, queries) y (queries, head_dim) (+)-> sums (keys, head_dim)
template <typename Operands, typename S>
void scatter(
    const typename Operands::Compute* map, const S* y, int64_t stride, typename Operands::Compute* to, int64_t keys,
    int64_t queries, int64_t head_dim, bool add) {
  using T = typename Operands::Compute;
  using Operand = typename Operands::Operand;
  const FlushSubnormals flush;
  const typename Operands::Session session;
  const Sizes<Operands> size(keys, queries, head_dim);
  Poisoned<T> wide(size.rows * size.columns), sums(size.rows * size.channels);
  Poisoned<Operand> packed(size.rows * size.map_queries), gradient(size.rows * size.map_queries);
  Poisoned<Operand> gradient_of_keys(size.map_keys * size.columns), of_keys(size.map_keys * size.columns);
  Poisoned<Operand> values(size.map_queries * size.channels);
  copy<T>(map, queries, wide, size.columns, keys, queries);
  copy<T>(to, head_dim, sums, size.channels, keys, head_dim);
  Operands::copy_scattered(y, stride, queries, head_dim, values, size.channels);
  const MapAndGradient<Operand> both{packed, gradient, gradient_of_keys};
  for_each_group<T>(size.columns, [&](auto width, int64_t at) {
    constexpr int vectors = decltype(width)::value;
    struct Row {
      Lanes<T, vectors> map, gradient;
    };
    const T* row = wide + at;
    const auto next = [&] {
      const auto lanes = load_lanes<vectors>(row);
      row += size.columns;
      return Row{lanes, lanes};
    };
    Operands::template pack_gradients<vectors>(next, keys, size.columns, at, both);
  });
  Operands::clear_unused(both, keys, size.columns, queries);
  // a gradient that is the map is packed as the map, and as gather reads one
  faults += std::memcmp(both.map, both.gradient, keys * size.map_queries * sizeof(Operand)) != 0;
  if (Operands::kGroup > 1) {
    const Operand* expected = map_of_keys<Operands>(wide, size.columns, keys, of_keys);
    faults += std::memcmp(both.gradient_of_keys, expected, size.map_keys * size.columns * sizeof(Operand)) != 0;
  }
  const auto product = add ? Operands::template scatter<true> : Operands::template scatter<false>;
  product(packed, size.columns, values, size.channels, sums, keys, queries);
  copy<T>(sums, size.channels, to, head_dim, keys, head_dim);
}

// sums (all_queries, head_dim), its rows from `query` on times factors (all_queries,)
template <typename Operands>
void scale(
    typename Operands::Compute* to, const typename Operands::Compute* factors, int64_t queries, int64_t head_dim,
    int64_t query, int64_t all_queries) {
  using T = typename Operands::Compute;
  const FlushSubnormals flush;
  Sums<Operands> block(to, all_queries, head_dim);
  Poisoned<T> each(block.columns);
  copy<T>(factors, all_queries, each, all_queries, 1, all_queries);
  Operands::scale(block.sums, block.channels, query, queries, block.columns, each);
  block.give_back();
}

}  // namespace

#define CONVIT_EXPORT(dtype, Operands, S)                                                                             \
  extern "C" {                                                                                                        \
  void scores_##dtype(                                                                                                \
      const S* x, const S* y, int64_t stride, Operands::Compute* to, int64_t keys, int64_t queries,                   \
      int64_t head_dim) {                                                                                             \
    scores<Operands>(x, y, stride, to, keys, queries, head_dim);                                                      \
  }                                                                                                                   \
  void gather_##dtype(                                                                                                \
      const Operands::Compute* map, const S* x, int64_t stride, Operands::Compute* to, int64_t keys, int64_t queries, \
      int64_t head_dim, int64_t query, int64_t all_queries, bool add) {                                               \
    gather<Operands>(map, x, stride, to, keys, queries, head_dim, query, all_queries, add);                           \
  }                                                                                                                   \
  void scatter_##dtype(                                                                                               \
      const Operands::Compute* map, const S* y, int64_t stride, Operands::Compute* to, int64_t keys, int64_t queries, \
      int64_t head_dim, bool add) {                                                                                   \
    scatter<Operands>(map, y, stride, to, keys, queries, head_dim, add);                                              \
  }                                                                                                                   \
  void scale_##dtype(                                                                                                 \
      Operands::Compute* to, const Operands::Compute* factors, int64_t queries, int64_t head_dim, int64_t query,      \
      int64_t all_queries) {                                                                                          \
    scale<Operands>(to, factors, queries, head_dim, query, all_queries);                                              \
  }                                                                                                                   \
  }

#if defined(CONVIT_TILES)
CONVIT_EXPORT(bfloat16, Tiles, BFloat16)

extern "C" {
// One step: sums (16, 16) += left (16, 16 pairs) right (16 pairs, 16).
void multiply_one_tile(const uint32_t* left, const uint32_t* right, float* sums) {
  const TileSession session;
  load_tile<0>(sums, kTileSide);
  load_tile<6>(left, kTileSide);
  load_tile<7>(right, kTileSide);
  multiply_tiles<0, 6, 7>();
  store_tile<0>(sums, kTileSide);
}

#ifndef CONVIT_SOFTWARE_TILES
// This thread's tile configuration, 64 bytes.
void store_configuration(void* to) { __asm__ volatile("sttilecfg (%0)" : : "r"(to) : "memory"); }
void load_configuration(const void* from) { __asm__ volatile("ldtilecfg (%0)" : : "r"(from) : "memory"); }
#endif
}
#elif defined(CONVIT_PAIRS)
CONVIT_EXPORT(bfloat16, Pairs, BFloat16)
#else
using Float32 = Numbers<float, float>;
using Float64 = Numbers<double, double>;
CONVIT_EXPORT(float32, Float32, float)
CONVIT_EXPORT(float64, Float64, double)
#endif

extern "C" int64_t faults_so_far() { return faults; }
