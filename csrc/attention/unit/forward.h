// The forward: blocks of queries against all keys at once or chunk by chunk.
#pragma once

#include "blocks.h"
#include "operands.h"
#include "position.h"

namespace convit_kernels {
namespace {

// A thread's memory for the forward, in one of two ways. Whole: a block has the scores of all keys, so that position is
// mixed into the normalised map before its one product with the values. Chunked, for more tokens than that pays for: a
// block has those of one chunk of keys and a running maximum, and position, the sum of whose products along each axis
// is then cheap, has a sum of its own.
template <typename Operands>
struct ForwardMemory {
  using T = typename Operands::Compute;
  using Operand = typename Operands::Operand;

  bool chunked;
  int64_t channels;  // head_dim in whole vectors
  int64_t depth;     // head_dim in whole vectors of operands
  QueryBlocks<T> blocks;
  KeyChunks chunks;
  bool resident;  // all keys and values fit, and are copied once for many blocks; else chunk by chunk
  Operand *keys, *values, *queries, *transposed, *map;
  T *scores, *sums, *out;
  Factors<T, 1> factors;
  T *largest, *sum, *shrink;  // chunked: of each query, so far, and what the last chunk changed
  T* row;                     // chunked: one key's value
  T* along_y;                 // chunked: of each grid row in the block and each column of keys, values summed along y
  int64_t bytes;

  ForwardMemory(const Problem& p, void* start) : ForwardMemory(p, start, chunks_pay(p)) {}

 private:
  static constexpr int64_t kMost = 2'000'000, kTokensInCache = 3;  // the latter in a KiB

  ForwardMemory(const Problem& p, void* start, bool chunked)
      : chunked(chunked), channels(round_up(p.head_dim, kLanes<T>)),
        depth(round_up(ceil_div(p.head_dim, Operands::kGroup), kLanes<T>)),
        blocks(p.height * p.width, chunked ? chunked_vectors(p) : whole_vectors(p)),
        chunks(p.height * p.width, kChunk * Operands::kGroup, Operands::kRows) {
    const int64_t tokens = p.height * p.width, columns = blocks.largest;
    Memory memory(start);
    const int64_t panel = minimum(columns, kTileVectors * kLanes<T>);
    queries = memory.take<Operand>(panel * depth);
    transposed = memory.take<Operand>(columns * depth);
    map = memory.take<Operand>(Operands::kGroup == 1 ? 0 : chunks.size * panel);
    out = memory.take<T>(columns * channels);
    sums = Operands::kTransposedSums ? memory.take<T>(columns * channels) : out;
    scores = memory.take<T>((chunked ? chunks.size : round_up(tokens, Operands::kRows)) * panel);
    factors = Factors<T, 1>(p.height, p.width, columns, memory);
    largest = memory.take<T>(columns);
    sum = memory.take<T>(columns);
    shrink = memory.take<T>(columns);
    row = memory.take<T>(channels);
    along_y = memory.take<T>(chunked ? (ceil_div(columns - 1, p.width) + 1) * p.width * channels : 0);
    const int64_t all = tokens * (depth + channels) * static_cast<int64_t>(sizeof(T));
    resident = !chunked && memory.used() + all < kMost;
    const int64_t copied = resident ? round_up(tokens, Operands::kRows) : chunks.size;
    keys = memory.take<Operand>(copied * depth);
    values = memory.take<Operand>(copied / Operands::kGroup * channels);
    bytes = memory.used();
  }

  // From as many tokens on as fill the second-level cache with scores, keys and values: 1536 where it has 512 KiB
  // (measured on Zen 3), between 2500 and 4096 where it has 1 MiB (Zen 4). Not on narrow grids: each grid row that a
  // block touches adds a pass over the values.
  static bool chunks_pay(const Problem& p) {
    return p.height * p.width >= kTokensInCache * (p.cache >> 10) && p.width >= 8 &&
        ForwardMemory(p, nullptr, true).bytes <= kMost;
  }

  // The more queries, the fewer times keys and values are read, for as long as queries and outputs stay in the caches.
  static int64_t chunked_vectors(const Problem& p) {
    const int64_t wanted = minimum(384, maximum(192, p.height * p.width / 16)) / kLanes<T>;
    return maximum(kTileVectors, minimum(wanted, (1 << 17) / (round_up(p.head_dim, kLanes<T>) * kVectorBytes)));
  }

  // As many as one tile is wide, fewer where all scores of a block would take more than a megabyte.
  static int64_t whole_vectors(const Problem& p) {
    const int64_t rows = p.height * p.width + p.height + p.width;
    return maximum(1, minimum(kTileVectors, (17 << 16) / (rows * kVectorBytes)));
  }
};

// The keys and values of one image and head, as operands of products: chunk by chunk, or all from the beginning.
template <typename Operands, typename S>
class KeysAndValues {
  using Operand = typename Operands::Operand;

 public:
  KeysAndValues(const Forward& p, int64_t image_head, const ForwardMemory<Operands>& m)
      : memory_(m), head_dim_(p.head_dim), k_stride_(p.k.token), v_stride_(p.v.token),
        k_(rows_of<S>(p, p.k, image_head)), v_(rows_of<S>(p, p.v, image_head)) {
    if (m.resident) {
      const int64_t tokens = p.height * p.width;
      Operands::copy_rows(k_, k_stride_, tokens, head_dim_, m.keys, m.depth);
      Operands::copy_gathered(v_, v_stride_, tokens, head_dim_, m.values, m.channels);
    }
  }

  const Operand* keys(int64_t begin, int64_t rows) const {
    if (memory_.resident) {
      return memory_.keys + begin * memory_.depth;
    }
    Operands::copy_rows(k_ + begin * k_stride_, k_stride_, rows, head_dim_, memory_.keys, memory_.depth);
    return memory_.keys;
  }

  const Operand* values(int64_t begin, int64_t rows) const {
    if (memory_.resident) {
      return memory_.values + begin / Operands::kGroup * memory_.channels;
    }
    Operands::copy_gathered(v_ + begin * v_stride_, v_stride_, rows, head_dim_, memory_.values, memory_.channels);
    return memory_.values;
  }

  void copy_value(int64_t key, typename Operands::Compute* to) const {
    copy_rows(v_ + key * v_stride_, v_stride_, 1, head_dim_, to, memory_.channels);
  }

  // Brings part `index` of `count` of the rows [begin, end) into the caches, while others are worked on.
  CONVIT_INLINE void prefetch(int64_t begin, int64_t end, int64_t index, int64_t count) const {
    const int64_t rows = maximum(0, end - begin);
    for (int64_t row = begin + rows * index / count; row < begin + rows * (index + 1) / count; ++row) {
      prefetch_row<3>(k_ + row * k_stride_, head_dim_);
      prefetch_row<3>(v_ + row * v_stride_, head_dim_);
    }
  }

 private:
  const ForwardMemory<Operands>& memory_;
  const int64_t head_dim_, k_stride_, v_stride_;
  const S *k_, *v_;
};

// One block of queries of the forward.
template <typename Operands, typename S>
struct ForwardBlock {
  using T = typename Operands::Compute;
  using Operand = typename Operands::Operand;
  static constexpr int kLane = kLanes<T>, kGroup = Operands::kGroup;

  const Problem& p;
  const ForwardMemory<Operands>& m;
  const KeysAndValues<Operands, S>& source;
  const NextHead<S, 3>& next;
  const int64_t begin, rows, columns;
  const T gate, factor;

  void load_queries(const S* q) const {
    for (int64_t index = 0; index < panels(); ++index) {
      const Panel at = panel(index);
      Operands::copy_rows(q + (begin + at.begin) * p.q.token, p.q.token, at.rows, p.head_dim, m.queries, m.depth);
      transpose_rows(m.queries, at.rows, m.depth, m.transposed + at.begin * m.depth, at.columns);
    }
  }

  void whole() const {
    const int64_t tokens = p.height * p.width;
    const Panel all = panel(0);  // a block is no larger
    for (int64_t key = 0; key < tokens; key += m.chunks.size) {
      const int64_t keys = m.chunks.rows(key);
      const Operand* chunk = source.keys(key, keys);
      for (int64_t at = 0; at < keys; at += kPiece) {
        const int64_t piece = minimum(kPiece, keys - at), from = begin * tokens + (key + at) * rows;
        next.prefetch(from, from + piece * rows, tokens);
        score(all, chunk + at * m.depth, piece, m.scores + (key + at) * columns);
      }
    }
    for_each_group<T>(columns, [&](auto width, int64_t at) {
      constexpr int vectors = decltype(width)::value;
      T* scores = m.scores + at;
      const auto largest = largest_of(scores + columns, columns, tokens - 1, factor, load_lanes<vectors>(scores));
      store_lanes(m.largest + at, largest);
      store_lanes(m.sum + at, exponentials(scores, columns, tokens, factor, largest, Operands::kExponential));
    });
    for (int64_t key = 0; key < tokens; key += m.chunks.size) {
      const int64_t keys = m.chunks.rows(key);
      add_mixed(all, m.scores + key * columns, key, keys, source.values(key, keys));
    }
    transpose_sums();
  }

  void chunked() const {
    const int64_t first_row = begin / p.width, grid_rows = (begin + rows - 1) / p.width - first_row + 1;
    const auto first_query = [&](int64_t row) { return maximum(0, (first_row + row) * p.width - begin); };
    for (int64_t at = 0; at < grid_rows * p.width * m.channels; at += kLane) {
      store(m.along_y + at, Vector<T>{});
    }
    for_each_chunk(
        [&](Panel panel, int64_t key, int64_t keys, const Operand* k, const Operand* v) {
          score(panel, k, keys, m.scores);
          update_softmax(panel, key, keys);
          add_values(panel, map_of_keys<Operands>(m.scores, panel.columns, keys, m.map), key, keys, v);
        },
        [&](int64_t key, int64_t keys) {
          for (const int64_t end = key + keys; key < end; ++key) {
            source.copy_value(key, m.row);
            const T* factor = m.factors.row + key / p.width * columns;
            for (int64_t row = 0; row < grid_rows; ++row) {
              T* to = m.along_y + (row * p.width + key % p.width) * m.channels;
              add_row(m.row, factor[first_query(row)] * gate, to);
            }
          }
        });
    for (int64_t query = 0; query < rows; ++query) {
      m.shrink[query] = (1 - gate) / m.sum[query];
    }
    Operands::scale(m.sums, m.channels, 0, rows, columns, m.shrink);
    transpose_sums();
    for (int64_t row = 0; row < grid_rows; ++row) {
      const int64_t query = first_query(row), end = minimum(rows, first_query(row + 1));
      multiply<true, true>(
          m.factors.col + query, columns, m.along_y + row * p.width * m.channels, m.channels,
          m.out + query * m.channels, m.channels, end - query, m.channels / kLane, p.width);
    }
    if (!is_finite()) {  // the sums apart may have been, or may have made NaN of the map's zero and infinity
      for_each_chunk(
          [&](Panel panel, int64_t key, int64_t keys, const Operand* k, const Operand* v) {
            score(panel, k, keys, m.scores);
            for_each_group<T>(panel.columns, [&](auto width, int64_t at) {
              const auto largest = load_lanes<decltype(width)::value>(m.largest + panel.begin + at);
              exponentials(m.scores + at, panel.columns, keys, factor, largest, Operands::kExponential);
            });
            add_mixed(panel, m.scores, key, keys, v);
          },
          [](int64_t, int64_t) {});
      transpose_sums();
    }
  }

 private:
  // Columns whose scores of a chunk of keys stay in the first-level cache.
  struct Panel {
    int64_t begin, columns, rows;
  };

  int64_t panels() const { return ceil_div(columns, kTileVectors * kLane); }

  Panel panel(int64_t index) const {
    const auto begin_of = [&](int64_t i) { return columns / kLane * i / panels() * kLane; };
    const int64_t begin = begin_of(index), end = begin_of(index + 1);
    return {begin, end - begin, minimum(end, rows) - begin};
  }

  // Calls function(panel, key, keys, k, v) for every chunk of keys and every panel of columns, then
  // after_chunk(key, keys).
  template <typename Function, typename AfterChunk>
  void for_each_chunk(const Function& function, const AfterChunk& after_chunk) const {
    const int64_t tokens = p.height * p.width;
    for (int64_t key = 0; key < tokens; key += m.chunks.size) {
      const int64_t keys = m.chunks.rows(key), next = key + keys;
      const Operand *k = source.keys(key, keys), *v = source.values(key, keys);
      for (int64_t index = 0; index < panels(); ++index) {
        source.prefetch(next, minimum(next + m.chunks.size, tokens), index, panels());
        function(panel(index), key, keys, k, v);
      }
      after_chunk(key, keys);
    }
  }

  // The scores of a chunk of keys.
  void score(Panel panel, const Operand* keys, int64_t count, T* to) const {
    Operands::scores(keys, m.transposed + panel.begin * m.depth, to, count, panel.columns, m.depth, p.head_dim);
  }

  // Adds a map's product with the values of a chunk of keys, the first of which sets the sum.
  void add_values(Panel panel, const Operand* map, int64_t key, int64_t keys, const Operand* values) const {
    const auto gather = key == 0 ? Operands::template gather<false> : Operands::template gather<true>;
    gather(map, panel.columns, values, m.channels, m.sums, panel.begin, panel.rows, columns, keys);
  }

  void transpose_sums() const {
    if (Operands::kTransposedSums) {
      transpose_rows(m.sums, m.channels, columns, m.out, m.channels);
    }
  }

  // A chunk's e -> its part of the output.
  void add_mixed(Panel panel, T* e, int64_t key, int64_t keys, const Operand* values) const {
    Operand* const map = map_in_place_of(e);
    for_each_group<T>(panel.columns, [&](auto width, int64_t at) {
      constexpr int vectors = decltype(width)::value;
      const int64_t query = panel.begin + at;
      auto content = load_lanes<vectors>(m.sum + query);
      for (Vector<T>& sum : content.at) {
        sum = (1 - gate) / sum;
      }
      Mix<vectors, T> mix(m.factors.row + query, m.factors.col + query, columns, key, p.width, content, gate);
      const T* row = e + at - panel.columns;
      const auto next = [&] { return mix(row += panel.columns); };
      Operands::template pack_keys<vectors>(next, keys, panel.columns, map + at);
    });
    add_values(panel, map, key, keys, values);
  }

  Operand* map_in_place_of(T* e) const {
    if constexpr (kGroup == 1) {
      return e;
    } else {
      return m.map;
    }
  }

  // A chunk's scores -> e relative to the largest score so far, to which the sums until now are brought, too.
  void update_softmax(Panel panel, int64_t key, int64_t keys) const {
    // finite: of scores that are all -inf until now the sum is zero
    const T lowest = factor < 0 ? Exponential<T>::kLargest : -Exponential<T>::kLargest;
    for_each_group<T>(panel.columns, [&](auto width, int64_t at) {
      constexpr int vectors = decltype(width)::value;
      T* scores = m.scores + at;
      const int64_t query = panel.begin + at;
      Lanes<T, vectors> before;
      for (int vector = 0; vector < vectors; ++vector) {
        before.at[vector] = key == 0 ? broadcast(lowest) : load(m.largest + query + vector * kLane);
      }
      const auto largest = largest_of(scores, panel.columns, keys, factor, before);
      const auto part = exponentials(scores, panel.columns, keys, factor, largest, Operands::kExponential);
      store_lanes(m.largest + query, largest);
      for (int vector = 0; vector < vectors; ++vector) {
        const int64_t column = query + vector * kLane;
        const Vector<T> shrink = exp2<T>((before.at[vector] - largest.at[vector]) * factor);
        store(m.shrink + column, shrink);
        store(m.sum + column, key == 0 ? part.at[vector] : load(m.sum + column) * shrink + part.at[vector]);
      }
    });
    if (key > 0) {
      Operands::scale(m.sums, m.channels, panel.begin, panel.rows, columns, m.shrink);
    }
  }

  // Adds a row, times a factor, to another.
  void add_row(const T* row, T factor, T* to) const {
    for (int64_t channel = 0; channel < m.channels; channel += kLane) {
      store(to + channel, load(to + channel) + load(row + channel) * factor);
    }
  }

  bool is_finite() const {
    Vector<T> zeros{};
    for (int64_t at = 0; at < rows * m.channels; at += kLane) {
      zeros += load(m.out + at) * T(0);
    }
    T zero = 0;
    for (int lane = 0; lane < kLane; ++lane) {
      zero += zeros[lane];
    }
    return zero == 0;
  }
};

template <typename Operands, typename S>
void forward(const Forward& p, int64_t image_head, int64_t block_begin, int64_t block_end, void* start) {
  using T = typename Operands::Compute;
  const FlushSubnormals flush;
  const typename Operands::Session session;
  const ForwardMemory<Operands> m(p, start);
  const KeysAndValues<Operands, S> source(p, image_head, m);
  const NextHead<S, 3> next(p, {p.q, p.k, p.v}, image_head);
  const int64_t head = image_head % p.heads, tokens = p.height * p.width;
  const T gate = static_cast<const T*>(p.gate)[head], factor = static_cast<T>(p.scale * kLog2E);
  const T* pos_weight = static_cast<const T*>(p.pos_weight) + 3 * head;
  S* out = rows_of<S>(p, p.out, image_head);

  m.factors.prepare(pos_weight);
  for (int64_t index = block_begin; index < block_end; ++index) {
    const int64_t begin = m.blocks.begin(index), rows = m.blocks.rows(index), columns = m.blocks.columns(index);
    m.factors.fill(pos_weight, begin, columns);
    const ForwardBlock<Operands, S> block{p, m, source, next, begin, rows, columns, gate, factor};
    block.load_queries(rows_of<S>(p, p.q, image_head));
    if (m.chunked) {
      block.chunked();
    } else {
      block.whole();
    }
    if (p.lse != nullptr) {
      T* lse = static_cast<T*>(p.lse) + image_head * tokens + begin;
      for (int64_t query = 0; query < rows; ++query) {
        lse[query] = m.largest[query] * static_cast<T>(p.scale) + log2(m.sum[query]) * static_cast<T>(kLn2);
      }
    }
    write_rows(m.out, m.channels, T(1), out + begin * p.out.token, p.out.token, rows, p.head_dim);
  }
}

template <typename Operands>
Plan forward_plan(const Problem& p) {
  const ForwardMemory<Operands> memory(p, nullptr);
  return {memory.blocks.count, memory.bytes};
}

}  // namespace
}  // namespace convit_kernels
