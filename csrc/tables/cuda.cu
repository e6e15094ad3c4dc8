// CUDA kernels of the relative-position tables: one launch each.
#include "relpos.h"
#include "checks.h"
#include "../op_namespace.h"

#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

// These three live in libtorch_cuda, which a CPU build of torch does not have: weak, so that the library loads there
// too.
#pragma weak aoti_torch_get_current_cuda_stream
#pragma weak torch_c10_cuda_check_msg
#pragma weak torch_c10_cuda_free_error_msg

namespace convit_kernels {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;
constexpr int64_t kSharedBytes = 40 * 1024;  // of shared memory for one block of the dense table: any GPU has them

cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

unsigned int checked_blocks(int64_t blocks) {
  STD_TORCH_CHECK(
      blocks <= kMaxBlocks, "the tables need ", blocks, " CUDA blocks; at most ", kMaxBlocks, " can be launched");
  return static_cast<unsigned int>(blocks);
}

// One thread a table row.
template <typename T>
__global__ void tables_kernel(PosWeight<T> weight, int64_t heads, int64_t height, int64_t width, T* rows, T* cols) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= heads * (height + width)) {
    return;
  }
  const bool along_y = index < heads * height;
  const int64_t length = along_y ? height : width;
  const int64_t row = along_y ? index : index - heads * height;
  const int64_t head = row / length;
  T* out = (along_y ? rows : cols) + row * length;
  softmax_row(weight(head, along_y ? 1 : 0), weight(head, 2), length, row % length, out);
}

template <typename T>
void launch_tables(unsigned int blocks, const Tensor& pos_weight, Tensor& row_table, Tensor& col_table) {
  tables_kernel<T><<<blocks, kThreads, 0, current_stream(pos_weight)>>>(
      PosWeight<T>(pos_weight), pos_weight.size(0), row_table.size(1), col_table.size(1),
      static_cast<T*>(row_table.mutable_data_ptr()), static_cast<T*>(col_table.mutable_data_ptr()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<Tensor, Tensor> relative_position_tables(const Tensor& pos_weight, int64_t height, int64_t width) {
  check_pos_weight(pos_weight, height, width);
  STD_TORCH_CHECK(pos_weight.is_cuda(), "pos_weight must be on a CUDA device");
  const unsigned int blocks = checked_blocks((pos_weight.size(0) * (height + width) + kThreads - 1) / kThreads);
  const torch::stable::accelerator::DeviceGuard guard(pos_weight.get_device_index());
  auto [row_table, col_table] = empty_tables(pos_weight, height, width);
  if (blocks > 0) {
    if (pos_weight.scalar_type() == ScalarType::Float) {
      launch_tables<float>(blocks, pos_weight, row_table, col_table);
    } else {
      launch_tables<double>(blocks, pos_weight, row_table, col_table);
    }
  }
  return {row_table, col_table};
}

// One block a head. Partial sums meet in a tree of fixed shape: the same bits in every run.
template <typename T>
__global__ void gradient_kernel(Table<T> rows, Table<T> cols, Table<T> d_rows, Table<T> d_cols, T* gradient) {
  __shared__ double sums[3][kThreads];
  const int64_t head = blockIdx.x;
  AxisGradient along_x, along_y;
  for (int64_t query = threadIdx.x; query < rows.length; query += kThreads) {
    along_y.add_row(
        rows.row(head, query), d_rows.row(head, query), rows.key_stride, d_rows.key_stride, rows.length, query);
  }
  for (int64_t query = threadIdx.x; query < cols.length; query += kThreads) {
    along_x.add_row(
        cols.row(head, query), d_cols.row(head, query), cols.key_stride, d_cols.key_stride, cols.length, query);
  }
  sums[0][threadIdx.x] = along_x.linear;
  sums[1][threadIdx.x] = along_y.linear;
  sums[2][threadIdx.x] = along_x.quadratic + along_y.quadratic;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) {
      for (int k = 0; k < 3; ++k) {
        sums[k][threadIdx.x] += sums[k][threadIdx.x + half];
      }
    }
  }
  __syncthreads();
  if (threadIdx.x < 3) {
    gradient[head * 3 + threadIdx.x] = static_cast<T>(sums[threadIdx.x][0]);
  }
}

template <typename T>
void launch_gradient(
    unsigned int blocks, const Tensor& grad_row, const Tensor& grad_col, const Tensor& row_table,
    const Tensor& col_table, Tensor& out) {
  gradient_kernel<T><<<blocks, kThreads, 0, current_stream(row_table)>>>(
      Table<T>(row_table), Table<T>(col_table), Table<T>(grad_row), Table<T>(grad_col),
      static_cast<T*>(out.mutable_data_ptr()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor relative_position_tables_backward(
    const Tensor& grad_row, const Tensor& grad_col, const Tensor& row_table, const Tensor& col_table) {
  check_backward(grad_row, grad_col, row_table, col_table);
  STD_TORCH_CHECK(row_table.is_cuda(), "the tables must be on a CUDA device");
  const unsigned int blocks = checked_blocks(row_table.size(0));
  const torch::stable::accelerator::DeviceGuard guard(row_table.get_device_index());
  Tensor gradient = torch::stable::new_empty(row_table, {row_table.size(0), 3});
  if (blocks > 0) {
    if (row_table.scalar_type() == ScalarType::Float) {
      launch_gradient<float>(blocks, grad_row, grad_col, row_table, col_table, gradient);
    } else {
      launch_gradient<double>(blocks, grad_row, grad_col, row_table, col_table, gradient);
    }
  }
  return gradient;
}

// One block a table row: both axes' probabilities into shared memory, then their outer product out in one sweep.
template <typename T, typename Out>
__global__ void dense_kernel(PosWeight<T> weight, int64_t height, int64_t width, int64_t columns, Out* table) {
  extern __shared__ double shared[];  // the larger alignment of the two
  T* along_x = reinterpret_cast<T*>(shared);
  T* along_y = along_x + width;
  const int64_t tokens = height * width;
  const int64_t head = blockIdx.x / tokens, query = blockIdx.x % tokens;
  if (threadIdx.x == 0) {
    softmax_row(weight(head, 0), weight(head, 2), width, query % width, along_x);
  } else if (threadIdx.x == 32) {
    softmax_row(weight(head, 1), weight(head, 2), height, query / width, along_y);
  }
  __syncthreads();
  Out* row = table + static_cast<int64_t>(blockIdx.x) * columns;
  for (int64_t column = threadIdx.x; column < columns; column += kThreads) {
    const T value = column < tokens ? along_y[column / width] * along_x[column % width] : T(0);
    row[column] = static_cast<Out>(static_cast<float>(value));
  }
}

template <typename T, typename Out>
void launch_dense(unsigned int blocks, const Tensor& pos_weight, int64_t height, int64_t width, Tensor& table) {
  const int64_t bytes = (height + width) * static_cast<int64_t>(sizeof(T));
  dense_kernel<T, Out><<<blocks, kThreads, bytes, current_stream(pos_weight)>>>(
      PosWeight<T>(pos_weight), height, width, table.size(2), static_cast<Out*>(table.mutable_data_ptr()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T>
void launch_dense_as(
    unsigned int blocks, const Tensor& pos_weight, int64_t height, int64_t width, ScalarType dtype, Tensor& table) {
  if (dtype == ScalarType::Float) {
    launch_dense<T, float>(blocks, pos_weight, height, width, table);
  } else if (dtype == ScalarType::Half) {
    launch_dense<T, torch::headeronly::Half>(blocks, pos_weight, height, width, table);
  } else {
    launch_dense<T, torch::headeronly::BFloat16>(blocks, pos_weight, height, width, table);
  }
}

Tensor dense_position_table(const Tensor& pos_weight, int64_t height, int64_t width, ScalarType dtype) {
  check_dense_table(pos_weight, height, width, dtype);
  STD_TORCH_CHECK(pos_weight.is_cuda(), "pos_weight must be on a CUDA device");
  const int64_t longest =
      kSharedBytes / (pos_weight.scalar_type() == ScalarType::Float ? sizeof(float) : sizeof(double));
  STD_TORCH_CHECK(
      height + width <= longest, "a grid of ", height, "x", width,
      " is too long for the dense table on CUDA: height + width is at most ", longest,
      " in pos_weight's dtype; use relative_position_tables");
  const unsigned int blocks = checked_blocks(pos_weight.size(0) * height * width);
  const torch::stable::accelerator::DeviceGuard guard(pos_weight.get_device_index());
  Tensor table = empty_dense_table(pos_weight, height, width, dtype);
  if (blocks > 0) {
    if (pos_weight.scalar_type() == ScalarType::Float) {
      launch_dense_as<float>(blocks, pos_weight, height, width, dtype, table);
    } else {
      launch_dense_as<double>(blocks, pos_weight, height, width, dtype, table);
    }
  }
  return table;
}

}  // namespace

CONVIT_KERNELS_IMPL(CUDA, m) {
  m.impl("relative_position_tables", TORCH_BOX(&relative_position_tables));
  m.impl("relative_position_tables_backward", TORCH_BOX(&relative_position_tables_backward));
  m.impl("dense_position_table", TORCH_BOX(&dense_position_table));
}

}  // namespace convit_kernels
