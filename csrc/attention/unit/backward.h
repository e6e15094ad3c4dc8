// The backward: the probabilities are computed anew, and gradients added up block by block of queries.
#pragma once

#include "blocks.h"
#include "operands.h"
#include "position.h"

namespace convit_kernels {
namespace {

// dk and dv of one image and head, as they are added up: (tokens in whole rows of products, channels) each.
template <typename Operands>
int64_t accumulator_size(const Problem& p) {
  return round_up(p.height * p.width, Operands::kRows) * round_up(p.head_dim, kLanes<typename Operands::Compute>);
}

template <typename Operands>
struct BackwardMemory {
  using T = typename Operands::Compute;
  using Operand = typename Operands::Operand;
  static constexpr int64_t kGroup = Operands::kGroup;

  int64_t channels;  // head_dim in whole vectors
  int64_t depth;     // head_dim in whole vectors of operands
  QueryBlocks<T> blocks;
  KeyChunks chunks;
  Operand *keys, *values;    // rows: what scores are made from
  Operand* key_values;       // what dq is gathered from; numbers serve as they are
  Operand *queries, *d_out;  // what dk and dv are scattered from
  Operand *rows, *transposed;
  MapAndGradient<Operand> packed;  // of a chunk of keys; numbers serve where they are
  T *scores, *d_map, *weight, *content_sum, *sums, *dq;
  Factors<T, 3> factors;
  int64_t bytes;

  BackwardMemory(const Problem& p, void* start)
      : channels(round_up(p.head_dim, kLanes<T>)), depth(round_up(ceil_div(p.head_dim, kGroup), kLanes<T>)),
        blocks(p.height * p.width, block_vectors(p)), chunks(p.height * p.width, kChunk * kGroup, Operands::kRows) {
    const int64_t columns = blocks.largest, operands = round_up(columns, Operands::kSteps) / kGroup;
    const int64_t tokens = round_up(p.height * p.width, Operands::kRows);
    Memory memory(start);
    keys = memory.take<Operand>(tokens * depth);
    values = memory.take<Operand>(tokens * depth);
    key_values = kGroup == 1 ? keys : memory.take<Operand>(tokens / kGroup * channels);
    queries = memory.take<Operand>(operands * channels);
    d_out = memory.take<Operand>(operands * channels);
    rows = memory.take<Operand>(kGroup == 1 ? 0 : columns * depth);
    transposed = memory.take<Operand>(columns * depth);
    const int64_t packed_size = kGroup == 1 ? 0 : chunks.size * operands;
    packed.map = memory.take<Operand>(packed_size);
    packed.gradient = memory.take<Operand>(packed_size);
    packed.gradient_of_keys = memory.take<Operand>(packed_size);
    dq = memory.take<T>(columns * channels);
    sums = Operands::kTransposedSums ? memory.take<T>(columns * channels) : dq;
    scores = memory.take<T>(tokens * columns);
    d_map = memory.take<T>(tokens * columns);
    weight = memory.take<T>(columns);
    content_sum = memory.take<T>(columns);
    factors = Factors<T, 3>(p.height, p.width, columns, memory);
    bytes = memory.used();
  }

  // Where a chunk's map and gradients go, which are made from these.
  MapAndGradient<Operand> packed_in_place_of(T* e, T* gradient) const {
    if constexpr (kGroup == 1) {
      return {e, gradient, gradient};
    } else {
      return packed;
    }
  }

  // The more queries, the fewer times dk and dv are read and written, for as long as the scores of a block and their
  // gradients take no more than half of the cache, and there are blocks enough for many threads.
  static int64_t block_vectors(const Problem& p) {
    const int64_t rows = 2 * p.height * p.width + 3 * (p.height + p.width);
    const int64_t most = p.images * p.heads < kPieces ? 3 * kTileVectors : Operands::kBlockVectors;
    return maximum(kTileVectors, minimum(most, p.cache / 2 / (rows * kVectorBytes)));
  }
};

// Turns some vectors of queries' scores into e, stores what it is multiplied with in the mixed map and the sum that the
// softmax's gradient subtracts, and adds to the gradients of the positional weights and the gate, before their factors.
template <typename Operands, int kVectors, typename T = typename Operands::Compute>
CONVIT_INLINE void softmax_sums(
    T* scores, const T* d_map, T* weights, T* content_sums, const T* row_factor, const T* col_factor, int64_t columns,
    int64_t height, int64_t width, T score_factor, T gate, ScalarGradients& sums) {
  constexpr int lanes = kLanes<T>;
  const int64_t row_table = height * columns, col_table = width * columns;
  // not from the forward's log-sum-exp: that of large logits has lost digits which their differences still have
  const auto largest =
      largest_of(scores + columns, columns, height * width - 1, score_factor, load_lanes<kVectors>(scores));
  const auto sum = exponentials(scores, columns, height * width, score_factor, largest, Operands::kExponential);

  Lanes<T, kVectors> content_sum{}, position_sum{}, along_x{}, along_y{}, squares{};
  for (int64_t y = 0; y < height; ++y) {
    Lanes<T, kVectors> content{}, plain{}, linear{}, quadratic{};
    for (int64_t x = 0; x < width; ++x) {
      const int64_t key = (y * width + x) * columns;
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const Vector<T> gradient = load(d_map + key + v * lanes);
        const T* col = col_factor + x * columns + v * lanes;
        content.at[v] += load(scores + key + v * lanes) * gradient;
        plain.at[v] += load(col) * gradient;
        linear.at[v] += load(col + col_table) * gradient;
        quadratic.at[v] += load(col + 2 * col_table) * gradient;
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const T* factor = row_factor + y * columns + v * lanes;
      content_sum.at[v] += content.at[v];
      position_sum.at[v] += load(factor) * plain.at[v];
      along_x.at[v] += load(factor) * linear.at[v];
      along_y.at[v] += load(factor + row_table) * plain.at[v];
      squares.at[v] += load(factor) * quadratic.at[v] + load(factor + 2 * row_table) * plain.at[v];
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    content_sum.at[v] /= sum.at[v];
    store(weights + v * lanes, (1 - gate) / sum.at[v]);
    for (int lane = 0; lane < lanes; ++lane) {
      sums.pos_weight[0] += along_x.at[v][lane];
      sums.pos_weight[1] += along_y.at[v][lane];
      sums.pos_weight[2] += squares.at[v][lane];
      sums.gate += position_sum.at[v][lane] - content_sum.at[v][lane];
    }
  }
  store_lanes(content_sums, content_sum);
}

// One key's row of the mixed map and of the gradient of the scores, for some vectors of queries.
template <int kVectors, typename T>
struct GradientRow {
  Lanes<T, kVectors> map, gradient;
};

template <typename Operands, typename S>
void backward(
    const Backward& p, int64_t image_head, int64_t block_begin, int64_t block_end, void* accumulator,
    ScalarGradients* sums, void* start) {
  using T = typename Operands::Compute;
  using Operand = typename Operands::Operand;
  constexpr int64_t group = Operands::kGroup;
  const FlushSubnormals flush;
  const typename Operands::Session session;
  const BackwardMemory<Operands> m(p, start);
  const int64_t head = image_head % p.heads, tokens = p.height * p.width;
  const int64_t channels = m.channels, depth = m.depth, head_dim = p.head_dim;
  const T gate = static_cast<const T*>(p.gate)[head], factor = static_cast<T>(p.scale * kLog2E);
  const T* pos_weight = static_cast<const T*>(p.pos_weight) + 3 * head;
  const S *k = rows_of<S>(p, p.k, image_head), *v = rows_of<S>(p, p.v, image_head);
  S* dq = rows_of<S>(p, p.dq, image_head);
  T* dk = static_cast<T*>(accumulator);
  T* dv = dk + accumulator_size<Operands>(p);
  *sums = {};
  Operands::copy_rows(k, p.k.token, tokens, head_dim, m.keys, depth);
  Operands::copy_rows(v, p.v.token, tokens, head_dim, m.values, depth);
  if (group > 1) {
    Operands::copy_gathered(k, p.k.token, tokens, head_dim, m.key_values, channels);
  }

  m.factors.prepare(pos_weight);
  const NextHead<S, 4> next(p, {p.q, p.k, p.v, p.d_out}, image_head);
  for (int64_t block = block_begin; block < block_end; ++block) {
    const int64_t begin = m.blocks.begin(block), rows = m.blocks.rows(block), columns = m.blocks.columns(block);
    // A product of keys or values with the block's queries or gradients, which are then laid out for the sums over
    // them.
    const auto score = [&](int64_t part, const Operand* left, const Strided& right, Operand* scattered, T* to) {
      const S* from = rows_of<S>(p, right, image_head) + begin * right.token;
      Operand* as_rows = group == 1 ? scattered : m.rows;
      Operands::copy_rows(from, right.token, rows, head_dim, as_rows, depth);
      transpose_rows(as_rows, rows, depth, m.transposed, columns);
      for (int64_t key = 0; key < tokens; key += kPiece) {
        const int64_t keys = minimum(kPiece, tokens - key), at = (2 * begin + part * rows) * tokens + key * rows;
        next.prefetch(at, at + keys * rows, 2 * tokens);
        Operands::scores(left + key * depth, m.transposed, to + key * columns, keys, columns, depth, head_dim);
      }
      if (group > 1) {
        Operands::copy_scattered(from, right.token, rows, head_dim, scattered, channels);
      }
    };
    score(0, m.keys, p.q, m.queries, m.scores);
    score(1, m.values, p.d_out, m.d_out, m.d_map);

    m.factors.fill(pos_weight, begin, columns);
    for_each_group<T>(columns, [&](auto width, int64_t at) {
      softmax_sums<Operands, decltype(width)::value>(
          m.scores + at, m.d_map + at, m.weight + at, m.content_sum + at, m.factors.row + at, m.factors.col + at,
          columns, p.height, p.width, factor, gate, *sums);
    });

    const auto scatter = block == block_begin ? Operands::template scatter<false> : Operands::template scatter<true>;
    for (int64_t key = 0; key < tokens; key += m.chunks.size) {
      const int64_t keys = m.chunks.rows(key);
      const MapAndGradient<Operand> map = m.packed_in_place_of(m.scores + key * columns, m.d_map + key * columns);
      for_each_group<T>(columns, [&](auto group_width, int64_t at) {
        constexpr int vectors = decltype(group_width)::value;
        const auto weight = load_lanes<vectors>(m.weight + at), content_sum = load_lanes<vectors>(m.content_sum + at);
        Mix<vectors, T> mix(m.factors.row + at, m.factors.col + at, columns, key, p.width, weight, gate);
        const T *e = m.scores + key * columns + at, *d_map = m.d_map + key * columns + at;
        const auto next_row = [&] {
          GradientRow<vectors, T> row;
#pragma GCC unroll 4
          for (int v = 0; v < vectors; ++v) {
            const Vector<T> gradient = load(d_map + v * kLanes<T>) - content_sum.at[v];
            row.gradient.at[v] = load(e + v * kLanes<T>) * weight.at[v] * gradient;
          }
          row.map = mix(e);
          e += columns;
          d_map += columns;
          return row;
        };
        Operands::template pack_gradients<vectors>(next_row, keys, columns, at, map);
      });
      Operands::clear_unused(map, keys, columns, rows);
      scatter(map.map, columns, m.d_out, channels, dv + key * channels, keys, rows);
      scatter(map.gradient, columns, m.queries, channels, dk + key * channels, keys, rows);
      const auto add_dq = key == 0 ? Operands::template gather<false> : Operands::template gather<true>;
      add_dq(
          map.gradient_of_keys, columns, m.key_values + key / group * channels, channels, m.sums, 0, rows, columns,
          keys);
    }
    if (Operands::kTransposedSums) {
      transpose_rows(m.sums, channels, columns, m.dq, channels);
    }
    write_rows(m.dq, channels, static_cast<T>(p.scale), dq + begin * p.dq.token, p.dq.token, rows, head_dim);
  }
  for (double& sum : sums->pos_weight) {
    sum *= gate;
  }
  sums->gate *= static_cast<double>(gate) * (1 - gate);
}

template <typename Operands, typename S>
void backward_finish(const Backward& p, int64_t image_head, void* accumulators, int64_t count) {
  using T = typename Operands::Compute;
  const int64_t size = accumulator_size<Operands>(p), channels = round_up(p.head_dim, kLanes<T>);
  T* sum = static_cast<T*>(accumulators);
  for (int64_t part = 1; part < count; ++part) {
    const T* other = sum + part * 2 * size;
    for (int64_t at = 0; at < 2 * size; at += kLanes<T>) {
      store(sum + at, load(sum + at) + load(other + at));
    }
  }
  const auto write = [&](const T* from, T factor, const Strided& to) {
    write_rows(from, channels, factor, rows_of<S>(p, to, image_head), to.token, p.height * p.width, p.head_dim);
  };
  write(sum, static_cast<T>(p.scale), p.dk);
  write(sum + size, T(1), p.dv);
}

template <typename Operands>
Plan backward_plan(const Problem& p) {
  const BackwardMemory<Operands> memory(p, nullptr);
  return {memory.blocks.count, memory.bytes};
}

template <typename Operands>
int64_t accumulator_bytes(const Problem& p) {
  return 2 * accumulator_size<Operands>(p) * static_cast<int64_t>(sizeof(typename Operands::Compute));
}

}  // namespace
}  // namespace convit_kernels
