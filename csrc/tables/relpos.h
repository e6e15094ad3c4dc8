// The arithmetic of the relative-position tables, compiled by the host compiler and by nvcc alike.
//
// Along one axis of the patch grid the positional logit of ConViT (arXiv 2103.10697, equations 5 and 7) is
//     logit(query, key) = linear * offset + quadratic * offset^2,   offset = key - query,
// and a table row is the softmax of it over the keys of that axis. Column tables take (w0, w2), row tables (w1, w2).
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define CONVIT_HOST_DEVICE __host__ __device__ inline
#else
#define CONVIT_HOST_DEVICE inline
#endif

namespace convit_kernels {

// Writes the softmax over the keys 0 .. length-1 for one query.
template <typename T>
CONVIT_HOST_DEVICE void softmax_row(T linear, T quadratic, int64_t length, int64_t query, T* out) {
  T largest = 0;
  for (int64_t key = 0; key < length; ++key) {
    const T offset = static_cast<T>(key - query);
    out[key] = offset * (linear + quadratic * offset);
    largest = key == 0 || out[key] > largest ? out[key] : largest;
  }
  T sum = 0;
  for (int64_t key = 0; key < length; ++key) {
    out[key] = std::exp(out[key] - largest);
    sum += out[key];
  }
  for (int64_t key = 0; key < length; ++key) {
    out[key] /= sum;
  }
}

// Gradients of one axis's two weights, in double: thousands of terms of mixed sign are added up.
struct AxisGradient {
  double linear = 0, quadratic = 0;

  // Adds one row's part: the softmax backward p * (grad - p . grad), then the chain rule to both weights. Offsets are
  // relative to the query; absolute coordinates would cancel badly.
  template <typename T>
  CONVIT_HOST_DEVICE void add_row(
      const T* row, const T* grad, int64_t row_stride, int64_t grad_stride, int64_t length, int64_t query) {
    double mean = 0;
    for (int64_t key = 0; key < length; ++key) {
      mean += static_cast<double>(row[key * row_stride]) * static_cast<double>(grad[key * grad_stride]);
    }
    for (int64_t key = 0; key < length; ++key) {
      const double d_logit =
          static_cast<double>(row[key * row_stride]) * (static_cast<double>(grad[key * grad_stride]) - mean);
      const double offset = static_cast<double>(key - query);
      linear += d_logit * offset;
      quadratic += d_logit * offset * offset;
    }
  }
};

}  // namespace convit_kernels
