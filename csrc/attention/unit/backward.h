// The backward: the probabilities are computed anew, and gradients added up block by block of queries.
#pragma once

#include "blocks.h"
#include "operands.h"
#include "position.h"

namespace convit_kernels {
namespace {

// dk and dv of one image and head, as they are added up: (tokens, channels) each.
template <typename T>
int64_t accumulator_size(const Problem& p) {
  return p.height * p.width * round_up(p.head_dim, kLanes<T>);
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
  Operand *rows, *transposed, *map;
  T *scores, *d_scores, *dq, *x, *y, *row_factor, *col_factor;
  int64_t bytes;

  BackwardMemory(const Problem& p, void* start)
      : channels(round_up(p.head_dim, kLanes<T>)), depth(round_up(ceil_div(p.head_dim, kGroup), kLanes<T>)),
        blocks(p.height * p.width, block_vectors(p)), chunks(p.height * p.width) {
    const int64_t tokens = p.height * p.width, columns = blocks.largest;
    Memory memory(start);
    keys = memory.take<Operand>(tokens * depth);
    values = memory.take<Operand>(tokens * depth);
    key_values = kGroup == 1 ? keys : memory.take<Operand>(ceil_div(tokens, kGroup) * channels);
    queries = memory.take<Operand>(ceil_div(columns, kGroup) * channels);
    d_out = memory.take<Operand>(ceil_div(columns, kGroup) * channels);
    rows = memory.take<Operand>(kGroup == 1 ? 0 : columns * depth);
    transposed = memory.take<Operand>(columns * depth);
    map = memory.take<Operand>(kGroup == 1 ? 0 : ceil_div(chunks.size, kGroup) * columns);
    dq = memory.take<T>(columns * channels);
    scores = memory.take<T>(tokens * columns);
    d_scores = memory.take<T>(tokens * columns);
    x = memory.take<T>(columns);
    y = memory.take<T>(columns);
    row_factor = memory.take<T>(3 * p.height * columns);
    col_factor = memory.take<T>(3 * p.width * columns);
    bytes = memory.used();
  }

  // The more queries, the fewer times dk and dv are read and written, for as long as the scores of a block and their
  // gradients take no more than half of the cache.
  static int64_t block_vectors(const Problem& p) {
    const int64_t rows = 2 * p.height * p.width + 3 * (p.height + p.width);
    return maximum(kTileVectors, minimum(3 * kTileVectors, p.cache / 2 / (rows * kVectorBytes)));
  }
};

// Turns one vector of queries' scores and the gradients of the map into the mixed map A and the gradients of the
// scores, in place, and adds to the gradients of the positional weights and the gate, before their factors.
template <typename Operands, typename T = typename Operands::Compute>
void softmax_backward(
    T* scores, T* d_scores, const T* row_factor, const T* col_factor, int64_t columns, int64_t height, int64_t width,
    T score_factor, T gate, ScalarGradients& sums) {
  const int64_t row_table = height * columns, col_table = width * columns;
  // not from the forward's log-sum-exp: that of large logits has lost digits which their differences still have
  const auto largest = largest_of(scores + columns, columns, height * width - 1, score_factor, load_lanes<1>(scores));
  const Vector<T> inverse =
      1 / exponentials(scores, columns, height * width, score_factor, largest, Operands::kExponential).at[0];

  Vector<T> content_sum{}, position_sum{}, along_x{}, along_y{}, squares{};
  for (int64_t y = 0; y < height; ++y) {
    Vector<T> content{}, plain{}, linear{}, quadratic{};
    const int64_t row = y * width * columns;
    for (int64_t x = 0; x < width * columns; x += columns) {
      const Vector<T> d_map = load(d_scores + row + x);
      content += load(scores + row + x) * d_map;
      plain += load(col_factor + x) * d_map;
      linear += load(col_factor + col_table + x) * d_map;
      quadratic += load(col_factor + 2 * col_table + x) * d_map;
    }
    content_sum += content;
    const T* factor = row_factor + y * columns;
    position_sum += load(factor) * plain;
    along_x += load(factor) * linear;
    along_y += load(factor + row_table) * plain;
    squares += load(factor) * quadratic + load(factor + 2 * row_table) * plain;
  }
  content_sum *= inverse;
  for (int lane = 0; lane < kLanes<T>; ++lane) {
    sums.pos_weight[0] += along_x[lane];
    sums.pos_weight[1] += along_y[lane];
    sums.pos_weight[2] += squares[lane];
    sums.gate += position_sum[lane] - content_sum[lane];
  }

  const Vector<T> content = (1 - gate) * inverse;
  for (int64_t y = 0; y < height; ++y) {
    const Vector<T> factor = load(row_factor + y * columns) * gate;
    const int64_t row = y * width * columns;
    for (int64_t x = 0; x < width * columns; x += columns) {
      const Vector<T> map = load(scores + row + x) * content;
      store(d_scores + row + x, map * (load(d_scores + row + x) - content_sum));
      store(scores + row + x, map + factor * load(col_factor + x));
    }
  }
}

template <typename Operands, typename S>
void backward(
    const Backward& p, int64_t image_head, int64_t block_begin, int64_t block_end, void* accumulator,
    ScalarGradients* sums, void* start) {
  using T = typename Operands::Compute;
  using Operand = typename Operands::Operand;
  constexpr int64_t lanes = kLanes<T>, group = Operands::kGroup;
  const FlushSubnormals flush;
  const BackwardMemory<Operands> m(p, start);
  const int64_t head = image_head % p.heads, tokens = p.height * p.width;
  const int64_t channels = m.channels, depth = m.depth, head_dim = p.head_dim;
  const T gate = static_cast<const T*>(p.gate)[head], factor = static_cast<T>(p.scale * kLog2E);
  const T* pos_weight = static_cast<const T*>(p.pos_weight) + 3 * head;
  const S *k = rows_of<S>(p, p.k, image_head), *v = rows_of<S>(p, p.v, image_head);
  S* dq = rows_of<S>(p, p.dq, image_head);
  T* dk = static_cast<T*>(accumulator);
  T* dv = dk + accumulator_size<T>(p);
  *sums = {};
  Operands::copy_rows(k, p.k.token, tokens, head_dim, m.keys, depth);
  Operands::copy_rows(v, p.v.token, tokens, head_dim, m.values, depth);
  if (group > 1) {
    Operands::copy_values(k, p.k.token, tokens, head_dim, m.key_values, channels);
  }

  const NextHead<S, 4> next(p, {p.q, p.k, p.v, p.d_out}, image_head);
  for (int64_t block = block_begin; block < block_end; ++block) {
    const int64_t begin = m.blocks.begin(block), rows = m.blocks.rows(block), columns = m.blocks.columns(block);
    // A product of keys or values with the block's queries or gradients, which are then laid out for the sums over
    // them.
    const auto score = [&](const Operand* left, const Strided& right, Operand* scattered, T* to) {
      const S* from = rows_of<S>(p, right, image_head) + begin * right.token;
      Operand* as_rows = group == 1 ? scattered : m.rows;
      Operands::copy_rows(from, right.token, rows, head_dim, as_rows, depth);
      transpose_rows(as_rows, rows, depth, m.transposed, columns);
      multiply<false, false>(
          left, depth, m.transposed, columns, to, columns, tokens, columns / lanes, ceil_div(head_dim, group));
      if (group > 1) {
        Operands::copy_values(from, right.token, rows, head_dim, scattered, channels);
      }
    };
    score(m.keys, p.q, m.queries, m.scores);
    score(m.values, p.d_out, m.d_out, m.d_scores);

    fill_coordinates(begin, columns, p.width, m.x, m.y);
    fill_factor<true>(pos_weight[0], pos_weight[2], p.width, m.x, columns, m.col_factor);
    fill_factor<true>(pos_weight[1], pos_weight[2], p.height, m.y, columns, m.row_factor);
    for (int64_t at = 0; at < columns; at += lanes) {
      softmax_backward<Operands>(
          m.scores + at, m.d_scores + at, m.row_factor + at, m.col_factor + at, columns, p.height, p.width, factor,
          gate, *sums);
    }

    const auto accumulate =
        block == block_begin ? multiply<false, false, T, Operand> : multiply<false, true, T, Operand>;
    for (int64_t key = 0; key < tokens; key += m.chunks.size) {
      const int64_t keys = m.chunks.rows(key);
      next.prefetch(begin * tokens + key * rows, begin * tokens + (key + keys) * rows, tokens);
      const auto scatter = [&](const T* map, const Operand* from, T* to) {
        accumulate(
            Operands::map_of_queries(map + key * columns, columns, rows, keys, m.map), columns / group, from, channels,
            to + key * channels, channels, keys, channels / lanes, ceil_div(rows, group));
      };
      scatter(m.scores, m.d_out, dv);
      scatter(m.d_scores, m.queries, dk);
      const auto gather = key == 0 ? multiply<true, false, T, Operand> : multiply<true, true, T, Operand>;
      gather(
          Operands::map_of_keys(m.d_scores + key * columns, columns, keys, m.map), columns,
          m.key_values + key / group * channels, channels, m.dq, channels, rows, channels / lanes,
          ceil_div(keys, group));
    }
    write_rows(m.dq, channels, static_cast<T>(p.scale), dq + begin * p.dq.token, p.dq.token, rows, head_dim);
  }
  for (double& sum : sums->pos_weight) {
    sum *= gate;
  }
  sums->gate *= static_cast<double>(gate) * (1 - gate);
}

template <typename T, typename S>
void backward_finish(const Backward& p, int64_t image_head, void* accumulators, int64_t count) {
  const int64_t tokens = p.height * p.width, size = accumulator_size<T>(p);
  T* sum = static_cast<T*>(accumulators);
  for (int64_t part = 1; part < count; ++part) {
    const T* other = sum + part * 2 * size;
    for (int64_t at = 0; at < 2 * size; at += kLanes<T>) {
      store(sum + at, load(sum + at) + load(other + at));
    }
  }
  const auto write = [&](const T* from, T factor, const Strided& to) {
    write_rows(from, size / tokens, factor, rows_of<S>(p, to, image_head), to.token, tokens, p.head_dim);
  };
  write(sum, static_cast<T>(p.scale), p.dk);
  write(sum + size, T(1), p.dv);
}

template <typename Operands>
Plan backward_plan(const Problem& p) {
  const BackwardMemory<Operands> memory(p, nullptr);
  return {memory.blocks.count, memory.bytes};
}

template <typename T>
int64_t accumulator_bytes(const Problem& p) {
  return 2 * accumulator_size<T>(p) * static_cast<int64_t>(sizeof(T));
}

}  // namespace
}  // namespace convit_kernels
