// What the table ops require of their tensors, checked once for both devices.
#pragma once

#include <torch/csrc/stable/macros.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

namespace convit_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Rows of the dense table are padded to whole tiles of the matrix units.
constexpr int64_t kColumnMultiple = 16;

inline int64_t padded(int64_t tokens) { return (tokens + kColumnMultiple - 1) / kColumnMultiple * kColumnMultiple; }

inline bool is_float_or_double(const Tensor& t) {
  return t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::Double;
}

inline void check_pos_weight(const Tensor& pos_weight, int64_t height, int64_t width) {
  STD_TORCH_CHECK(pos_weight.dim() == 2 && pos_weight.size(1) == 3, "pos_weight must have shape (heads, 3)");
  STD_TORCH_CHECK(is_float_or_double(pos_weight), "pos_weight must be float32 or float64");
  STD_TORCH_CHECK(height > 0 && width > 0, "the grid must have at least one row and one column");
  constexpr int64_t side_limit = int64_t{1} << 24;  // beyond it float32 no longer counts every offset
  STD_TORCH_CHECK(height <= side_limit && width <= side_limit, "a grid side is at most 2^24");
  const int64_t heads = pos_weight.size(0);
  const int64_t limit = std::numeric_limits<int64_t>::max() / 16;
  STD_TORCH_CHECK(
      heads == 0 || (height <= limit / heads / height && width <= limit / heads / width),
      "the tables would have more elements than 64 bits can count");
}

inline void check_table(const Tensor& table, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(
      table.dim() == 3 && table.size(1) == table.size(2) && table.size(1) > 0, name, " must have shape (heads, L, L)");
  STD_TORCH_CHECK(
      table.size(0) == like.size(0) && table.scalar_type() == like.scalar_type() && table.device() == like.device(),
      name, " must agree with the other tables in heads, dtype and device");
}

inline void check_backward(
    const Tensor& grad_row, const Tensor& grad_col, const Tensor& row_table, const Tensor& col_table) {
  STD_TORCH_CHECK(is_float_or_double(row_table), "row_table must be float32 or float64");
  check_table(row_table, row_table, "row_table");
  check_table(col_table, row_table, "col_table");
  check_table(grad_row, row_table, "grad_row");
  check_table(grad_col, row_table, "grad_col");
  STD_TORCH_CHECK(
      grad_row.size(1) == row_table.size(1) && grad_col.size(1) == col_table.size(1),
      "each gradient must have its table's shape");
}

inline std::tuple<Tensor, Tensor> empty_tables(const Tensor& pos_weight, int64_t height, int64_t width) {
  const int64_t heads = pos_weight.size(0);
  return {
      torch::stable::new_empty(pos_weight, {heads, height, height}),
      torch::stable::new_empty(pos_weight, {heads, width, width})};
}

inline void check_dense_table(const Tensor& pos_weight, int64_t height, int64_t width, ScalarType dtype) {
  check_pos_weight(pos_weight, height, width);
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
      "the dense table's dtype must be float32, float16 or bfloat16");
  const int64_t heads = pos_weight.size(0);
  const int64_t limit = std::numeric_limits<int64_t>::max() / 16;
  const int64_t tokens = height * width;  // at most 2^48: each side is at most 2^24
  STD_TORCH_CHECK(
      heads == 0 || tokens <= limit / heads / padded(tokens),
      "the table would have more elements than 64 bits can count");
}

inline Tensor empty_dense_table(const Tensor& pos_weight, int64_t height, int64_t width, ScalarType dtype) {
  const int64_t tokens = height * width;
  return torch::stable::new_empty(pos_weight, {pos_weight.size(0), tokens, padded(tokens)}, dtype);
}

// A (heads, 3) weight of any strides.
template <typename T>
struct PosWeight {
  const T* data;
  int64_t head_stride, feature_stride;

  explicit PosWeight(const Tensor& t)
      : data(static_cast<const T*>(t.const_data_ptr())), head_stride(t.stride(0)), feature_stride(t.stride(1)) {}

  CONVIT_HOST_DEVICE T operator()(int64_t head, int64_t feature) const {
    return data[head * head_stride + feature * feature_stride];
  }
};

// A (heads, L, L) table of any strides.
template <typename T>
struct Table {
  const T* data;
  int64_t head_stride, query_stride, key_stride, length;

  explicit Table(const Tensor& t)
      : data(static_cast<const T*>(t.const_data_ptr())), head_stride(t.stride(0)), query_stride(t.stride(1)),
        key_stride(t.stride(2)), length(t.size(1)) {}

  CONVIT_HOST_DEVICE const T* row(int64_t head, int64_t query) const {
    return data + head * head_stride + query * query_stride;
  }
};

}  // namespace convit_kernels
