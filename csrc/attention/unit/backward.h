// The backward: the probabilities are computed anew, and gradients added up block by block of queries.
#pragma once

#include "blocks.h"
#include "packing.h"
#include "position.h"
#include "products.h"

namespace convit_kernels {
namespace {

// dk and dv of one image and head, as they are added up: (tokens, channels) each.
template <typename T>
int64_t accumulator_size(const Problem& p) {
  return p.height * p.width * round_up(p.head_dim, kLanes<T>);
}

template <typename T>
struct BackwardMemory {
  int64_t channels;
  QueryBlocks<T> blocks;
  KeyChunks chunks;
  T *keys, *values, *queries, *d_out, *transposed, *scores, *d_scores, *dq, *x, *y, *row_factor, *col_factor;
  int64_t bytes;

  BackwardMemory(const Problem& p, void* start)
      : channels(round_up(p.head_dim, kLanes<T>)), blocks(p.height * p.width, block_vectors(p)),
        chunks(p.height * p.width) {
    const int64_t tokens = p.height * p.width, columns = blocks.largest;
    Memory memory(start);
    keys = memory.take<T>(tokens * channels);
    values = memory.take<T>(tokens * channels);
    queries = memory.take<T>(columns * channels);
    d_out = memory.take<T>(columns * channels);
    transposed = memory.take<T>(columns * channels);
    dq = memory.take<T>(columns * channels);
    scores = memory.take<T>(tokens * columns);
    d_scores = memory.take<T>(tokens * columns);
    x = memory.take<T>(columns);
    y = memory.take<T>(columns);
    row_factor = memory.take<T>(3 * p.height * columns);
    col_factor = memory.take<T>(3 * p.width * columns);
    bytes = memory.used();
  }

  // The more queries, the fewer times dk and dv are read and written; fewer where the scores would take megabytes.
  static int64_t block_vectors(const Problem& p) {
    const int64_t rows = 2 * p.height * p.width + 3 * (p.height + p.width);
    return maximum(kTileVectors, minimum(3 * kTileVectors, (1 << 21) / (rows * kVectorBytes)));
  }
};

// Turns one vector of queries' scores and the gradients of the map into the mixed map A and the gradients of the
// scores, in place, and adds to the gradients of the positional weights and the gate, before their factors.
template <typename T>
void softmax_backward(
    T* scores, T* d_scores, const T* row_factor, const T* col_factor, int64_t columns, int64_t height, int64_t width,
    T score_factor, T gate, ScalarGradients& sums) {
  const int64_t row_table = height * columns, col_table = width * columns;
  // not from the forward's log-sum-exp: that of large logits has lost digits which their differences still have
  const auto largest =
      largest_of(scores + columns, columns, height * width - 1, score_factor, load_lanes<1>(scores));
  const Vector<T> inverse = 1 / exponentials(scores, columns, height * width, score_factor, largest).at[0];

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

template <typename T, typename S>
void backward(
    const Backward& p, int64_t image_head, int64_t block_begin, int64_t block_end, void* accumulator,
    ScalarGradients* sums, void* start) {
  constexpr int lanes = kLanes<T>;
  const BackwardMemory<T> m(p, start);
  const int64_t head = image_head % p.heads, tokens = p.height * p.width;
  const int64_t channels = m.channels, head_dim = p.head_dim;
  const T gate = static_cast<const T*>(p.gate)[head], factor = static_cast<T>(p.scale * kLog2E);
  const T* pos_weight = static_cast<const T*>(p.pos_weight) + 3 * head;
  const S* q = rows_of<S>(p, p.q, image_head);
  const S* d_out = rows_of<S>(p, p.d_out, image_head);
  S* dq = rows_of<S>(p, p.dq, image_head);
  T* dk = static_cast<T*>(accumulator);
  T* dv = dk + accumulator_size<T>(p);
  *sums = {};
  copy_rows(rows_of<S>(p, p.k, image_head), p.k.token, tokens, head_dim, m.keys, channels);
  copy_rows(rows_of<S>(p, p.v, image_head), p.v.token, tokens, head_dim, m.values, channels);

  for (int64_t block = block_begin; block < block_end; ++block) {
    const int64_t begin = m.blocks.begin(block), rows = m.blocks.rows(block), columns = m.blocks.columns(block);
    copy_rows(q + begin * p.q.token, p.q.token, rows, head_dim, m.queries, channels);
    transpose_rows(m.queries, rows, channels, m.transposed, columns);
    multiply<false, false>(
        m.keys, channels, m.transposed, columns, m.scores, columns, tokens, columns / lanes, head_dim);
    copy_rows(d_out + begin * p.d_out.token, p.d_out.token, rows, head_dim, m.d_out, channels);
    transpose_rows(m.d_out, rows, channels, m.transposed, columns);
    multiply<false, false>(
        m.values, channels, m.transposed, columns, m.d_scores, columns, tokens, columns / lanes, head_dim);

    fill_coordinates(begin, columns, p.width, m.x, m.y);
    fill_factor<true>(pos_weight[0], pos_weight[2], p.width, m.x, columns, m.col_factor);
    fill_factor<true>(pos_weight[1], pos_weight[2], p.height, m.y, columns, m.row_factor);
    for (int64_t at = 0; at < columns; at += lanes) {
      softmax_backward(
          m.scores + at, m.d_scores + at, m.row_factor + at, m.col_factor + at, columns, p.height, p.width, factor,
          gate, *sums);
    }

    const auto accumulate = block == block_begin ? multiply<false, false, T, T> : multiply<false, true, T, T>;
    accumulate(m.scores, columns, m.d_out, channels, dv, channels, tokens, channels / lanes, rows);
    accumulate(m.d_scores, columns, m.queries, channels, dk, channels, tokens, channels / lanes, rows);
    for (int64_t key = 0; key < tokens; key += m.chunks.size) {
      const auto product = key == 0 ? multiply<true, false, T, T> : multiply<true, true, T, T>;
      product(
          m.d_scores + key * columns, columns, m.keys + key * channels, channels, m.dq, channels, rows,
          channels / lanes, m.chunks.rows(key));
    }
    write_rows(m.dq, channels, 1, 0, static_cast<T>(p.scale), dq + begin * p.dq.token, p.dq.token, rows, head_dim);
  }
  for (double& sum : sums->pos_weight) {
    sum *= gate;
  }
  sums->gate *= static_cast<double>(gate) * (1 - gate);
}

template <typename T, typename S>
void backward_finish(const Backward& p, int64_t image_head, const void* accumulators, int64_t count) {
  const int64_t tokens = p.height * p.width, size = accumulator_size<T>(p);
  const T* dk = static_cast<const T*>(accumulators);
  const auto write = [&](const T* from, T factor, const Strided& to) {
    write_rows(
        from, size / tokens, count, 2 * size, factor, rows_of<S>(p, to, image_head), to.token, tokens, p.head_dim);
  };
  write(dk, static_cast<T>(p.scale), p.dk);
  write(dk + size, T(1), p.dv);
}

template <typename T>
Plan backward_plan(const Problem& p) {
  const BackwardMemory<T> memory(p, nullptr);
  return {memory.blocks.count, memory.bytes};
}

template <typename T>
int64_t accumulator_bytes(const Problem& p) {
  return 2 * accumulator_size<T>(p) * static_cast<int64_t>(sizeof(T));
}

}  // namespace
}  // namespace convit_kernels
