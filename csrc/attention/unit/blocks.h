// How one image and head is cut into blocks of queries and chunks of keys, and a thread's memory into pieces.
#pragma once

#include "simd.h"

namespace convit_kernels {
namespace {

// Hands out a thread's memory piece by piece; from null it only counts.
class Memory {
 public:
  explicit Memory(void* start) : start_(static_cast<char*>(start)) {}

  template <typename T>
  T* take(int64_t count) {
    T* piece = start_ == nullptr ? nullptr : reinterpret_cast<T*>(start_ + used_);
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return piece;
  }

  int64_t used() const { return used_; }

 private:
  char* start_;
  int64_t used_ = 0;
};

// The queries of one image, in blocks of whole vectors and nearly equal size.
template <typename T>
struct QueryBlocks {
  int64_t tokens, vectors, count, largest;

  QueryBlocks(int64_t tokens, int64_t most_vectors)
      : tokens(tokens), vectors(ceil_div(tokens, kLanes<T>)), count(ceil_div(vectors, most_vectors)),
        largest(ceil_div(vectors, count) * kLanes<T>) {}

  int64_t begin(int64_t block) const {
    return kLanes<T> * (block * (vectors / count) + minimum(block, vectors % count));
  }
  int64_t columns(int64_t block) const { return begin(block + 1) - begin(block); }
  int64_t rows(int64_t block) const { return minimum(columns(block), tokens - begin(block)); }
};

// Keys are taken in chunks whose values and scores stay in the first-level cache: so many numbers of 4 bytes for each
// of a panel's queries and for each channel.
constexpr int64_t kChunk = 96;

struct KeyChunks {
  int64_t tokens, size;

  KeyChunks(int64_t tokens, int64_t most, int64_t multiple)
      : tokens(tokens), size(round_up(ceil_div(tokens, ceil_div(tokens, most)), multiple)) {}

  int64_t rows(int64_t begin) const { return minimum(size, tokens - begin); }
};

// Keys whose scores are computed at a time, a multiple of every operand's kRows: what is fetched meanwhile for the next
// head is little enough to arrive.
constexpr int64_t kPiece = 32;

}  // namespace
}  // namespace convit_kernels
