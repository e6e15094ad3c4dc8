// Rows of a tensor, widened, copied and transposed: from memory to what the products read, and back.
#pragma once

#include "formats.h"

namespace convit_kernels {
namespace {

template <typename S>
S* rows_of(const Problem& p, const Strided& tensor, int64_t image_head) {
  return static_cast<S*>(tensor.data) + image_head / p.heads * tensor.image + image_head % p.heads * tensor.head;
}

// Brings every cache line of a row into the caches, the nearest by 3, all but that by 2.
// Inlined by force, as what calls it must be: GCC drops calls of functions that only prefetch.
template <int kLocality, typename S>
CONVIT_INLINE void prefetch_row(const S* row, int64_t head_dim) {
  for (int64_t channel = 0; channel < head_dim; channel += 64 / sizeof(S)) {
    __builtin_prefetch(row + channel, 0, kLocality);
  }
  __builtin_prefetch(row + head_dim - 1, 0, kLocality);
}

// Some tensors' rows of the head that is next, brought into the second-level cache while this one is worked on.
template <typename S, int kTensors>
class NextHead {
 public:
  NextHead(const Problem& p, const Strided (&tensors)[kTensors], int64_t image_head)
      : there_(image_head + 1 < p.images * p.heads), head_dim_(p.head_dim) {
    for (int tensor = 0; there_ && tensor < kTensors; ++tensor) {
      rows_[tensor] = rows_of<S>(p, tensors[tensor], image_head + 1);
      strides_[tensor] = tensors[tensor].token;
    }
  }

  // The part of them that belongs to the steps from `begin` to `end`, where there are `steps` for each row.
  CONVIT_INLINE void prefetch(int64_t begin, int64_t end, int64_t steps) const {
    for (int64_t row = begin / steps; there_ && row < end / steps; ++row) {
      for (int tensor = 0; tensor < kTensors; ++tensor) {
        prefetch_row<2>(rows_[tensor] + row * strides_[tensor], head_dim_);
      }
    }
  }

 private:
  const bool there_;
  const int64_t head_dim_;
  const S* rows_[kTensors];
  int64_t strides_[kTensors];
};

// Copies `bytes` bytes, fewer than 2 kPiece: a piece of each power of two that is in their number.
template <int kPiece>
CONVIT_INLINE void copy_bytes(const void* from, int64_t bytes, void* to) {
  if constexpr (kPiece > 0) {
    const int64_t piece = bytes & kPiece;
    if (piece != 0) {
      __builtin_memcpy(to, from, kPiece);
    }
    copy_bytes<kPiece / 2>(static_cast<const char*>(from) + piece, bytes, static_cast<char*>(to) + piece);
  }
}

template <typename T, typename S>
CONVIT_INLINE void widen_row(const S* from, int64_t count, T* to) {
  for (int64_t channel = 0; channel < count; ++channel) {
    to[channel] = widen(from[channel]);
  }
}

#ifdef __F16C__
CONVIT_INLINE void widen_row(const Half* from, int64_t count, float* to) {
  int64_t channel = 0;
  for (; channel + 8 <= count; channel += 8) {
    _mm256_storeu_ps(to + channel, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + channel))));
  }
  for (; channel < count; ++channel) {
    to[channel] = widen(from[channel]);
  }
}
#endif

// Rows that are `stride` apart, widened, to (rows, channels); those beyond head_dim are zero.
template <typename T, typename S>
void copy_rows(const S* from, int64_t stride, int64_t rows, int64_t head_dim, T* to, int64_t channels) {
  for (int64_t row = 0; row < rows; ++row, from += stride, to += channels) {
    widen_row(from, head_dim, to);
    for (int64_t channel = head_dim; channel < channels; ++channel) {
      to[channel] = 0;
    }
  }
}

template <typename T, typename S>
CONVIT_INLINE void narrow_row(const T* from, T factor, int64_t count, S* to) {
  for (int64_t channel = 0; channel < count; ++channel) {
    narrow(from[channel] * factor, to[channel]);
  }
}

#ifdef __F16C__
CONVIT_INLINE void narrow_row(const float* from, float factor, int64_t count, Half* to) {
  int64_t channel = 0;
  for (; channel + 8 <= count; channel += 8) {
    const __m256 value = _mm256_loadu_ps(from + channel) * factor;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + channel), _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  }
  narrow_row<float, Half>(from + channel, factor, count - channel, to + channel);
}
#endif

#ifdef __AVX512BF16__
CONVIT_INLINE void narrow_row(const float* from, float factor, int64_t count, BFloat16* to) {
  int64_t channel = 0;
  for (; channel + kLanes<float> <= count; channel += kLanes<float>) {
    const auto narrow = _mm512_cvtneps_pbh(load(from + channel) * factor);
    __builtin_memcpy(to + channel, &narrow, sizeof(narrow));
  }
  narrow_row<float, BFloat16>(from + channel, factor, count - channel, to + channel);
}
#endif

// The inverse of copy_rows, multiplied by `factor`.
template <typename T, typename S>
void write_rows(const T* from, int64_t channels, T factor, S* to, int64_t stride, int64_t rows, int64_t head_dim) {
  for (int64_t row = 0; row < rows; ++row, from += channels, to += stride) {
    narrow_row(from, factor, head_dim, to);
  }
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define CONVIT_SHUFFLES
#endif
#endif

#ifdef CONVIT_SHUFFLES
template <int... kIndex>
struct Indices {};
template <int kCount, int... kIndex>
struct CountUp : CountUp<kCount - 1, kCount - 1, kIndex...> {};
template <int... kIndex>
struct CountUp<0, kIndex...> {
  using type = Indices<kIndex...>;
};

// Exchanges the off-diagonal quarters of blocks of 2 kStep x 2 kStep.
template <int kStep, typename V, int... kLane>
CONVIT_INLINE void exchange(V& upper, V& lower, Indices<kLane...>) {
  constexpr int lanes = sizeof...(kLane);
  const V first = __builtin_shufflevector(upper, lower, (kLane & kStep ? lanes + kLane - kStep : kLane)...);
  lower = __builtin_shufflevector(upper, lower, (kLane & kStep ? lanes + kLane : kLane + kStep)...);
  upper = first;
}

template <int kStep, typename V, int kCount>
CONVIT_INLINE void transpose_square(V (&rows)[kCount]) {
  if constexpr (kStep < kCount) {
#pragma GCC unroll 16
    for (int row = 0; row < kCount; ++row) {
      if ((row & kStep) == 0) {
        exchange<kStep>(rows[row], rows[row + kStep], typename CountUp<kCount>::type{});
      }
    }
    transpose_square<2 * kStep>(rows);
  }
}
#endif

// (rows, channels) -> (channels, columns); channels and columns are whole vectors, rows beyond the last are zero.
template <typename T>
void transpose_rows(const T* from, int64_t rows, int64_t channels, T* to, int64_t columns) {
  constexpr int lanes = kLanes<T>;
  for (int64_t row = 0; row < columns; row += lanes) {
    for (int64_t channel = 0; channel < channels; channel += lanes) {
#ifdef CONVIT_SHUFFLES
      Vector<T> square[lanes];
#pragma GCC unroll 16
      for (int lane = 0; lane < lanes; ++lane) {
        square[lane] = row + lane < rows ? load(from + (row + lane) * channels + channel) : Vector<T>{};
      }
      transpose_square<1>(square);
#pragma GCC unroll 16
      for (int lane = 0; lane < lanes; ++lane) {
        store(to + (channel + lane) * columns + row, square[lane]);
      }
#else
      for (int lane = 0; lane < lanes; ++lane) {
        for (int other = 0; other < lanes; ++other) {
          to[(channel + other) * columns + row + lane] =
              row + lane < rows ? from[(row + lane) * channels + channel + other] : T(0);
        }
      }
#endif
    }
  }
}

}  // namespace
}  // namespace convit_kernels
