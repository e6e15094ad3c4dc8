// CPU kernels of the relative-position tables.
#include "relpos.h"
#include "checks.h"
#include "../op_namespace.h"

#include <torch/csrc/stable/library.h>

#include <vector>

namespace convit_kernels {
namespace {

// Rows a thread takes at least: below it a thread costs more than it computes.
constexpr int64_t kGrain = 64;

template <typename T>
void fill_tables(const Tensor& pos_weight, Tensor& row_table, Tensor& col_table) {
  const PosWeight<T> weight(pos_weight);
  const int64_t heads = pos_weight.size(0), height = row_table.size(1), width = col_table.size(1);
  T* rows = static_cast<T*>(row_table.mutable_data_ptr());
  T* cols = static_cast<T*>(col_table.mutable_data_ptr());
  torch::stable::parallel_for(0, heads * (height + width), kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const bool along_y = index < heads * height;
      const int64_t length = along_y ? height : width;
      const int64_t row = along_y ? index : index - heads * height;
      const int64_t head = row / length;
      T* out = (along_y ? rows : cols) + row * length;
      softmax_row(weight(head, along_y ? 1 : 0), weight(head, 2), length, row % length, out);
    }
  });
}

std::tuple<Tensor, Tensor> relative_position_tables(const Tensor& pos_weight, int64_t height, int64_t width) {
  check_pos_weight(pos_weight, height, width);
  STD_TORCH_CHECK(pos_weight.is_cpu(), "pos_weight must be on the CPU");
  auto [row_table, col_table] = empty_tables(pos_weight, height, width);
  if (pos_weight.scalar_type() == ScalarType::Float) {
    fill_tables<float>(pos_weight, row_table, col_table);
  } else {
    fill_tables<double>(pos_weight, row_table, col_table);
  }
  return {row_table, col_table};
}

template <typename T>
AxisGradient head_gradient(const Table<T>& table, const Table<T>& grad, int64_t head) {
  AxisGradient sum;
  for (int64_t query = 0; query < table.length; ++query) {
    sum.add_row(table.row(head, query), grad.row(head, query), table.key_stride, grad.key_stride, table.length, query);
  }
  return sum;
}

template <typename T>
void fill_gradient(
    const Tensor& grad_row, const Tensor& grad_col, const Tensor& row_table, const Tensor& col_table, Tensor& out) {
  const Table<T> d_rows(grad_row), d_cols(grad_col), rows(row_table), cols(col_table);
  T* gradient = static_cast<T*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, row_table.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) {
      const AxisGradient along_y = head_gradient(rows, d_rows, head);
      const AxisGradient along_x = head_gradient(cols, d_cols, head);
      gradient[head * 3] = static_cast<T>(along_x.linear);
      gradient[head * 3 + 1] = static_cast<T>(along_y.linear);
      gradient[head * 3 + 2] = static_cast<T>(along_x.quadratic + along_y.quadratic);
    }
  });
}

Tensor relative_position_tables_backward(
    const Tensor& grad_row, const Tensor& grad_col, const Tensor& row_table, const Tensor& col_table) {
  check_backward(grad_row, grad_col, row_table, col_table);
  STD_TORCH_CHECK(row_table.is_cpu(), "the tables must be on the CPU");
  Tensor gradient = torch::stable::new_empty(row_table, {row_table.size(0), 3});
  if (row_table.scalar_type() == ScalarType::Float) {
    fill_gradient<float>(grad_row, grad_col, row_table, col_table, gradient);
  } else {
    fill_gradient<double>(grad_row, grad_col, row_table, col_table, gradient);
  }
  return gradient;
}

template <typename T, typename Out>
void fill_dense(const Tensor& pos_weight, int64_t height, int64_t width, Tensor& table) {
  const PosWeight<T> weight(pos_weight);
  const int64_t tokens = height * width, columns = padded(tokens);
  Out* out = static_cast<Out*>(table.mutable_data_ptr());
  torch::stable::parallel_for(0, pos_weight.size(0) * tokens, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> along_x(width), along_y(height);
    for (int64_t index = begin; index < end; ++index) {
      const int64_t head = index / tokens, query = index % tokens;
      softmax_row(weight(head, 0), weight(head, 2), width, query % width, along_x.data());
      softmax_row(weight(head, 1), weight(head, 2), height, query / width, along_y.data());
      Out* row = out + index * columns;
      for (int64_t y = 0; y < height; ++y) {
        for (int64_t x = 0; x < width; ++x) {
          row[y * width + x] = static_cast<Out>(static_cast<float>(along_y[y] * along_x[x]));
        }
      }
      for (int64_t column = tokens; column < columns; ++column) {
        row[column] = static_cast<Out>(0.0f);
      }
    }
  });
}

template <typename T>
void fill_dense_as(const Tensor& pos_weight, int64_t height, int64_t width, ScalarType dtype, Tensor& table) {
  if (dtype == ScalarType::Float) {
    fill_dense<T, float>(pos_weight, height, width, table);
  } else if (dtype == ScalarType::Half) {
    fill_dense<T, torch::headeronly::Half>(pos_weight, height, width, table);
  } else {
    fill_dense<T, torch::headeronly::BFloat16>(pos_weight, height, width, table);
  }
}

Tensor dense_position_table(const Tensor& pos_weight, int64_t height, int64_t width, ScalarType dtype) {
  check_dense_table(pos_weight, height, width, dtype);
  STD_TORCH_CHECK(pos_weight.is_cpu(), "pos_weight must be on the CPU");
  Tensor table = empty_dense_table(pos_weight, height, width, dtype);
  if (pos_weight.scalar_type() == ScalarType::Float) {
    fill_dense_as<float>(pos_weight, height, width, dtype, table);
  } else {
    fill_dense_as<double>(pos_weight, height, width, dtype, table);
  }
  return table;
}

}  // namespace

CONVIT_KERNELS_IMPL(CPU, m) {
  m.impl("relative_position_tables", TORCH_BOX(&relative_position_tables));
  m.impl("relative_position_tables_backward", TORCH_BOX(&relative_position_tables_backward));
  m.impl("dense_position_table", TORCH_BOX(&dense_position_table));
}

}  // namespace convit_kernels
